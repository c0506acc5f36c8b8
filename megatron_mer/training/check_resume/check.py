"""Train without interruption; train, kill and resume; compare. All in a folder of its own."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mer.checkpoint import CheckpointInfo, find_latest
from megatron_mer.checkpoint.layout import LATEST, step_name
from megatron_mer.config import RunConfig, to_yaml
from megatron_mer.errors import CheckpointError, ConfigError, Problem, TrainingError
from megatron_mer.training.check_resume.launch import Ranks
from megatron_mer.training.check_resume.shorten import Short, shorten
from megatron_mer.training.check_resume.verdict import Runs, Verdict, judge
from megatron_mer.training.preflight import prepare

WHOLE, KILLED, RESUMED, LOADED = "uninterrupted", "interrupted", "resumed", "loaded"

TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
"""See `figures.Closeness`: at another layout sums are added in another order."""

_LAYOUT_KEYS = ("tp_size", "pp_size", "micro_batch_size", "ranks")


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What is to be tested."""

    config: RunConfig
    """The user's configuration."""
    ranks: int | None = None
    """Number of ranks; None: the fewest that the layout allows."""
    steps: int = 6
    """Steps up to the checkpoint."""
    more: int = 6
    """Steps behind it."""
    layout: str = ""
    """The layout of the resume, `tp_size=2,ranks=4`; empty: the same."""
    work_dir: Path | None = None
    """Where the folder is made; None: beside the user's output_dir."""
    keep: bool = False
    """Keep the folder of a run that resumes well, too."""
    timeout: float = 1800.0
    """Seconds that a start may take."""
    tolerance: float | None = None
    """Of another layout; None: `TOLERANCE`."""


def check_resume(
    test: SelfTest,
    say: Callable[[str], None],
    meanwhile: Callable[[Path], None] = lambda run: None,
) -> Verdict:
    """Test that a killed run resumes exactly.

    Args:
        test: what is to be tested.
        say: gets lines about what goes on.
        meanwhile: called with the killed run's output_dir before it is resumed.

    Raises:
        ConfigError: the configuration, the layout or the folder is refused.
        TrainingError: the training program failed, or the folder holds no comparable run.
    """
    _check_numbers(test)
    ranks = test.ranks or test.config.parallel.tp_size * test.config.parallel.pp_size
    short = shorten(test.config, test.steps, test.more)
    resumed, resumed_ranks = changed_layout(short.config, ranks, test.layout)
    prepare(short.config, ranks, fresh=True)
    if test.layout:
        prepare(resumed, resumed_ranks, fresh=True)
    work = _work_folder(test)
    say(f"{short.total} steps, killed after step {short.killed_after}; in {work}")
    for line in short.changes:
        say(f"  {line}")
    bench = _Bench(work, short, ranks, test.timeout, say)
    try:
        bench.uninterrupted(keep=bool(test.layout))
        saved = bench.killed()
        meanwhile(work / KILLED)
        bench.resumed(resumed, resumed_ranks, loaded=bool(test.layout))
        tolerance = test.tolerance or TOLERANCE[short.config.precision]
        verdict = judge(bench.runs(saved), tolerance if test.layout else None)
    except KeyboardInterrupt:
        shutil.rmtree(work, ignore_errors=True)
        raise
    except Exception:
        say(f"what was written so far is kept in {work}")
        raise
    if verdict.agrees and not test.keep:
        shutil.rmtree(work)
    else:
        say(f"kept: {work} ({WHOLE}, {KILLED} and resumed, ranks: their output and batches)")
    return verdict


def _check_numbers(test: SelfTest) -> None:
    problems = []
    if test.ranks is not None and test.ranks < 1:
        problems.append(Problem("--ranks", f"given {test.ranks}", "at least 1"))
    for name, value in (("--timeout", test.timeout), ("--tolerance", test.tolerance)):
        if value is not None and not value > 0:
            problems.append(Problem(name, f"given {value:g}", "above 0"))
    if problems:
        raise ConfigError(problems)


def changed_layout(config: RunConfig, ranks: int, text: str) -> tuple[RunConfig, int]:
    """The configuration of the resume, and its number of ranks.

    Args:
        config: what is resumed.
        ranks: number of ranks that is kept unless the change names one.
        text: `tp_size=2,pp_size=1,micro_batch_size=4,ranks=2`, any of them.

    Raises:
        ConfigError: it is something else, or changes nothing.
    """
    if not text:
        return config, ranks
    values = _layout_values(text)
    now = {
        "tp_size": config.parallel.tp_size,
        "pp_size": config.parallel.pp_size,
        "micro_batch_size": config.batch.micro_batch_size,
        "ranks": ranks,
    }
    if {**now, **values} == now:
        given = f"given {text!r}, which is the layout that there is"
        remedy = "name another one, or leave the option out"
        raise ConfigError([Problem("--change-layout", given, remedy=remedy)])
    wanted = {**now, **values}
    parallel = replace(config.parallel, tp_size=wanted["tp_size"], pp_size=wanted["pp_size"])
    batch = replace(config.batch, micro_batch_size=wanted["micro_batch_size"])
    return replace(config, parallel=parallel, batch=batch), wanted["ranks"]


