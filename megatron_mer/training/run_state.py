"""Where a run stands: the part of a checkpoint that is not weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mer.errors import CheckpointError

FORMAT_VERSION = 1


def saved_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model's section as a checkpoint keeps it, with the keys that it had no name for yet.

    Args:
        settings: what the run state keeps of the configuration.
    """
    model = settings["model"]
    heads_fill_the_width = model["hidden_size"] // model["num_heads"]
    return {"head_dim": heads_fill_the_width, "rope_scaling": None, **model}


@dataclass
class RunState:
    """Two counters, never DeepSpeed's, and what else a resumed run needs.

    Equal on all ranks but for ``seconds``.
    """

    batches: int = 0
    """Global batches drawn so far, for good: the data clock."""
    updates: int = 0
    """Applied optimizer updates so far: the step of the learning rate and of Reptile's k."""
    horizon: int = 0
    """Updates over which the learning-rate schedule runs, fixed at first launch."""
    seconds: float = 0.0
    """Wall time spent in steps and evaluations, all starts together."""
    skipped_in_a_row: int = 0
    """Batches without an update since the last update."""
    updates_before: int = 0
    """Updates of another run behind the moments that this one began with."""
    evaluation_due: str | None = None
    """The evaluation that had to wait for the next start, for want of time: its moment."""

    def to_json(
        self,
        history: list[dict[str, Any]],
        settings: Mapping[str, Any],
        reptile: dict[str, int] | None,
        buffer: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The state as a checkpoint keeps it.

        Args:
            history: the plan's history.
            settings: what of the configuration a resumed run is compared with.
            reptile: Reptile's counters, None without Reptile.
            buffer: what the replay buffer's records are for this moment, None without a buffer.
        """
        return {
            "format_version": FORMAT_VERSION,
            "batches": self.batches,
            "updates": self.updates,
            "horizon": self.horizon,
            "seconds": self.seconds,
            "skipped_in_a_row": self.skipped_in_a_row,
            "updates_before": self.updates_before,
            "evaluation_due": self.evaluation_due,
            "history": history,
            "settings": dict(settings),
            "reptile": reptile,
            **({"buffer": dict(buffer)} if buffer else {}),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunState:
        """The counters of a checkpoint.

        Raises:
            CheckpointError: written by another format, or not whole.
        """
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint's run state has format {version}; this version reads "
                f"{FORMAT_VERSION}. Resume it with the version that wrote it"
            )
        # Runs of before had no such start, and no such end.
        content = {"updates_before": 0, "evaluation_due": None, **content}
        missing = [key for key in (*vars(cls()), "history", "settings") if key not in content]
        if missing:
            raise CheckpointError(
                f"the checkpoint's run state lacks {', '.join(missing)}: it was written by an "
                "unfinished version; begin anew with --fresh"
            )
        return cls(
            batches=int(content["batches"]),
            updates=int(content["updates"]),
            horizon=int(content["horizon"]),
            seconds=float(content["seconds"]),
            skipped_in_a_row=int(content["skipped_in_a_row"]),
            updates_before=int(content["updates_before"]),
            evaluation_due=content["evaluation_due"],
        )
