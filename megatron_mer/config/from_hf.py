"""What a configuration leaves to the checkpoint that `model.from_hf` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from megatron_mer.config.huggingface import CONFIG_JSON, model_keys, no_llama, read_config_json
from megatron_mer.config.sizes import SIZES
from megatron_mer.config.yaml12 import read_yaml
from megatron_mer.errors import ConfigError, ForeignCheckpointError, Problem

KEY: Final = "model.from_hf"


def fill_from_hf(data: Any) -> tuple[Any, list[Problem]]:
    """Fill in the dimensions that a `model:` section leaves to `from_hf`.

    The folder is not needed for a run that has begun, whose own `config.yaml` knows them, nor where
    all are given. The vocabulary is left open: the tokenizer may extend the checkpoint's.

    Args:
        data: the tree of the configuration.

    Returns:
        The tree with the model section filled, and what is wrong with the folder or contradicts it.
    """
    model = data.get("model") if isinstance(data, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(model.get("from_hf"), str):
        return data, []
    folder = Path(model["from_hf"])
    size = model.get("size")
    given = {**(SIZES.get(size, {}) if isinstance(size, str) else {}), **model}
    try:
        if not (folder / CONFIG_JSON).exists():
            known = _begun(data) or _spelled_out(model) or read_config_json(folder)
            return {**data, "model": {**known, **given}}, []
        keys = foreign_keys(folder)
    except ForeignCheckpointError as error:
        reason = "; ".join(str(problem) for problem in error.problems)
        return data, [Problem(KEY, f"given {folder}: {reason}")]
    del keys["vocab_size"]
    return {**data, "model": {**keys, **given}}, list(_disagreements(folder, keys, given))


def foreign_keys(folder: Path) -> dict[str, Any]:
    """What the `config.json` of a folder says of the model, by our keys.

    Raises:
        ForeignCheckpointError: it is no Llama, or there is none.
    """
    values = read_config_json(folder)
    if problems := list(no_llama(values)):
        raise ForeignCheckpointError(problems)
    return model_keys(values)


def _begun(data: Mapping[str, Any]) -> dict[str, Any]:
    """The model of the run in output_dir, if it began with this folder."""
    path = Path(str(data.get("output_dir"))) / "config.yaml"
    try:
        model = read_yaml(path.read_text(encoding="utf-8"), str(path)).data["model"]
    except (OSError, ValueError, ConfigError, TypeError, KeyError):
        return {}
    return dict(model) if model.get("from_hf") == data["model"]["from_hf"] else {}


def _spelled_out(model: Mapping[str, Any]) -> dict[str, Any]:
    """The section itself, if it leaves nothing open that a model must have."""
    needed = ("hidden_size", "num_layers", "num_heads", "ffn_hidden_size")
    sized = model.get("size") in SIZES if isinstance(model.get("size"), str) else False
    return dict(model) if sized or all(key in model for key in needed) else {}


def _disagreements(
    folder: Path, keys: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[Problem]:
    for key, value in keys.items():
        if key in given and _plain(given[key]) != _plain(value):
            text = f"given {given[key]}, but {folder / CONFIG_JSON} says {value}"
            yield Problem(f"model.{key}", text, str(value), "leave it out")
    if "rope_scaling" not in keys and given.get("rope_scaling") is not None:
        text = f"given {given['rope_scaling']}, but {folder / CONFIG_JSON} has none"
        yield Problem("model.rope_scaling", text, "null", "leave it out")


def _plain(value: Any) -> Any:
    """A value to compare: a file's numbers are decimals, JSON's whole or binary ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return float(value)
    return value
