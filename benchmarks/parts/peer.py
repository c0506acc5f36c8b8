"""megatron-core's data order, set up the way that is fastest for it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parts.corpora import EOD, VOCAB

MISSING = (
    "megatron-core is not installed here; install what the comparison needs with "
    "`make venv-benchmark` and start this program with .venv/bin/python, or leave the peer out "
    "with --no-peer"
)
STORED_BYTES = 10
"""What a blend keeps a sample: the int16 dataset and the int64 sample."""


class Tokenizer:
    """What a GPTDataset asks of a tokenizer."""

    def __init__(self) -> None:
        self.vocab_size = VOCAB
        self.eod = EOD
        self.unique_identifiers = {"class": "none"}


class Peer:
    """The parts of megatron-core that are compared.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parts for GPUs that are not installed
            from megatron.core.datasets import (
                blended_dataset,
                gpt_dataset,
                helpers,
                indexed_dataset,
            )
            from megatron.core.datasets.utils import Split
        logging.getLogger("megatron").setLevel(logging.ERROR)
        self._blended = blended_dataset
        self._gpt = gpt_dataset
        self._helpers = helpers
        self._indexed = indexed_dataset
        self._split = Split.train

    def blend(self, weights: Sequence[float], samples: int) -> None:
        """Build the index of a blend: which dataset and sample each of its samples is."""
        total = sum(weights)
        datasets, places = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        shares = [weight / total for weight in weights]
        self._helpers.build_blending_indices(datasets, places, shares, len(weights), samples, False)

    def open(self, prefix: Path) -> Any:
        """Open an indexed dataset; the `.bin` file is mapped."""
        return self._indexed.IndexedDataset(str(prefix), multimodal=False, mmap=True)

    def gpt(
        self, prefix: Path, seq_length: int, samples: int | None = None, cache: Path | None = None
    ) -> Any:
        """Build a GPTDataset over all documents: document, sample and shuffle index.

        No attention mask, no resets, no end-of-document mask: its fastest setting, in which loss
        mask and positions are made once.

        Args:
            prefix: the dataset.
            seq_length: tokens a sample.
            samples: None for one epoch.
            cache: folder to keep the indices in; None for memory only.
        """
        config = self._config(prefix, seq_length, cache)
        dataset = self.open(prefix)
        documents = np.arange(dataset.sequence_lengths.shape[0], dtype=np.int32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tokenizer has no token for padding
            return self._gpt.GPTDataset(
                dataset, str(prefix), documents, samples, self._split, config
            )

    def blended(self, parts: Sequence[Any], weights: Sequence[float], samples: int) -> Any:
        """Build a BlendedDataset over GPTDatasets, in memory."""
        config = parts[0].config
        config.path_to_cache = None  # with a folder it asks for a process group
        return self._blended.BlendedDataset(list(parts), list(weights), samples, config)

    def _config(self, prefix: Path, seq_length: int, cache: Path | None) -> Any:
        config = self._gpt.GPTDatasetConfig(
            random_seed=1,
            sequence_length=seq_length,
            blend=([str(prefix)], None),
            split="1,0,0",
            path_to_cache=None if cache is None else str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=Tokenizer(),
        )
        config.mock = cache is None  # otherwise it makes a folder beside the dataset
        return config
