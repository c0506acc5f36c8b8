import logging

import pytest

from megatron_mer.analysis import fonts


def test_matplotlibs_own_font_is_enough_for_arabic():
    assert fonts.font_families(["en", "العربية", "Ελληνικά"]) == [fonts.BASE]


def test_what_no_font_has_is_said_once(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    fonts._paths()  # Before they are replaced: fonts are looked for once.
    base = fonts._paths()[fonts.BASE]
    monkeypatch.setattr(fonts, "_paths", lambda: {fonts.BASE: base})
    monkeypatch.setattr(fonts, "_told", set())
    fonts._characters.cache_clear()
    fonts.logger.addHandler(handler)
    try:
        assert fonts.font_families(["日本語"]) == [fonts.BASE]
        assert fonts.font_families(["日本語"]) == [fonts.BASE]
    finally:
        fonts.logger.removeHandler(handler)
        fonts._characters.cache_clear()
    (line,) = said
    assert "日本語" in line
    assert "fonts-noto-cjk" in line


def test_names_for_pictures_show_only_what_can_be_seen():
    assert fonts.plain("a\u202eb\x00c\u2068d") == "abcd"
    assert fonts.plain("x" * 40, 10) == "x" * 9 + "…"
