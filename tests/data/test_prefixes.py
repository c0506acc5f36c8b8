"""Datasets named by prefixes, patterns and lists."""

from pathlib import Path

import pytest

from megatron_mer.data.prefixes import expand_prefixes, read_prefix_list
from megatron_mer.errors import DataError


def test_prefixes_may_be_patterns_and_lists(tmp_path: Path) -> None:
    for name in ("fr_1", "fr_0", "a[1]", "odd.idx"):
        (tmp_path / f"{name}.idx").touch()

    def found(*names: str) -> list[str]:
        return [Path(p).name for p in expand_prefixes([f"{tmp_path}/{name}" for name in names])]

    assert found("fr_*") == found("fr_*.idx") == found("fr_?.bin") == ["fr_0", "fr_1"]
    assert found("fr_1.bin", "fr_0.idx", "missing") == ["fr_1", "fr_0", "missing"]
    assert found("a[1]", "a[1].idx", "odd.idx") == ["a[1]", "a[1]", "odd.idx"]
    with pytest.raises(DataError, match=r"de_\*: no dataset matches this pattern"):
        found("de_*")
    (tmp_path / "list").write_text("# French\n\n fr_1 \nfr_0\n")
    assert read_prefix_list(tmp_path / "list") == ["fr_1", "fr_0"]
    (tmp_path / "list").write_text("# nothing\n")
    with pytest.raises(DataError, match="names no dataset; expected one prefix a line"):
        read_prefix_list(tmp_path / "list")
    with pytest.raises(DataError, match="nolist: cannot be read"):
        read_prefix_list(tmp_path / "nolist")
