"""Hugging Face's checkpoints of Llamas, both ways: safetensors only, a tensor at a time."""

from megatron_mer.checkpoint.huggingface.convert import (
    KEPT,
    KEPT_FILES,
    KINDS,
    TORCH_NAMES,
    Exported,
    import_weights,
    keep_files,
    kept_tokenizer,
    model_of,
)
from megatron_mer.checkpoint.huggingface.folder import HuggingFaceFolder
from megatron_mer.checkpoint.huggingface.logits import (
    LogitsCheck,
    compare_logits,
    have_transformers,
)
from megatron_mer.checkpoint.huggingface.read import HuggingFaceReader, NewRows
from megatron_mer.checkpoint.huggingface.tokenizer_files import TokenizerFiles, own_tokenizer
from megatron_mer.checkpoint.huggingface.vocabulary import extended

__all__ = [
    "KEPT",
    "KEPT_FILES",
    "KINDS",
    "TORCH_NAMES",
    "Exported",
    "HuggingFaceFolder",
    "HuggingFaceReader",
    "LogitsCheck",
    "NewRows",
    "TokenizerFiles",
    "compare_logits",
    "extended",
    "have_transformers",
    "import_weights",
    "keep_files",
    "kept_tokenizer",
    "model_of",
    "own_tokenizer",
]
