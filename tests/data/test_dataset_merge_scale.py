"""Merging more tokens than 32 bits can count."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.dataset_merge import DatasetMerge
from megatron_mer.data.indexed_dataset import IndexedDataset


@pytest.mark.slow
def test_more_than_2_to_the_32_tokens(tmp_path: Path) -> None:
    """Byte tokens, nearly all zeros: the sources are holes, and so is the merged file."""
    needed = 5 << 30
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"less than {needed >> 30} GiB free in {tmp_path}, should holes not stay holes")
    long = 2**31 - 1
    lengths = [[long, 5], [0, long], [long - 3, 1, 2]]
    for number, of_shard in enumerate(lengths):
        write_sparse(tmp_path / f"s{number}", of_shard, marks={0: number + 1})
    shards = [tmp_path / f"s{number}" for number in range(3)]
    merging = DatasetMerge(shards, tmp_path / "m", without_sidecar=True)
    merging.verify()
    merging.write()
    every = [length for of_shard in lengths for length in of_shard]
    dataset = IndexedDataset(tmp_path / "m")
    dataset.verify()
    assert dataset.num_tokens == sum(every) > 2**32
    raw = (tmp_path / "m.idx").read_bytes()
    pointers = np.frombuffer(raw, "<i8", 7, offset=34 + 4 * 7)
    assert pointers.tolist() == [sum(every[:at]) for at in range(7)]
    assert np.frombuffer(raw, "<i8", offset=34 + 12 * 7).tolist() == list(range(8))
    for number, start in enumerate([0, long + 5, 2 * long + 5]):
        assert dataset.tokens(start, start + 2).tolist() == [number + 1, 0]
    assert dataset.document(6).tolist() == [0, 0]


def write_sparse(prefix: Path, lengths: list[int], marks: dict[int, int]) -> None:
    """Write byte tokens that are zero but for `marks`, position -> id, without filling the disk."""
    with open(f"{prefix}.bin", "wb") as file:
        for position, token in marks.items():
            file.seek(position)
            file.write(bytes([token]))
        file.truncate(sum(lengths))
    count = len(lengths)
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, count, count + 1)
        + struct.pack(f"<{count}i", *lengths)
        + struct.pack(f"<{count}q", *(sum(lengths[:at]) for at in range(count)))
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )
