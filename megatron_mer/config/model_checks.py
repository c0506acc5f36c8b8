"""Checks of the model's shape, its rotary angles and how tensor ranks share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from megatron_mer.config.model_schema import BETA_FAST, BETA_SLOW, RopeScaling
from megatron_mer.config.schema import RunConfig
from megatron_mer.errors import Problem

Problems = Iterator[Problem]

_SCALING: Final = "model.rope_scaling"
_ORIGINAL: Final = "original_max_position_embeddings"
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": (),
    "llama3": (_ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (_ORIGINAL,),
}
_MAY: Final[Mapping[str, tuple[str, ...]]] = {
    "linear": (),
    "llama3": (),
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def heads(config: RunConfig) -> Problems:
    """Each head has an even number of channels and each key-value head equally many queries."""
    hidden_size, num_heads = config.model.hidden_size, config.model.num_heads
    head_dim, by_default = config.model.head_dim, hidden_size / num_heads
    if head_dim is None or head_dim == by_default:
        if by_default % 2:
            given = f"hidden_size {hidden_size} / num_heads {num_heads} = {by_default:g}"
            allowed = "an even width of a head (rotary pairs)"
            yield Problem("model.num_heads", given, allowed, "change one of them or give head_dim")
    elif head_dim % 2:
        yield Problem("model.head_dim", f"given {head_dim}", "an even number (rotary pairs)")
    num_kv_heads = config.model.num_kv_heads
    if num_heads % num_kv_heads:
        given = f"{num_kv_heads} heads of keys and values for num_heads {num_heads}"
        yield Problem("model.num_kv_heads", given, f"a divisor of {num_heads}")


def rope_scaling(config: RunConfig) -> Problems:
    """A kind of scaling has the keys that it needs and none that it would ignore."""
    scaling = config.model.rope_scaling
    if scaling is None:
        return
    for key in _NEEDED[scaling.kind]:
        if getattr(scaling, key) is None:
            yield Problem(f"{_SCALING}.{key}", "missing", f"a number, for {scaling.kind}", "add it")
    known = {"kind", "factor", *_NEEDED[scaling.kind], *_MAY[scaling.kind]}
    for key in RopeScaling.__dataclass_fields__:
        if key not in known and getattr(scaling, key) is not None:
            given = f"given {getattr(scaling, key)}, which {scaling.kind} has no use for"
            yield Problem(f"{_SCALING}.{key}", given, "nothing", "remove it")
    if scaling.factor < 1:
        given = f"given {scaling.factor:g}, which would shorten the context"
        yield Problem(f"{_SCALING}.factor", given, "1 or above")
    yield from _llama3(scaling) if scaling.kind == "llama3" else ()
    yield from _yarn(scaling, config.model.rope_base) if scaling.kind == "yarn" else ()


def _llama3(scaling: RopeScaling) -> Problems:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and high <= low:
        given = f"given {high:g} with low_freq_factor {low:g}"
        yield Problem(f"{_SCALING}.high_freq_factor", given, f"above {low:g}")


def _yarn(scaling: RopeScaling, base: float) -> Problems:
    fast, slow = scaling.beta_fast or BETA_FAST, scaling.beta_slow or BETA_SLOW
    if fast <= slow:
        given = f"{fast:g} with beta_slow {slow:g}"
        yield Problem(f"{_SCALING}.beta_fast", given, f"above {slow:g}")
    if (scaling.mscale is None) != (scaling.mscale_all_dim is None):
        alone = "mscale" if scaling.mscale_all_dim is None else "mscale_all_dim"
        given = f"given {getattr(scaling, alone):g}, which alone has no effect"
        yield Problem(f"{_SCALING}.{alone}", given, "both mscale and mscale_all_dim, or neither")
    if scaling.attention_factor is not None and scaling.mscale is not None:
        given = f"given {scaling.mscale:g}, which with attention_factor has no effect"
        yield Problem(f"{_SCALING}.mscale", given, "nothing", "remove one of them")
    if base <= 1:
        yield Problem("model.rope_base", f"given {base:g} with yarn", "above 1")


def tensor_split(config: RunConfig) -> Problems:
    """Tensor ranks share heads and channels evenly; a head of keys may lie on several of them."""
    tp_size = config.parallel.tp_size
    for key in ("num_heads", "ffn_hidden_size"):
        size = getattr(config.model, key)
        if size % tp_size:
            given = f"{size} does not divide into parallel.tp_size {tp_size}"
            yield Problem(
                f"model.{key}", given, f"a multiple of {tp_size}", "change one of the two"
            )
    size = config.model.num_kv_heads
    if size % tp_size and tp_size % size:
        given = f"{size} does not divide into parallel.tp_size {tp_size}, nor that into it"
        allowed = f"a multiple or a divisor of {tp_size}"
        yield Problem("model.num_kv_heads", given, allowed, "change one of the two")
