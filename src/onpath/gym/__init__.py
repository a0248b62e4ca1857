"""The gym: the embedded default task, with a tiny teacher and student that need no model hub.

    >>> from onpath import gym
    >>> row = gym.rows("test", 1)[0]
    >>> gym.grade(row["solution"], row["answer"])
    True

`import onpath.gym` is light: only `main`'s training and measuring load torch.
"""

from onpath.gym.check import TokenLabel, first_error, first_error_token, grade, label_tokens
from onpath.gym.language import TEMPLATES
from onpath.gym.models import model_dir
from onpath.gym.tasks import rows
from onpath.gym.vocab import ONSET_WORDS, tokenize

__all__ = [
    "ONSET_WORDS",
    "TEMPLATES",
    "TokenLabel",
    "first_error",
    "first_error_token",
    "grade",
    "label_tokens",
    "main",
    "model_dir",
    "rows",
    "tokenize",
]


def main(argv: list[str] | None = None) -> int:
    """The `onpath gym` subcommand: `tasks`, `train`, `measure`."""
    from onpath.gym.command import run

    return run(argv)
