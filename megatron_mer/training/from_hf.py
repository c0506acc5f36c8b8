"""A run that starts from a Hugging Face folder: `model.from_hf`.

Whether the folder fits is decided before torch is there, as everything else that can be wrong. A
run that has begun does not look at it any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mer.config import ModelConfig, RunConfig, load_config
from megatron_mer.config.from_hf import KEY
from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.errors import ConfigError, ForeignCheckpointError, Problem
from megatron_mer.log import get_logger
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.run_state import RunState
from megatron_mer.training.warm_start import old_run

if TYPE_CHECKING:
    from megatron_mer.checkpoint.huggingface import HuggingFaceFolder, NewRows
    from megatron_mer.engine.training_engine import TrainingEngine
    from megatron_mer.training.preflight import Prepared

logger = get_logger(__name__)


def refuse_two_starts(config: RunConfig) -> None:
    """Make sure that the weights come from one place.

    Raises:
        ConfigError: a folder and a run are given.
    """
    if config.model.from_hf is not None and config.checkpoint.init_from is not None:
        given = f"given {config.model.from_hf}, and checkpoint.init_from "
        given += f"{config.checkpoint.init_from}: the weights can come from one place only"
        raise ConfigError([Problem(KEY, given, remedy="remove one of the two")])


def begins_with_folder(config: RunConfig, fresh: bool) -> bool:
    """Whether the weights come from a folder now: a run that has begun has its own."""
    begun = not fresh and RunDirectory(config.output_dir).has_checkpoint()
    return config.model.from_hf is not None and not begun


def with_foreign_rows(config: RunConfig, tokenizer: Tokenizer, fresh: bool) -> RunConfig:
    """The configuration with as many rows as the folder and the tokenizer need.

    Args:
        config: as it was loaded.
        tokenizer: the run's.
        fresh: the run begins anew.

    Raises:
        ConfigError: the folder is not there, is no whole Llama, or the tokenizer is of another
            vocabulary.
    """
    if config.model.from_hf is None:
        return config
    if not begins_with_folder(config, fresh):
        if config.model.vocab_size is not None:
            return config
        began = load_config(RunDirectory(config.output_dir).root / "config.yaml").model.vocab_size
        return replace(config, model=replace(config.model, vocab_size=began))
    folder, vocabulary = open_folder(config, tokenizer)
    given_rows = config.model.vocab_size
    if given_rows is not None and given_rows != vocabulary.rows:
        text = f"given {given_rows}, but {folder.path} and the tokenizer make {vocabulary.rows}"
        raise ConfigError([Problem("model.vocab_size", text, str(vocabulary.rows), "leave it out")])
    return replace(config, model=replace(config.model, vocab_size=vocabulary.rows))


def open_folder(config: RunConfig, tokenizer: Tokenizer) -> tuple[HuggingFaceFolder, NewRows]:
    """The folder that a run starts from, checked, and the rows that the run has.

    Args:
        config: with `model.from_hf`.
        tokenizer: the run's.

    Raises:
        ConfigError: the folder is not there or no whole Llama, or the tokenizer does not fit.
    """
    # Checkpoints import torch, which no other run needs so early.
    from megatron_mer.checkpoint.huggingface import HuggingFaceFolder

    try:
        folder = HuggingFaceFolder(Path(str(config.model.from_hf)))
        folder.check()
    except ForeignCheckpointError as error:
        raise ConfigError(
            [replace(one, path=KEY, given=f"{one.path}: {one.given}") for one in error.problems]
        ) from error
    return folder, rows_for(folder, tokenizer, config.tokenizer)


def rows_for(folder: HuggingFaceFolder, tokenizer: Tokenizer, spec: str | None) -> NewRows:
    """The rows of a model that starts from a folder with a tokenizer.

    Args:
        folder: checked.
        tokenizer: the run's.
        spec: its name; None: it is the folder's own.

    Raises:
        DataError: the folder's own tokenizer cannot be read.
        ConfigError: the tokenizer is not the folder's own, nor extends it.
    """
    from megatron_mer.checkpoint.huggingface import NewRows, extended, own_tokenizer

    own = own_tokenizer(folder.path, spec)
    if own is not None:
        return extended(own, tokenizer, folder.rows)
    if tokenizer.vocab_size > folder.rows:
        given = f"has {tokenizer.vocab_size} ids, {folder.path} has {folder.rows} rows and no "
        given += "tokenizer of its own that could say what the new ids are made of"
        remedy = f"put its tokenizer into {folder.path}"
        raise ConfigError([Problem("tokenizer", given, f"at most {folder.rows}", remedy)])
    logger.warning(
        "%s: %s has no tokenizer of its own; whether the run's ids are those that it was trained "
        "with is not checked",
        KEY,
        folder.path,
    )
    return NewRows.none(folder.rows)


def begin_with_folder(engine: TrainingEngine, prepared: Prepared, rank: int) -> None:
    """Give the masters the folder's weights; each rank reads its own slices only. Collective.

    Raises:
        ConfigError: the folder is not as it was a moment ago.
        CheckpointError: on all ranks; a tensor cannot be read, or a tied head is another weight.
    """
    from megatron_mer.checkpoint.huggingface import HuggingFaceReader
    from megatron_mer.training.rank_0 import from_rank_0

    folder, vocabulary = open_folder(prepared.config, prepared.tokenizer)
    reader = HuggingFaceReader(folder, vocabulary)
    from_rank_0(rank, reader.check_tied)
    engine.start_from(reader, "master", 0)
    if rank == 0:
        new = f", with {len(vocabulary.sources)} new rows" if vocabulary.sources else ""
        logger.info("starting with the weights of %s%s", folder.path, new)


def keep_folder(prepared: Prepared, root: Path) -> None:
    """Keep in a run's directory what an export will need of where it began; for rank 0.

    Args:
        prepared: the run.
        root: its directory.
    """
    from megatron_mer.checkpoint.huggingface import KEPT, TokenizerFiles, keep_files

    config = prepared.config
    if config.checkpoint.init_from is not None:
        kept = old_run(config.checkpoint.init_from).root / KEPT
        if kept.is_dir():
            shutil.copytree(kept, root / KEPT, dirs_exist_ok=True)
    elif config.model.from_hf is not None:
        folder, vocabulary = open_folder(config, prepared.tokenizer)
        own = TokenizerFiles.inside(folder.path)
        same = not vocabulary.sources and own.copied
        keep_files(folder, root / KEPT, own if same else TokenizerFiles.of(config.tokenizer))


def imported_state(model: ModelConfig, fingerprint: str, source: Path) -> dict[str, Any]:
    """The run state of weights that no run of ours trained.

    Args:
        model: resolved.
        fingerprint: of the tokenizer.
        source: the folder that they came from.
    """
    settings: Mapping[str, Any] = {
        "model": asdict(model),
        "precision": "fp32",
        "tokenizer": fingerprint,
        "tp_size": 1,
        "eod_mask_loss": False,
        "content": {},
        "prefixes": {},
        "evaluate": None,
        "optimizer": None,
        "schedule": None,
        "reptile": None,
        "init": f"imported from {source}",
    }
    return RunState().to_json(history=[], settings=settings, reptile=None)


def foreign_model(folder: HuggingFaceFolder, rows: int) -> ModelConfig:
    """The model section of a folder.

    Args:
        folder: checked.
        rows: of the vocabulary that the model has.
    """
    from megatron_mer.checkpoint.huggingface import model_of

    seq_length = int(folder.config.get("max_position_embeddings") or 2048)
    return model_of({**folder.keys, "vocab_size": rows, "seq_length": seq_length})


def tokenizer_of(spec: str | None, folder: Path) -> Tokenizer:
    """The tokenizer that is named, or else the folder's own.

    Raises:
        ConfigError, DataError: there is none.
    """
    from megatron_mer.checkpoint.huggingface import own_tokenizer

    own = load_tokenizer(spec) if spec else own_tokenizer(folder)
    if own is None:
        given = f"not given, and {folder} holds none that can be read"
        raise ConfigError([Problem("--tokenizer", given, "KIND:PATH")])
    return own
