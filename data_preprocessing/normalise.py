"""Normalising the text of a document."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, get_args

UnicodeForm = Literal["NFC", "NFKC", "none"]
UNICODE_FORMS: tuple[str, ...] = get_args(UnicodeForm)

LINE_ENDINGS = re.compile("\r\n|[\r\u0085\u2028\u2029]")
# C0 and C1 controls but tab and newline, and the byte order mark. Joiners and direction marks
# (category Cf) stay: Arabic and Persian spelling needs them.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


@dataclass(frozen=True)
class Normaliser:
    """What is done to each text, in this order."""

    line_endings: bool = True
    """Write every kind of line ending as one newline."""
    control_characters: bool = True
    """Remove control characters except tab and newline."""
    unicode_form: UnicodeForm = "NFC"
    """NFC composes characters; NFKC also replaces compatibility forms, which loses information."""

    def __call__(self, text: str) -> str:
        """Return the normalised text; a normalised text stays as it is."""
        if self.line_endings:
            text = LINE_ENDINGS.sub("\n", text)
        if self.control_characters:
            text = CONTROL_CHARACTERS.sub("", text)
        if self.unicode_form != "none":
            text = unicodedata.normalize(self.unicode_form, text)
        return text
