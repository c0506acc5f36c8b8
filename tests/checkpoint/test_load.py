import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import (
    CheckpointReader,
    Fragment,
    candidates,
    damaged,
    find_latest,
    first_whole,
    save_checkpoint,
)
from megatron_mer.errors import CheckpointError

SHAPE = (8, 6)
WEIGHT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
NORM = torch.randn(7, generator=torch.Generator().manual_seed(2))


def alone(root: Path, step: int, fragments: list[Fragment]) -> Path:
    return save_checkpoint(
        root,
        step,
        fragments,
        {"batches": step},
        rank=0,
        world_size=1,
        first_failure=lambda reason: reason,
    )


def weight_slice(tp_dim: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    return WEIGHT.chunk(tp_size, tp_dim)[tp_rank].reshape(-1)


def cut(flat: torch.Tensor, part: int, parts: int) -> tuple[int, torch.Tensor]:
    """The way ZeRO cuts: equal parts of the rounded-up length, the last ones shorter or empty."""
    size = -(-flat.numel() // parts)
    start = min(part * size, flat.numel())
    return start, flat[start : start + size].clone()


def owned(tp_rank: int, tp_size: int, dp_rank: int, dp_size: int, tp_dim: int) -> list[Fragment]:
    start, piece = cut(weight_slice(tp_dim, tp_rank, tp_size), dp_rank, dp_size)
    begin, norm = cut(NORM, dp_rank, dp_size)
    return [
        Fragment("w", "master", SHAPE, tp_dim, tp_rank, tp_size, start, piece),
        Fragment("w", "last_delta", SHAPE, tp_dim, tp_rank, tp_size, start, piece.bfloat16()),
        Fragment("n", "master", (7,), None, tp_rank, tp_size, begin, norm),
    ]


def blank(fragment: Fragment) -> Fragment:
    values = fragment.index_entry()
    del values["numel"], values["dtype"]
    values["global_shape"] = fragment.global_shape
    return Fragment(**values, tensor=torch.full_like(fragment.tensor, float("nan")))


@pytest.mark.parametrize("tp_dim", [0, 1])
@pytest.mark.parametrize(("saved_dp", "loaded_dp"), [(1, 1), (1, 3), (3, 2), (5, 1), (2, 16)])
def test_any_data_parallel_layout(
    tmp_path: Path, ranks: type, tp_dim: int, saved_dp: int, loaded_dp: int
):
    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        fragments = owned(rank % 2, 2, rank // 2, saved_dp, tp_dim)
        return save_checkpoint(
            tmp_path,
            3,
            fragments,
            {},
            rank=rank,
            world_size=2 * saved_dp,
            first_failure=first_failure,
        )

    path = ranks(2 * saved_dp).run(one)[0]
    for rank in range(2 * loaded_dp):
        reader = CheckpointReader(path, rank)
        expected = owned(rank % 2, 2, rank // 2, loaded_dp, tp_dim)
        filled = [blank(fragment) for fragment in expected]
        reader.fill_all(filled)
        for got, want in zip(filled, expected, strict=True):
            assert torch.equal(got.tensor, want.tensor)


CUBE = torch.randn((8, 4, 12), generator=torch.Generator().manual_seed(3))


def cube(tp_dim: int, tp: tuple[int, int], dp: tuple[int, int]) -> list[Fragment]:
    """What one rank owns of a parameter with three dims, at two widths."""
    # Where the ranks do not divide the dim the last slices are shorter, or empty.
    slices = [*CUBE.chunk(tp[1], tp_dim), CUBE.narrow(tp_dim, 0, 0)]
    start, piece = cut(slices[tp[0]].reshape(-1), *dp)
    # One rank, which cuts nothing, does not know the dim.
    dim = tp_dim if tp[1] > 1 else None
    place = ("c", "last_delta", tuple(CUBE.shape), dim, *tp, start)
    norm_at, norm = cut(NORM, *dp)
    return [
        Fragment(*place, piece.bfloat16()),
        Fragment("c", "master", *place[2:], piece),
        Fragment("n", "master", (7,), None, *tp, norm_at, norm),
    ]


@pytest.mark.parametrize("tp_dim", [0, 1, 2])
@pytest.mark.parametrize("saved", [(1, 1), (2, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("loaded", [(1, 1), (1, 7), (2, 5), (3, 1), (4, 2)])
def test_any_tensor_parallel_layout(
    tmp_path: Path, ranks: type, tp_dim: int, saved: tuple[int, int], loaded: tuple[int, int]
):
    tp_size, dp_size = saved

    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        return save_checkpoint(
            tmp_path,
            3,
            cube(tp_dim, (rank % tp_size, tp_size), (rank // tp_size, dp_size)),
            {},
            rank=rank,
            world_size=tp_size * dp_size,
            first_failure=first_failure,
        )

    path = ranks(tp_size * dp_size).run(one)[0]
    for rank in range(loaded[0] * loaded[1]):
        reader = CheckpointReader(path, rank)
        tp, dp = (rank % loaded[0], loaded[0]), (rank // loaded[0], loaded[1])
        expected = cube(tp_dim, tp, dp)
        filled = [blank(fragment) for fragment in expected]
        reader.fill_all(filled)
        for got, want in zip(filled, expected, strict=True):
            assert torch.equal(got.tensor, want.tensor)
    assert torch.equal(reader.parameter("master", "c"), CUBE)
    assert torch.equal(reader.parameter("last_delta", "c"), CUBE.bfloat16())


def test_an_unchanged_layout_opens_its_own_files_only(tmp_path: Path, ranks: type):
    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        return save_checkpoint(
            tmp_path,
            3,
            owned(0, 1, rank, 3, 0),
            {},
            rank=rank,
            world_size=3,
            first_failure=first_failure,
        )

    path = ranks(3).run(one)[0]
    for rank in (0, 2):
        # The same size, so whole by the manifest; reading any of it would fail.
        for name in (f"rank_{rank:05d}.json", f"rank_{rank:05d}.safetensors"):
            (path / name).write_bytes(b"?" * (path / name).stat().st_size)
    expected = owned(0, 1, 1, 3, 0)
    filled = [blank(fragment) for fragment in expected]
    CheckpointReader(path, rank=1).fill_all(filled)
    assert torch.equal(filled[0].tensor, expected[0].tensor)
    with pytest.raises(CheckpointError, match=r"rank_00000\.json"):
        CheckpointReader(path, rank=0).fill(filled[0])


def test_a_view_of_the_live_state_is_filled_in_place(tmp_path: Path):
    path = alone(tmp_path, 1, [Fragment("n", "master", (7,), None, 0, 1, 0, NORM)])
    flat = torch.zeros(20, requires_grad=True)
    CheckpointReader(path).fill(Fragment("n", "master", (7,), None, 0, 1, 0, flat[5:12]))
    assert torch.equal(flat[5:12].detach(), NORM)
    assert torch.count_nonzero(flat) == torch.count_nonzero(NORM)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_shape": (8, 3)}, ["(8, 6)", "(8, 3)"]),
        ({"tp_dim": 1}, ["tp_dim 0", "has 1"]),
        ({"tensor": torch.zeros(6, dtype=torch.bfloat16)}, ["F32", "BF16"]),
    ],
)
def test_another_cut_is_refused(tmp_path: Path, changes: dict, words: list[str]):
    values = {
        "name": "w",
        "kind": "last_delta",
        "global_shape": SHAPE,
        "tp_dim": 0,
        "tp_rank": 0,
        "tp_size": 2,
        "start": 0,
        "tensor": torch.zeros(6),
    }
    path = alone(tmp_path, 1, [Fragment(**values)])
    CheckpointReader(path).fill(Fragment(**values))
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(path).fill(Fragment(**(values | changes)))
    for word in [*words, "last_delta of w"]:
        assert word in str(caught.value)


def test_everything_missing_is_listed(tmp_path: Path):
    path = alone(tmp_path, 1, [Fragment("n", "master", (7,), None, 0, 1, 2, torch.zeros(3))])
    reader = CheckpointReader(path)
    assert reader.contains("master", "n")
    assert not reader.contains("anchor", "n")
    wanted = [
        Fragment("n", "master", (7,), None, 0, 1, 0, torch.zeros(7)),
        Fragment("n", "anchor", (7,), None, 0, 1, 0, torch.zeros(7)),
        Fragment("layers.4.mlp", "master", (7,), None, 0, 1, 1, torch.zeros(6)),
        Fragment("empty", "master", (7,), None, 0, 1, 7, torch.zeros(0)),
    ]
    with pytest.raises(CheckpointError) as caught:
        reader.fill_all(wanted)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "master of n" in lines[0]
    assert "[0, 2), [5, 7)" in lines[0]
    assert "anchor of n" in lines[1]
    assert "[0, 7)" in lines[1]
    assert "layers.4.mlp" in lines[2]
    assert "[1, 7)" in lines[2]


def test_another_slice_is_missing(tmp_path: Path):
    path = alone(tmp_path, 1, [Fragment("w", "master", SHAPE, 0, 0, 2, 0, torch.zeros(24))])
    with pytest.raises(CheckpointError, match="tensor slice 1"):
        CheckpointReader(path).fill(Fragment("w", "master", SHAPE, 0, 1, 2, 0, torch.zeros(24)))


def test_a_spoiled_tensor_file_is_named(tmp_path: Path):
    path = alone(tmp_path, 1, [Fragment("n", "master", (7,), None, 0, 1, 0, NORM)])
    file = path / "rank_00000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors"):
        CheckpointReader(path).fill(Fragment("n", "master", (7,), None, 0, 1, 0, torch.zeros(7)))


def two_checkpoints(root: Path) -> None:
    for step in (9_510, 10_510):
        alone(root, step, [Fragment("n", "master", (7,), None, 0, 1, 0, NORM)])


def test_nothing_saved_yet(tmp_path: Path):
    assert find_latest(tmp_path / "absent") is None
    assert find_latest(tmp_path) is None
    (tmp_path / "step_000000001.tmp").mkdir()
    assert find_latest(tmp_path) is None


def test_latest_says_which(tmp_path: Path):
    two_checkpoints(tmp_path)
    info = find_latest(tmp_path)
    assert info is not None
    assert (info.step, info.path.name, info.run_state) == (
        10_510,
        "step_000010510",
        {"batches": 10_510},
    )
    (tmp_path / "latest").write_text("step_000009510\n")
    assert find_latest(tmp_path).step == 9_510  # type: ignore[union-attr]


def test_without_latest_the_newest_by_number(tmp_path: Path):
    two_checkpoints(tmp_path)
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path).step == 10_510  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "file", ["rank_00000.safetensors", "rank_00000.json", "run_state.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["truncated", "removed", "longer"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, file: str, how: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(logging.getLogger("megatron_mer"), "propagate", True)
    two_checkpoints(tmp_path)
    path = tmp_path / "step_000010510" / file
    size = path.stat().st_size
    if how == "truncated":
        os.truncate(path, size // 2)
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING, "megatron_mer"):
        info = find_latest(tmp_path)
    assert info is not None
    assert info.step == 9_510
    (message,) = [record.getMessage() for record in caplog.records]
    assert "step_000010510" in message
    assert "expected" in message
    assert "found" in message
    if file.startswith("rank"):
        found = {"truncated": f"{size // 2}", "longer": f"{size + 1}", "removed": "no file"}[how]
        assert f"{path}: expected {size} bytes, found {found}" in message
    with pytest.raises(CheckpointError, match="not whole"):
        CheckpointReader(path.parent)


FILES = ["rank_00000.safetensors", "rank_00000.json", "run_state.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, file: str):
    two_checkpoints(tmp_path)
    path = tmp_path / "step_000010510" / file
    content = path.read_bytes()
    for at in {0, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        problem = damaged(path.parent)
        assert problem is not None
        assert str(path) in problem or str(path.parent) in problem
        chosen = first_whole(candidates(tmp_path), damaged)
        assert chosen == tmp_path / "step_000009510"
    path.write_bytes(content)
    assert damaged(path.parent) is None
    assert first_whole(candidates(tmp_path), damaged) == tmp_path / "step_000010510"


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_the_reading(tmp_path: Path, ranks: type, world_size: int):
    def one(rank: int, first_failure: Callable[[str | None], str | None]) -> object:
        return save_checkpoint(
            tmp_path,
            3,
            owned(0, 1, rank, 3, 0),
            {},
            rank=rank,
            world_size=3,
            first_failure=first_failure,
        )

    path = ranks(3).run(one)[0]
    assert {damaged(path, rank, world_size) for rank in range(world_size)} == {None}
    for number in range(3):
        file = path / f"rank_{number:05d}.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = [damaged(path, rank, world_size) for rank in range(world_size)]
        # The rank that reads it finds it, and nobody else reads it.
        assert [bool(one) for one in found] == [
            rank == number % world_size for rank in range(world_size)
        ]
        assert "expected SHA-256" in str(found[number % world_size])
        file.write_bytes(content)


def test_format_1_without_checksums_is_read_by_its_sizes(tmp_path: Path):
    two_checkpoints(tmp_path)
    path = tmp_path / "step_000010510"
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1, "files": sizes}))
    (tmp_path / "latest").write_text("step_000010510\n")
    assert first_whole(candidates(tmp_path), damaged) == path
    os.truncate(path / "rank_00000.json", 5)
    assert first_whole(candidates(tmp_path), damaged) == tmp_path / "step_000009510"


def test_none_whole_is_an_error(tmp_path: Path):
    two_checkpoints(tmp_path)
    for path in tmp_path.glob("step_*/manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        find_latest(tmp_path)
    assert "step_000009510" in str(caught.value)
    assert "step_000010510" in str(caught.value)


def test_a_latest_that_names_nothing_is_an_error(tmp_path: Path):
    (tmp_path / "latest").write_text("step_000000009\n")
    with pytest.raises(CheckpointError, match="step_000000009"):
        find_latest(tmp_path)


def test_a_newer_format_is_an_error(tmp_path: Path):
    two_checkpoints(tmp_path)
    manifest = tmp_path / "step_000010510/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        find_latest(tmp_path)
