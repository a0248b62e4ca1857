"""`onpath report`: one self-contained HTML page."""
