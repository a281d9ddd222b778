"""The one error that a person at the terminal can mend, and the nearest known name for a mistyped one."""

from __future__ import annotations

import difflib
from typing import Any


class UserError(Exception):
    """A mistake in the input that its owner can mend: one line that names the file or sample and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, known: Any) -> str:
    """' (did you mean ...?)' for a mistyped name, or the list of the known ones."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(sorted(known))})"
