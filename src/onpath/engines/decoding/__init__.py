"""How tokens are written one after another, and what is kept on the way."""
