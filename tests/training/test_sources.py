"""The loss by source, against a table worked out by hand."""

import numpy as np

from megatron_mer.continual.entries import Entry, Rows
from megatron_mer.training.sources import SourceLosses


class Plan:
    """Three tasks over two datasets each but the last; en comes twice."""

    entries = tuple(
        Entry(task, index, 0, index, index + 1, False)
        for index, task in enumerate(("en", "fr", "en"))
    )
    datasets = ("en_web", "en_books", "fr_web")


def rows(*given):
    """Rows of (kind, entry, dataset)."""
    kind, entry, dataset = (np.array(column) for column in zip(*given, strict=True))
    nothing = np.zeros(len(given), dtype=np.int64)
    return Rows(
        kind=kind.astype(np.uint8),
        entry=entry.astype(np.int32),
        dataset=dataset.astype(np.int32),
        sample=nothing,
        ordinal=nothing,
        slot=nothing - 1,
    )


FRESH, REPLAY = 0, 1
BATCH = rows(
    (FRESH, 1, 2), (REPLAY, 0, 0), (FRESH, 1, 2), (REPLAY, 2, 1), (REPLAY, 0, 0), (FRESH, 1, 2)
)
LOSSES = np.array([[6, 2], [9, 3], [2, 2], [4, 1], [3, 3], [0, 0]], dtype=np.float64)


def test_by_hand():
    sources = SourceLosses(Plan())
    assert sources.by_kind(BATCH, LOSSES) == {"fresh": 8 / 4, "replay": 16 / 7}
    assert sources.by_task(BATCH, LOSSES) == {
        "en": {"replay": [16 / 7, 7]},
        "fr": {"fresh": [2.0, 4]},
    }
    assert sources.by_dataset(BATCH, LOSSES) == {
        "en_web": {"replay": [2.0, 6]},
        "en_books": {"replay": [4.0, 1]},
        "fr_web": {"fresh": [2.0, 4]},
    }


def test_a_loss_that_is_no_number_stays_with_its_source():
    losses = LOSSES.copy()
    losses[1, 0] = np.nan
    sources = SourceLosses(Plan())
    assert sources.by_kind(BATCH, losses) == {"fresh": 2.0, "replay": None}
    assert sources.by_dataset(BATCH, losses) == {
        "en_web": {"replay": [None, 6]},
        "en_books": {"replay": [4.0, 1]},
        "fr_web": {"fresh": [2.0, 4]},
    }


def test_a_source_whose_every_target_is_masked_has_no_loss():
    sources = SourceLosses(Plan())
    found = sources.by_task(rows((FRESH, 0, 0), (FRESH, 1, 2)), np.array([[0, 0], [3, 2]], float))
    assert found == {"en": {"fresh": [None, 0]}, "fr": {"fresh": [1.5, 2]}}
