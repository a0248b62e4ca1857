"""`python -m onpath`."""

import sys

from onpath.commands.cli import main

sys.exit(main())
