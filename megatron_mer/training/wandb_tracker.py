"""Weights & Biases: one run there for one output directory, however often it is started."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from megatron_mer.config import WandbConfig
from megatron_mer.errors import ConfigError, Problem
from megatron_mer.training.tracker_rows import Row, summary_rows
from megatron_mer.training.wandb_file import last_step

_ID_FILE = "wandb_id"


class WandbTracker:
    """Sends steps to wandb, or writes them for `wandb sync` in mode offline.

    Nothing of the machine, the command line, the environment or the code is sent: the numbers, the
    run's name and its resolved configuration are all.

    Args:
        config: the section `wandb`.
        root: the run's directory; wandb's own files go to its folder `wandb`.
        name: of the run.
        settings: the resolved configuration, as the service is to show it.

    Raises:
        ConfigError: mode online without an API key.
    """

    name = "wandb"

    def __init__(
        self, config: WandbConfig, root: Path, name: str, settings: Mapping[str, Any]
    ) -> None:
        if config.mode == "online" and not wandb.api.api_key:
            given = "given online, but there is no API key"
            remedy = "run `wandb login`, set WANDB_API_KEY, or choose offline"
            raise ConfigError([Problem("wandb.mode", given, remedy=remedy)])
        run_id = _run_id(root)
        recorded = last_step(root / "wandb", run_id) if config.mode == "offline" else -1
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags),
            name=name,
            id=run_id,
            resume="allow",
            dir=str(root),
            config=dict(settings),
            settings=_settings(config.mode),
        )
        # Online the service itself says where the run stands.
        self.last_step = recorded if config.mode == "offline" else self._run.step - 1

    def log(self, step: int, row: Row) -> None:
        """Record the numbers of a step."""
        self._run.log(dict(row), step=step, commit=True)

    def flush(self) -> None:
        """Do nothing: a process of its own writes, and the next start sends what it lacks."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Add the measures of a run that is done; one that ended early counts as failed there."""
        if summary:
            self._run.summary.update(dict(summary_rows(summary)))
        self._run.finish(exit_code=0 if summary else 1)


def _run_id(root: Path) -> str:
    """The id of the directory's run, made at its first start."""
    path = root / _ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _settings(mode: Literal["online", "offline"]) -> wandb.Settings:
    return wandb.Settings(
        mode=mode,
        console="off",
        silent=True,
        disable_code=True,
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=60,
    )