def _layout_values(text: str) -> dict[str, int]:
    values: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        key, _, number = (piece.strip() for piece in part.partition("="))
        if key in _LAYOUT_KEYS and number.isdecimal() and int(number) and key not in values:
            values[key] = int(number)
            continue
        allowed = f"KEY=NUMBER[,KEY=NUMBER], each key once: {', '.join(_LAYOUT_KEYS)}; at least 1"
        problems.append(Problem("--change-layout", f"given {part!r}", allowed))
    if problems:
        raise ConfigError(problems)
    return values


def _parent(test: SelfTest) -> Path:
    """The folder in which a new one is made: the given one, or beside the user's output_dir."""
    if test.work_dir is not None:
        return test.work_dir
    parent = Path(test.config.output_dir).absolute().parent
    # No folder is left behind that the user did not make.
    return next(path for path in (parent, *parent.parents) if path.is_dir())


def _work_folder(test: SelfTest) -> Path:
    parent = _parent(test)
    inside = Path(test.config.output_dir).absolute()
    if inside == parent.absolute() or inside in parent.absolute().parents:
        given = f"given {parent}, which lies in the run's output_dir {inside}"
        raise ConfigError([Problem("--work-dir", given, "a folder outside of it")])
    try:
        parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f"{inside.name}.check_resume_", dir=parent)
    except OSError as error:
        given = f"given {parent}, where no folder can be made ({error.strerror})"
        remedy = "choose another with --work-dir PATH"
        raise ConfigError([Problem("--work-dir", given, remedy=remedy)]) from error
    return Path(name).absolute()


class _Bench:
    """The three starts of a test, in its folder.

    Args:
        work: the folder.
        short: the run.
        ranks: number of ranks of the first two starts.
        timeout: seconds a start.
        say: gets lines about what goes on.
    """

    def __init__(
        self, work: Path, short: Short, ranks: int, timeout: float, say: Callable[[str], None]
    ) -> None:
        self._work = work
        self._short = short
        self._ranks = ranks
        self._timeout = timeout
        self._say = say

    def uninterrupted(self, keep: bool) -> None:
        """Train all steps; the checkpoint from which the other run resumes can be kept."""
        begin = self._begin("1/3", f"{self._short.total} steps without interruption", self._ranks)
        config = self._short.config
        if keep:
            every = replace(config.checkpoint, keep_every=self._short.steps)
            config = replace(config, checkpoint=every)
        with self._start(WHOLE, WHOLE, config, self._ranks, {}) as ranks:
            ranks.wait(self._timeout)
        self._done(begin)

    def killed(self) -> CheckpointInfo:
        """Train to some steps behind the checkpoint, and kill; returns the checkpoint."""
        short = self._short
        what = f"{short.killed_after} steps, a checkpoint at step {short.steps}, kill -9"
        begin = self._begin("2/3", what, self._ranks)
        hold = {"--hold-after": str(short.killed_after)}
        latest = self._work / KILLED / "checkpoints" / LATEST

        def there() -> bool:
            # A checkpoint is written beside training: it is there when `latest` names it.
            return latest.exists() and latest.read_text().strip() == step_name(short.steps)

        with self._start(KILLED, KILLED, short.config, self._ranks, hold) as ranks:
            if not ranks.wait(self._timeout, lambda: ranks.held and there()):
                raise TrainingError(
                    f"the run ended before step {short.killed_after}, where it was to be killed: "
                    f"batches without an update? See {self._work / KILLED / 'train.log'}"
                )
            ranks.kill()
        info = find_latest(self._work / KILLED / "checkpoints")
        if info is None or info.step != short.steps:
            raise CheckpointError(f"no checkpoint of step {short.steps} is left by the killed run")
        self._done(begin)
        return info

    def resumed(self, config: RunConfig, ranks: int, loaded: bool) -> None:
        """Go on from the checkpoint to the end; what was loaded can be written down first."""
        more = self._short.total - self._short.steps
        begin = self._begin("3/3", f"resume, {more} steps more", ranks)
        options = {"--loaded": str(self._work / LOADED)} if loaded else {}
        with self._start(RESUMED, KILLED, config, ranks, options) as started:
            started.wait(self._timeout)
        self._done(begin)

    def runs(self, saved: CheckpointInfo) -> Runs:
        """What is to be compared."""
        return Runs(
            whole=self._work / WHOLE,
            killed=self._work / KILLED,
            whole_records=self._records(WHOLE),
            killed_records=self._records(KILLED),
            resumed_records=self._records(RESUMED),
            loaded=self._work / LOADED / step_name(saved.step),
            first_batch=int(saved.run_state["batches"]),
        )

    def _records(self, start: str) -> Path:
        return self._work / "ranks" / start

    def _start(
        self, start: str, run: str, config: RunConfig, ranks: int, options: Mapping[str, str]
    ) -> Ranks:
        file = self._work / f"{start}.yaml"
        file.write_text(to_yaml(replace(config, output_dir=str(self._work / run))))
        given = [word for pair in options.items() for word in pair]
        return Ranks([*given, "--config", str(file)], ranks, self._records(start))

    def _begin(self, number: str, what: str, ranks: int) -> float:
        self._say(f"{number} {what}; {ranks} rank{'s' if ranks > 1 else ''}")
        return time.monotonic()

    def _done(self, begin: float) -> None:
        self._say(f"    {time.monotonic() - begin:.0f} s")
