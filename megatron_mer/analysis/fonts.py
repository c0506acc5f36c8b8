"""Fonts for pictures whose names may be in any script."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from megatron_mer.log import get_logger

BASE = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Arabic, and no Chinese, Japanese or Korean."""
FALLBACKS = (
    "Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "IPAGothic", "TakaoPGothic", "VL Gothic",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans",
    "Yu Gothic", "MS Gothic", "Noto Sans CJK SC", "Noto Sans SC", "Noto Sans KR",
    "Noto Sans Arabic", "Noto Naskh Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari",
    "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Telugu", "Noto Sans Thai",
    "Noto Sans Georgian", "Noto Sans Armenian", "Noto Sans Ethiopic", "Noto Sans Khmer",
    "Noto Sans Myanmar", "Noto Sans Symbols2",
)  # fmt: skip

logger = get_logger(__name__)
_told: set[str] = set()


def font_families(texts: Iterable[str]) -> list[str]:
    """Families that together have the characters of some texts, matplotlib's own first.

    What no font of this machine has is said in one log line, once.
    """
    missing = _visible(texts) - _characters(BASE)
    families = [BASE]
    for name in FALLBACKS:
        if missing and (gain := missing & _characters(name)):
            families.append(name)
            missing -= gain
    if missing - _told:
        shown = "".join(sorted(missing - _told)[:20])
        _told.update(missing)
        logger.warning(
            "no font on this machine has %s: boxes stand there in pictures (PNG); "
            "`apt-get install fonts-noto-core fonts-noto-cjk` brings them",
            shown,
        )
    return families


def plain(text: str, most: int = 28) -> str:
    """A name for a picture: without what cannot be seen or turns the direction, cut if long."""
    kept = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cs", "Co"))
    kept = "".join(char for char in kept if char not in _DIRECTION)
    return kept if len(kept) <= most else kept[: most - 1] + "…"


_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


def _visible(texts: Iterable[str]) -> set[str]:
    hidden = ("C", "Z", "M")
    return {c for text in texts for c in text if not unicodedata.category(c).startswith(hidden)}


@cache
def _characters(family: str) -> frozenset[str]:
    """The characters of an installed family; none if there is no such one."""
    path = _paths().get(family)
    if path is None:
        return frozenset()
    return frozenset(map(chr, FT2Font(path).get_charmap()))


@cache
def _paths() -> dict[str, str]:
    """Family -> file, also of fonts that came after matplotlib made its list."""
    manager = font_manager.fontManager
    known = {Path(entry.fname) for entry in manager.ttflist}
    for name in font_manager.findSystemFonts():
        path = Path(name)
        stem = path.name.lower()
        usual = not any(word in stem for word in ("bold", "italic", "oblique", "serif", "mono"))
        # Reading all fonts takes seconds; those above have Sans or Gothic in their name or are few.
        if usual and path not in known and any(word in stem for word in _STEMS):
            try:
                manager.addfont(name)
            except (RuntimeError, OSError):  # A broken font is no reason to have no picture.
                continue
    return {entry.name: entry.fname for entry in manager.ttflist if entry.weight == 400}


_STEMS = ("cjk", "sansjp", "sanssc", "sanskr", "gothic", "wqy", "fallback", "arabic", "notosans-",
          "hebrew", "devanagari", "bengali", "tamil", "telugu", "thai", "georgian", "armenian",
          "ethiopic", "khmer", "myanmar", "symbols2")  # fmt: skip
