"""The `config.json` of a Hugging Face Llama and our `model:` section, one from the other.

Reads and writes what every transformers since 4.31 understands: newer ones keep the rotary base and
its scaling together in `rope_parameters`, older ones apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, cast

from megatron_mer.config.model_checks import heads, rope_scaling
from megatron_mer.config.model_schema import ModelConfig
from megatron_mer.config.parse import Partial, as_far_as_parsed, parse_model
from megatron_mer.config.schema import RunConfig
from megatron_mer.errors import ForeignCheckpointError, Problem

CONFIG_JSON: Final = "config.json"

_SIZES: Final = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
"""Our key -> theirs; every Llama has these."""

_THEIRS: Final = {
    **_SIZES,
    "num_kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
}
OF_SHAPES: Final = frozenset((*_SIZES.values(), "num_key_value_heads", "head_dim"))
"""Keys of theirs without which the shapes of the weights are not known."""

_ROPE_KEYS: Final = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}

_ROPE_NEEDED: Final = {"linear": ("factor",), "llama3": _ROPE_KEYS["llama3"], "yarn": ("factor",)}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder.

    Raises:
        ForeignCheckpointError: there is none, or it is no JSON object.
    """
    path = folder / CONFIG_JSON
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        given = f"cannot be read: {error.strerror}"
        allowed = "a folder with config.json and *.safetensors, as save_pretrained writes it"
        raise ForeignCheckpointError([Problem(str(path), given, allowed)]) from error
    except ValueError as error:
        raise ForeignCheckpointError([Problem(str(path), f"is no JSON: {error}")]) from error
    if not isinstance(values, dict):
        raise ForeignCheckpointError([Problem(str(path), "is no JSON object")])
    return values


def no_llama(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Why a `config.json` describes no Llama that this project can train; nothing if it does."""
    kind = values.get("model_type")
    if kind != "llama":
        remedy = ""
        if kind == "mistral" and not values.get("sliding_window"):
            remedy = "without a sliding window it is a Llama: write llama there"
        yield Problem("model_type", f"{kind!r}", "'llama'", remedy)
    window = values.get("sliding_window")
    if window and values.get("use_sliding_window", True):
        yield Problem("sliding_window", f"{window}", "attention to all earlier tokens (null)")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if values.get(key):
            yield Problem(key, str(values[key])[:80], "false or absent")
    if (act := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        yield Problem("hidden_act", f"{act!r}", "'silu'")
    rope = _rope(values)
    share = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor")
    if share not in (None, 1.0):
        yield Problem("partial_rotary_factor", f"{share}", "1.0")
    if _rope_kind(rope) not in (*_ROPE_KEYS, "default"):
        allowed = ", ".join(("default", *_ROPE_KEYS))
        yield Problem("rope_scaling", f"rope_type {_rope_kind(rope)!r}", allowed)
    for theirs in _SIZES.values():
        if not _is_count(values.get(theirs)):
            yield Problem(theirs, f"{values.get(theirs)!r}", "a whole number >= 1")
    if (longest := values.get("max_position_embeddings")) is not None and not _is_count(longest):
        yield Problem("max_position_embeddings", f"{longest!r}", "a whole number >= 1")
    if _differ(values.get("rope_scaling"), values.get("rope_parameters")):
        given = f"{values['rope_scaling']}, but rope_parameters {values['rope_parameters']}"
        yield Problem("rope_scaling", given, "the same in both", "remove the one that is wrong")
    needed = _ROPE_NEEDED.get(_rope_kind(rope), ())
    if lacking := [key for key in needed if rope.get(key) is None]:
        yield Problem("rope_scaling", f"{_rope_kind(rope)} without {', '.join(lacking)}")
    elif all(_is_count(values.get(theirs)) for theirs in _SIZES.values()):
        yield from _no_model(model_keys(values))


def _no_model(keys: Mapping[str, Any]) -> Iterator[Problem]:
    """What our own `model:` section would be refused for, by their keys."""
    model, problems = parse_model({**keys, "seq_length": 1})
    run = cast(RunConfig, Partial({"model": model}))
    for check in (heads, rope_scaling):
        problems += as_far_as_parsed(check(run))
    for one in problems:
        ours, dot, rest = one.path.removeprefix("model.").partition(".")
        yield replace(one, path=f"{_THEIRS.get(ours, ours)}{dot}{rest}")


def model_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `model:` section that a `config.json` decides.

    Args:
        values: of which `no_llama` finds nothing.

    Returns:
        All dimensions; `rope_scaling` only where there is one.
    """
    keys = {ours: values[theirs] for ours, theirs in _SIZES.items()}
    keys["num_kv_heads"] = values.get("num_key_value_heads") or keys["num_heads"]
    keys["tie_embeddings"] = values.get("tie_word_embeddings") or False
    keys["norm_eps"] = _real(values.get("rms_norm_eps", 1e-6))
    rope = _rope(values)
    keys["rope_base"] = _real(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    keys["head_dim"] = values.get("head_dim") or keys["hidden_size"] // keys["num_heads"]
    kind = _rope_kind(rope)
    if kind in _ROPE_KEYS:
        scaling = {key: rope[key] for key in _ROPE_KEYS[kind] if rope.get(key) is not None}
        keys["rope_scaling"] = {
            "kind": kind,
            **(_yarn(scaling, values) if kind == "yarn" else scaling),
        }
    return keys


def _yarn(scaling: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what transformers would not look at, and fill in what it would."""
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    unused = () if both and "attention_factor" not in scaling else ("mscale", "mscale_all_dim")
    original = {"original_max_position_embeddings": values.get("max_position_embeddings") or 2048}
    return {**original, **{key: value for key, value in scaling.items() if key not in unused}}


def config_json(model: ModelConfig, dtype: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        model: resolved.
        dtype: of the stored weights, by torch's name: `bfloat16`.
        base: of the checkpoint that the run began with, whose other keys (ids of special tokens,
            longest text) stay; empty: there was none.
    """
    own = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tie_embeddings,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": model.rope_base,
        "rope_scaling": _scaling(model),
        "torch_dtype": dtype,
    }
    other = {key: value for key, value in base.items() if key not in ("dtype", "rope_parameters")}
    longest = max(base.get("max_position_embeddings") or _longest(model), model.seq_length)
    return {**other, **own, "max_position_embeddings": longest}


def _scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling is None:
        return None
    values = {key: v for key, v in asdict(model.rope_scaling).items() if v is not None}
    kind = values.pop("kind")
    return {"rope_type": kind, **{key: values[key] for key in _ROPE_KEYS[kind] if key in values}}


def _longest(model: ModelConfig) -> int:
    """Positions that the rotary embedding was scaled for; without scaling those trained on."""
    scaling = _scaling(model) or {}
    original = scaling.get("original_max_position_embeddings")
    return round(original * scaling["factor"]) if original else model.seq_length


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    found = values.get("rope_parameters") or values.get("rope_scaling")
    if not isinstance(found, Mapping):
        return {}
    original = "original_max_position_embeddings"
    return {original: values.get(original), **found}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _differ(old: Any, new: Any) -> bool:
    """Whether the scaling in a key of old versions and that of new ones say different things."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return False
    known = {key for keys in _ROPE_KEYS.values() for key in keys}
    return _rope_kind(old) != _rope_kind(new) or any(old.get(k) != new.get(k) for k in known)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _real(value: Any) -> Any:
    """A number as JSON may write it, 500000 for 500000.0; anything else is refused elsewhere."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
