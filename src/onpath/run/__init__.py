"""One run: assembled, measured, logged, stored, resumed."""
