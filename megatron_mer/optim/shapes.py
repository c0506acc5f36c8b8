"""The forms of a learning-rate schedule: where its phases begin, and the rate inside each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mer.config import ScheduleConfig
from megatron_mer.errors import Problem

WSD_DECAY = 0.1
"""Share of the steps; Hägele et al. 2024 (arXiv 2405.18392) find 10 to 20 % enough."""
COOLDOWN, ANNEAL, CONSTANT_LR = 0.6, 0.25, 0.55
"""Shares of steps and of the peak of the infinite schedule: 3e-4 cools down to 1.65e-4 (Ibrahim et
al. 2024, arXiv 2403.08763)."""


@dataclass(frozen=True)
class Phases:
    """A schedule with every value filled in; steps count from its beginning."""

    kind: str
    peak: float
    constant: float
    """Rate before the decay begins; that of infinite's constant phase."""
    floor: float
    warm: int
    """The step at which the warm-up is over: the first one at the peak."""
    cool: int
    """The step at which the cooldown is over; `warm` without one."""
    decay: int
    """The step at which the last decay begins."""
    end: int
    """The step at which the rate is `floor`; a constant never gets there."""
    shape: str

    @classmethod
    def of(cls, config: ScheduleConfig, peak: float, total: int) -> Phases:
        """Fill in the defaults.

        Args:
            config: the schedule's section of the configuration.
            peak: the learning rate after the warm-up.
            total: steps of the schedule.
        """
        warm, kind = config.warmup_steps, config.kind
        if kind == "constant":
            return cls(kind, peak, peak, peak, warm, warm, total, total, "linear")
        if kind == "cosine":
            return cls(kind, peak, peak, config.min_lr, warm, warm, warm, total, "cosine")
        if kind == "wsd":
            steps = config.decay_steps or max(1, round(WSD_DECAY * total))
            shape = config.decay or "sqrt"
            return cls(kind, peak, peak, config.min_lr, warm, warm, total - steps, total, shape)
        steps = config.decay_steps or max(1, round(ANNEAL * total))
        cool = warm + (config.cooldown_steps or max(1, round(COOLDOWN * total)))
        constant = CONSTANT_LR * peak if config.constant_lr is None else config.constant_lr
        shape = config.decay or "exponential"
        return cls(kind, peak, constant, config.min_lr, warm, cool, total - steps, total, shape)

    def rate(self, step: int, before: float = 0.0) -> float:
        """The rate of an update.

        Args:
            step: updates since the schedule began, >= 0; after its end the rate stays.
            before: the rate from which the warm-up rises, or falls.
        """
        if step < self.warm:
            return before + (self.peak - before) * (step + 1) / self.warm
        if step < self.cool:
            share = (step - self.warm) / (self.cool - self.warm)
            return decayed("cosine", self.peak, self.constant, share)
        if self.kind == "constant" or step < self.decay:
            return self.constant
        share = min(1.0, (step - self.decay) / (self.end - self.decay))
        return decayed(self.shape, self.constant, self.floor, share)


def decayed(shape: str, high: float, low: float, share: float) -> float:
    """A rate on its way from `high` to `low`.

    linear: high + (low - high) x. cosine: half a cosine (Loshchilov & Hutter 2017, arXiv
    1608.03983, equation 5, without restarts). sqrt: low + (high - low) (1 - sqrt(x)) (Hägele et al.
    2024, arXiv 2405.18392). exponential: high (low / high)^x (Ibrahim et al. 2024, arXiv
    2403.08763).

    Args:
        shape: one of these names.
        high: rate at the beginning.
        low: rate at the end, > 0 for exponential.
        share: x, how much of the way is behind, 0 to 1.
    """
    if share >= 1.0:
        return low
    if shape == "exponential":
        return float(high * (low / high) ** share)
    if shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * share))
    else:
        left = 1.0 - (math.sqrt(share) if shape == "sqrt" else share)
    return low + (high - low) * left


def phase_problems(config: ScheduleConfig, peak: float, total: int) -> list[Problem]:
    """What keeps the phases from fitting into a schedule of so many steps.

    Args:
        config: the schedule's section of the configuration.
        peak: the learning rate after the warm-up.
        total: steps of the schedule, >= 1.
    """
    problems = []
    phases = Phases.of(config, peak, total)
    # A constant that nothing follows may warm up longer than a short run lasts.
    most = total - (config.kind != "constant")
    if (config.kind != "constant" or config.then) and config.warmup_steps > most:
        given = f"{config.warmup_steps} with {total} steps in all"
        problems.append(Problem("schedule.warmup_steps", given, f"0 to {most}"))
    elif config.kind in ("wsd", "infinite") and phases.cool > phases.decay:
        parts = [f"{phases.warm} steps of warm-up", f"{phases.end - phases.decay} of decay"]
        if config.kind == "infinite":
            parts.insert(1, f"{phases.cool - phases.warm} of cooldown")
        given = f"{', '.join(parts)} in a schedule of {total} steps"
        problems.append(Problem("schedule", given, f"{total} together at most", "shorten one"))
    high = min(peak, phases.constant)
    if config.kind != "constant" and not 0 <= config.min_lr <= high:
        what = "optimizer.lr" if high == peak else "schedule.constant_lr"
        given = f"{config.min_lr:g} with {what} {high:g}"
        problems.append(Problem("schedule.min_lr", given, f"0 to {high:g}"))
    if config.kind == "infinite" and phases.constant > peak:
        given = f"{phases.constant:g} with optimizer.lr {peak:g}"
        problems.append(Problem("schedule.constant_lr", given, f"above 0, up to {peak:g}"))
    if phases.shape == "exponential" and config.min_lr == 0:
        given = "0, which an exponential decay never reaches"
        remedy = f"give a floor, such as {peak / 10:g}, or another schedule.decay"
        problems.append(Problem("schedule.min_lr", given, "above 0", remedy))
    return problems
