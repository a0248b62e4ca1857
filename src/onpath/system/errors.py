"""The one exception that means: the user can fix this."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from onpath.system.signals import Interrupted, Stopped, interrupts_noted
from onpath.system.streams import say, silence
from onpath.system.text import one_line

_OF_LAUNCHER = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun looks for why a process ended; each has a directory of its own in a common one."""
_LONGEST = 2000
"""Characters of a sentence: one that lists every key of a file helps nobody."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, line or key and says what would be right.

    The command line prints the sentence alone and exits with code 2.
    """

    frames = ""
    """Of a user's own code that failed: where, as tracebacks show it. Stands above the sentence."""


def guarded(run: Callable[[], int | None]) -> int:
    """Runs a command; its exit code. What the user can fix is one sentence on stderr."""
    with interrupts_noted() as pressed:
        return _guarded(run, pressed)


def _guarded(run: Callable[[], int | None], pressed: list[int]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning at every fork otherwise
    try:
        code = int(run() or 0)
        sys.stdout.flush()  # at Python's end a reader that has left would be a failure: exit code 120
        return code
    except UserError as error:
        return _failed(one_line(str(error), _LONGEST), error.frames)
    except Stopped as ended:
        say_once(f"onpath: {ended.sentence}")
        return 0
    except Interrupted as ended:
        say_once(f"onpath: {ended.sentence}")
        return 130
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        silence(sys.stdout)  # the reader (head, less) has left
        return 0
    except Exception as error:
        if sentence := sentence_of(error):
            return _failed(sentence)
        if pressed:
            return _interrupted()
        traceback.print_exc()
        return 1


def _interrupted() -> int:
    say("onpath: interrupted; start the same command again to go on")
    return 130


def sentence_of(error: Exception) -> str:
    """What people are told; empty: a fault of ours, of which they see the traceback."""
    if isinstance(error, UserError):
        return str(error)
    if is_lack_of_memory(error):
        return (
            f"out of memory: {one_line(str(error), 300)}; lower optim.micro_batch_tokens or "
            "rollout.batch_tokens, or use a smaller model; what is finished is on disk"
        )
    return ""


def _failed(sentence: str, frames: str = "") -> int:
    """Says it, also to torchrun: its report, which stands below a traceback of its own, then ends with the
    sentence, in place of a link to a page on how to get tracebacks."""
    say_once(f"{frames}onpath: {sentence}")
    place = os.environ.get(_OF_LAUNCHER)
    if place is not None:
        told = {"message": f"onpath: {sentence}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(place).write_text(json.dumps({"message": told}), encoding="utf-8")
    return 2


def is_lack_of_memory(error: Exception) -> bool:
    """torch is not imported for this: it has a class of its own for GPUs, and none for CPUs."""
    said = str(error)
    of_torch = isinstance(error, RuntimeError) and ("can't allocate memory" in said or "CUDA out of" in said)
    return isinstance(error, MemoryError) or of_torch or type(error).__name__ == "OutOfMemoryError"


def say_once(sentence: str) -> None:
    """One line on stderr; of torchrun's processes on this machine only the first one that has it says it.

    No process group is asked: most mistakes are found before there is one, and some by one process alone.
    """
    place = os.environ.get(_OF_LAUNCHER)
    if place is not None:
        mark = Path(place).parent.parent / f"said-{sha256(sentence.encode()).hexdigest()[:16]}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # said twice is better than not at all
            pass
    say(sentence)
