"""Slow, and a target of its own: make test-families."""

import os

collect_ignore_glob = [] if os.environ.get("ONPATH_FAMILIES") else ["test_*.py"]
