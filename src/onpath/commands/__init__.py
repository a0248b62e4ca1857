"""What a person types. Each command is a function with keyword arguments and a result, and a thin skin."""
