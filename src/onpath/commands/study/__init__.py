"""`onpath study`: arms and seeds from one YAML."""
