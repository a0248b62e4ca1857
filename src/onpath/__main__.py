"""`python -m onpath`."""

import sys

from onpath.cli import main

sys.exit(main())
