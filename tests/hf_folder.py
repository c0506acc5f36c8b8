"""Small Hugging Face folders, written by transformers itself, and tokenizers that grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ROWS = 300
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": ROWS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


def hf_folder(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Llama with random weights of which every one shows in the logits.

    Args:
        path: the folder.
        dtype: of the weights.
        **changes: of its config.json; `max_shard_size` goes to save_pretrained.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shard = changes.pop("max_shard_size", "5GB")
    generator = torch.Generator().manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + mean)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def with_tokenizer(path: Path, extra: tuple[str, ...] = ()) -> Path:
    """Put a byte-level tokenizer.json of 258 ids and more into a folder; made when missing.

    Args:
        path: the folder.
        extra: merged pieces behind those ids, each of two known pieces.
    """
    from tokenizers import decoders, pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "th", "</s>", *extra])}
    merges = [["t", "h"], *([piece[:-1], piece[-1]] for piece in extra)]
    text = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary["</s>"], "content": "</s>", "special": True, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": False}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "post_processor": None,
        "decoder": json.loads(decoders.ByteLevel().__getstate__()),
        "truncation": None,
        "padding": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocabulary,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "merges": merges},
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the safetensors files of a folder hold."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors to the bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )
