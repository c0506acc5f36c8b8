"""A Hugging Face folder into a checkpoint of ours, and a checkpoint of ours into such a folder."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mer.checkpoint.files import remove_directory, write_json
from megatron_mer.checkpoint.find import CheckpointInfo
from megatron_mer.checkpoint.huggingface.folder import HuggingFaceFolder
from megatron_mer.checkpoint.huggingface.names import in_model_order
from megatron_mer.checkpoint.huggingface.read import HuggingFaceReader
from megatron_mer.checkpoint.huggingface.tokenizer_files import ALL, TokenizerFiles
from megatron_mer.checkpoint.huggingface.write import GENERATION, SHARD_BYTES, write_folder
from megatron_mer.checkpoint.layout import TEMPORARY, Fragment, step_directories, step_name
from megatron_mer.checkpoint.load import CheckpointReader
from megatron_mer.checkpoint.save import commit, write_manifest, write_rank
from megatron_mer.config import ModelConfig
from megatron_mer.config.huggingface import CONFIG_JSON, config_json
from megatron_mer.config.model_schema import RopeScaling
from megatron_mer.errors import CheckpointError, ConfigError, Problem

KEPT = "from_hf"
"""Folder beside `checkpoints` with what is no weights of the folder that a run began with."""
KEPT_FILES = (CONFIG_JSON, GENERATION, *ALL)
"""Names of the files that may lie there."""
KINDS = {"fast": "master", "anchor": "anchor"}
"""Which weights are meant -> their kind in a checkpoint."""
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def keep_files(folder: HuggingFaceFolder, target: Path, tokenizer: TokenizerFiles | None) -> None:
    """Keep what an export will need of a folder: config.json, generation_config.json, tokenizer.

    Args:
        folder: where the weights came from.
        target: gets the files; made when missing.
        tokenizer: the files of the tokenizer that the model has from here on.
    """
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / CONFIG_JSON, {**folder.config, "torch_dtype": folder.dtype, "dtype": None})
    with contextlib.suppress(OSError, ValueError):
        write_json(target / GENERATION, json.loads((folder.path / GENERATION).read_text("utf-8")))
    for _ in tokenizer.write(target) if tokenizer else ():
        pass


def import_weights(
    reader: HuggingFaceReader, directory: Path, run_state: Mapping[str, Any]
) -> Path:
    """Write a folder's weights as a checkpoint of step 0, one tensor in memory at a time.

    Args:
        reader: of the folder.
        directory: gets step_000000000 and `latest`; made when missing, holds no checkpoint yet.
        run_state: of a run that has not begun.

    Returns:
        The checkpoint's directory.

    Raises:
        ConfigError: there is a checkpoint.
        ForeignCheckpointError: a tensor cannot be read.
        CheckpointError: the checkpoint cannot be written.
    """
    if step_directories(directory):
        given = f"given {directory.parent}, which holds a checkpoint already"
        raise ConfigError([Problem("--output", given, "a folder without one")])
    final = directory / step_name(0)
    temporary = final.with_name(final.name + TEMPORARY)
    fragments = [
        Fragment(name, "master", shape, None, 0, 1, 0, _nothing(math.prod(shape)))
        for name, shape in reader.shapes.items()
    ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if temporary.exists():  # of a conversion that was killed
            remove_directory(temporary)
        write_rank(
            temporary, fragments, 0, 1, threading.Event(),
            lambda fragment: reader.parameter(fragment.name).view(-1),
        )  # fmt: skip
        state = json.dumps(run_state, indent=1).encode()
        write_manifest(temporary, 0, 1, state, permanent=True)
        commit(directory, temporary, final)
    except OSError as error:
        text = f"{final} was not written ({error}); check the space and the rights there"
        raise CheckpointError(text) from error
    finally:
        if temporary.exists():
            with contextlib.suppress(OSError):
                remove_directory(temporary)
    return final


def _nothing(numel: int) -> torch.Tensor:
    return torch.empty(numel, device="meta")


@dataclass(frozen=True)
class Exported:
    """A checkpoint of ours as it goes into a folder."""

    info: CheckpointInfo
    reader: CheckpointReader
    model: ModelConfig
    kind: str
    """"master" or "anchor"."""
    dtype: str
    """torch's name of what is written."""
    base: Mapping[str, Any]
    """config.json of the folder that the run began with; empty: none."""

    @classmethod
    def of(cls, path: Path, weights: str, dtype: str | None) -> Exported:
        """Open a checkpoint for export.

        Args:
            path: its directory, whole.
            weights: ``fast`` or ``anchor``.
            dtype: bf16, fp16 or fp32; None: that of the folder that the run began with, else the
                run's precision.

        Raises:
            ConfigError: it has no such weights.
        """
        info, reader = CheckpointInfo.read(path), CheckpointReader(path, verified=True)
        kind = KINDS[weights]
        if not any(one.kind == kind for one in reader.parameters()):
            given = f"given {weights}, but {path} was written without Reptile"
            raise ConfigError([Problem("--weights", given, "fast")])
        settings = info.run_state["settings"]
        base = _kept(path, CONFIG_JSON) or {}
        written = TORCH_NAMES[dtype or settings["precision"]]
        if dtype is None and base.get("torch_dtype") in TORCH_NAMES.values():
            written = str(base["torch_dtype"])
        model = model_of(settings["model"])
        return cls(info, reader, model, kind, written, base)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, in the model's order."""
        found = {
            one.name: one.global_shape for one in self.reader.parameters() if one.kind == self.kind
        }
        return {name: found[name] for name in in_model_order(found)}

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter as it is written."""
        return self.reader.parameter(self.kind, name).to(getattr(torch, self.dtype))

    def write(
        self,
        target: Path,
        tokenizer: TokenizerFiles | None,
        eod_id: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Write the folder.

        Args:
            target: gets its name when it is whole; one that is there is replaced.
            tokenizer: its files; None: the folder gets none.
            eod_id: id that ends a text, where the run began with no folder that knows it.
            shard_bytes: largest file.
            stop: asked before each tensor; when true, the write ends.

        Raises:
            WriteStopped: it was to end.
            OSError: it cannot be written.
        """
        base = {key: value for key, value in self.base.items() if value is not None}
        generation = _kept(self.info.path, GENERATION)
        if not base and eod_id is not None:
            base = {"bos_token_id": None, "eos_token_id": eod_id}
            generation = {"eos_token_id": eod_id}
        config = config_json(self.model, self.dtype, base)
        write_folder(
            target, self.shapes, self.read, self.dtype, config, generation, tokenizer,
            shard_bytes, stop,
        )  # fmt: skip


def kept_tokenizer(checkpoint: Path) -> TokenizerFiles | None:
    """The tokenizer of the folder that a checkpoint's run began with; None: there was none."""
    files = TokenizerFiles.inside(checkpoint.parent.parent / KEPT)
    return files if files.copied else None


def _kept(checkpoint: Path, name: str) -> dict[str, Any] | None:
    path = checkpoint.parent.parent / KEPT / name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(values)


def model_of(values: Mapping[str, Any]) -> ModelConfig:
    """The model section that a run state keeps."""
    known = ModelConfig.__dataclass_fields__
    kept = {key: value for key, value in values.items() if key in known}
    if isinstance(scaling := kept.get("rope_scaling"), Mapping):
        kept["rope_scaling"] = RopeScaling(**scaling)
    return ModelConfig(**kept)
