"""A scan of segment files finds every byte that may be somebody's text, and whose it is."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mer.data.record_scan import scan
from megatron_mer.data.record_store import RecordStore
from tests.data.made_records import SMALL, Rows, at


@pytest.fixture
def store(tmp_path) -> RecordStore:
    return RecordStore(tmp_path, SMALL, segment_records=600)


def scanned(store: RecordStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = [one for segment in store.segments() for one in scan(store, segment)]
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def test_every_record_with_its_identity(store):
    rows = Rows(SMALL, 700)
    places = np.concatenate([np.arange(0, 500), np.arange(550, 750)])  # Over a hole and two files.
    store.write(places, rows.identity, rows.tokens, rows.ends)
    store.erase(at(3, 299, 600))
    kept = ~np.isin(places, [3, 299, 600])
    positions, identity, told = scanned(store)
    assert positions.tolist() == places[kept].tolist()
    assert (identity == rows.identity[kept]).all()
    assert told.all()


def test_what_is_torn_or_damaged_is_found(store):
    rows = Rows(SMALL, 6)
    store.write(np.arange(6), rows.identity, rows.tokens, rows.ends)
    store.close()
    path, size = store.path(0), SMALL.record_bytes
    content = bytearray(path.read_bytes())
    content[0 * size + 70] ^= 1  # a token: the header still holds
    content[1 * size + 30] ^= 1  # its identity
    content[2 * size : 2 * size + 64] = bytes(64)  # a header that never came
    content[3 * size : 4 * size] = b"ERAS" + bytes(60) + bytes(content[3 * size + 64 : 4 * size])
    path.write_bytes(content[: 5 * size + 10])  # and a file that ends in a header
    positions, identity, told = scanned(store)
    assert positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert told.tolist() == [True, False, False, False, True, False]
    assert (identity[[0, 4]] == rows.identity[[0, 4]]).all()


def test_nothing_is_there(store):
    assert list(scan(store, 7)) == []
    store.path(0).write_bytes(bytes(3 * SMALL.record_bytes))
    assert scanned(store)[0].tolist() == []
