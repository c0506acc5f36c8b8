"""Files that grow, are cut and replaced while they are read."""

import os
import random
import tracemalloc

import pytest

from megatron_mer.analysis.tail import LineTail, WholeFile, sample_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def append(path, text: bytes) -> None:
    with open(path, "ab") as file:
        file.write(text)


def test_a_file_that_comes_later_and_grows(path):
    tail = LineTail(path)
    assert tail.read() == tail.read()
    assert not tail.read().restarted
    path.touch()
    assert tail.read().lines == []
    append(path, b"one\ntwo\n")
    news = tail.read()
    assert (news.lines, news.restarted, news.left_out, news.more) == (
        [b"one", b"two"],
        False,
        False,
        False,
    )
    assert tail.read().lines == []
    append(path, b"\nthree\n")
    assert tail.read().lines == [b"", b"three"]


def test_a_torn_line_is_given_when_it_is_whole(path):
    tail = LineTail(path)
    append(path, b'{"step": 1}\n{"st')
    assert tail.read().lines == [b'{"step": 1}']
    assert tail.read().lines == []
    append(path, b'ep": 2')
    assert tail.read().lines == []
    append(path, b'}\n{"step"')
    assert tail.read().lines == [b'{"step": 2}']


def test_a_replaced_file_is_read_from_its_beginning(path):
    tail = LineTail(path)
    append(path, b"one\ntwo\nthree\n")
    tail.read()
    new = path.with_name("new")
    # As a resume does: fewer lines, and more by the time of the next look.
    new.write_bytes(b"one\ntwo\nother\nfour\nfive\n")
    new.replace(path)
    news = tail.read()
    assert news.restarted
    assert news.lines == [b"one", b"two", b"other", b"four", b"five"]
    assert not tail.read().restarted


@pytest.mark.parametrize("content", [b"", b"one\n", b"two\nthree\nfour\n"])
def test_a_file_cut_in_place_is_read_from_its_beginning(path, content):
    tail = LineTail(path)
    append(path, b"one\ntwo\nthr")
    tail.read()
    inode = path.stat().st_ino
    with open(path, "wb") as file:
        file.write(content)
    assert path.stat().st_ino == inode
    news = tail.read()
    assert news.restarted
    assert news.lines == content.split(b"\n")[:-1]


def test_a_removed_file_is_one_restart(path):
    tail = LineTail(path)
    append(path, b"one\n")
    tail.read()
    path.rename(path.with_name("aside"))
    assert tail.read().restarted
    assert not tail.read().restarted
    append(path, b"two\n")
    assert tail.read().lines == [b"two"]


def test_a_file_that_cannot_be_read_now_is_no_restart(path, monkeypatch):
    tail = LineTail(path)
    append(path, b"one\n")
    tail.read()
    append(path, b"two\n")

    def stale(*_):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", stale)
        assert tail.read().lines == []
    news = tail.read()
    assert (news.lines, news.restarted) == ([b"two"], False)


def test_only_the_end_of_a_long_file_is_read(path):
    path.write_bytes(b"".join(b"%06d\n" % number for number in range(1000)))
    news = LineTail(path, keep=70).read()
    # 70 bytes are ten whole lines, the first of which begins right there.
    assert news.lines == [b"%06d" % number for number in range(990, 1000)]
    assert news.left_out
    assert LineTail(path, keep=73).read().lines == news.lines
    assert not LineTail(path, keep=7000).read().left_out


def test_a_watcher_that_slept_catches_up_with_the_end(path):
    tail = LineTail(path, keep=100)
    append(path, b"first\n")
    assert not tail.read().left_out
    append(path, b"".join(b"%06d\n" % number for number in range(1000)))
    news = tail.read()
    assert news.left_out
    assert not news.restarted
    assert news.lines[-1] == b"000999"
    assert len(news.lines) == 14
    append(path, b"last\n")
    news = tail.read()
    assert (news.lines, news.left_out, news.restarted) == ([b"last"], False, False)


def test_everything_comes_in_pieces_of_bounded_size(path):
    wanted = [b"%06d" % number for number in range(1000)]
    path.write_bytes(b"".join(line + b"\n" for line in wanted))
    tail, lines, looks = LineTail(path, most=100), [], 0
    while True:
        news = tail.read()
        assert not news.restarted
        lines += news.lines
        looks += 1
        if not news.more:
            break
    assert lines == wanted
    assert looks >= 70


def test_a_line_beyond_the_bound_is_passed_over(path):
    tail = LineTail(path, most=50)
    path.write_bytes(b"one\n" + b"x" * 300 + b"\ntwo\n")
    lines = []
    for _ in range(20):
        lines += tail.read().lines
    assert lines == [b"one", b"two"]


def test_any_way_of_writing_gives_each_line_once(path):
    """Pieces that end anywhere, looks at any moment, a replacement now and then."""
    chance = random.Random(1)
    tail = LineTail(path, most=64)
    for trial in range(60):
        wanted = [b"%d.%d %s" % (trial, at, b"y" * chance.randrange(30)) for at in range(30)]
        rest = b"".join(line + b"\n" for line in wanted)
        got: list[bytes] = []
        new = path.with_name("new")
        new.write_bytes(b"")
        new.replace(path)
        while rest:
            size = chance.randrange(1, 80)
            append(path, rest[:size])
            rest = rest[size:]
            for _ in range(chance.randrange(3)):
                news = tail.read()
                got = (got if not news.restarted else []) + news.lines
        for _ in range(60):
            got += tail.read().lines
        assert got == wanted


def test_samples_are_evenly_spread_and_none_comes_twice(path):
    path.write_bytes(b"".join(b"%06d\n" % number for number in range(100_000)))
    lines = sample_lines(path, 100)
    assert [int(line) for line in lines] == list(range(0, 100_000, 1000))
    assert [int(line) for line in sample_lines(path, 10, end=7000)] == list(range(0, 1000, 100))
    path.write_bytes(b"one\ntwo\nthree\ntor")
    assert sample_lines(path, 50) == [b"one", b"two", b"three"]
    path.write_bytes(b"")
    assert sample_lines(path, 50) == []
    assert sample_lines(path.with_name("nowhere"), 50) == []


def test_samples_of_long_lines(path):
    lines = [b"%02d %s" % (number, b"x" * 100_000) for number in range(20)]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert sample_lines(path, 5) == [lines[0], lines[4], lines[8], lines[12], lines[16]]


def test_a_huge_file_costs_no_time_and_no_memory(path):
    """Ten million lines' worth of bytes, most of them a hole that nobody may read."""
    line = b'{"step": 1, "loss": 5.0}\n'
    with open(path, "wb") as file:
        file.truncate(8 * 2**30)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + line * 1000)
    tracemalloc.start()
    news = LineTail(path, keep=2**20).read()
    sample_lines(path, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert news.lines[-1000:] == [line[:-1]] * 1000
    assert peak < 8 * 2**20


def test_a_whole_file_is_read_when_it_changed(path):
    file = WholeFile(path)
    assert file.changed() is None
    path.write_text("a")
    assert file.changed() == b"a"
    assert file.changed() is None
    new = path.with_name("new")
    new.write_text("b")
    new.replace(path)
    assert file.changed() == b"b"
    path.unlink()
    assert file.changed() == b""
    assert file.changed() is None
