"""Over the wire: servers and chat endpoints that generate and score, and how trained weights get there."""
