"""Output that no terminal's encoding can end: signs that it lacks are spelled otherwise.

Figures are shown as 98.00 ± 1.41. Where the output's encoding has no such sign (an ASCII locale,
``PYTHONIOENCODING``, a log file of latin-1) it is written as +-, before the table is laid out; what
else is missing, such as letters of a path, by its number.
"""

from __future__ import annotations

import codecs
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

ERRORS = "dcconv_spelled"

_SPELLINGS = {
    "±": "+-",
    "†": "*",
    "²": "^2",
    "–": "-",  # noqa: RUF001  (what a table shows where there is no figure)
    "…": "~",
}


def _spell_error(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: the handler of errors for ``str.encode``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    spelled = (
        _SPELLINGS.get(letter) or letter.encode("ascii", "backslashreplace").decode()
        for letter in letters
    )
    return "".join(spelled), error.end


codecs.register_error(ERRORS, _spell_error)


def spell(text: str, encoding: str) -> str:
    """Return a text with what an encoding lacks spelled otherwise.

    Example:
        >>> spell("98.00 ± 1.41", "ascii"), spell("98.00 ± 1.41", "utf-8")
        ('98.00 +- 1.41', '98.00 ± 1.41')
    """
    return text.encode(encoding, ERRORS).decode(encoding)


def prepare() -> None:
    """Let standard output and standard error spell what they cannot write instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=ERRORS)


def has_unicode(stream: Any) -> bool:
    """Return whether every text can be written to a stream."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


class SpellingConsole(Console):
    """A console whose texts are spelled before they are measured, so that tables stay straight."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as rich lays it out."""
        return super().render_str(spell(text, self.encoding), **options)
