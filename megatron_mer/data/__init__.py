"""Tokenized corpora: reading, writing, packing into samples, and loading them for training.

`IndexedDataset` reads and `IndexedDatasetWriter` writes Megatron's `.bin/.idx` format with a
sidecar; `TrainLoader` gives a rank its micro batches of a plan, `EvaluationSet` those of a held-out
set. Nothing here imports torch.
"""

from megatron_mer.data.batches import EvaluationBatch, MicroBatch, RankBatch
from megatron_mer.data.evaluation_set import EvaluationSet
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_mer.data.loader import TrainLoader
from megatron_mer.data.packing import num_samples
from megatron_mer.data.sidecar import Provenance, Sidecar, Source
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "EvaluationBatch",
    "EvaluationSet",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "MicroBatch",
    "Provenance",
    "RankBatch",
    "Sidecar",
    "Source",
    "Tokenizer",
    "TrainLoader",
    "load_tokenizer",
    "num_samples",
    "token_dtype",
]
