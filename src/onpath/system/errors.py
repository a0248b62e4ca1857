"""The one exception that means: the user can fix this."""

import os
import sys
import traceback
from collections.abc import Callable

from onpath.system.text import one_line

_LONGEST = 2000
"""Characters of a sentence: one that lists every key of a file helps nobody."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, line or key and says what would be right.

    The command line prints the sentence alone and exits with code 2.
    """


def guarded(run: Callable[[], int | None]) -> int:
    """Runs a command; its exit code. What the user can fix is one sentence on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning at every fork otherwise
    try:
        return int(run() or 0)
    except UserError as error:
        print(f"onpath: {one_line(str(error), _LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("onpath: interrupted; start the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has left
        return 0
    except Exception:
        traceback.print_exc()
        return 1
