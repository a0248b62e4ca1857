"""Pre-flight checks: the field's silent faults, found in about a minute instead of after a week.

Each check is a function from public objects (a config, tokenizers, an engine, a teacher) to a `Finding`.
"""

from onpath.commands.doctor.finding import Finding

__all__ = ["Finding"]
