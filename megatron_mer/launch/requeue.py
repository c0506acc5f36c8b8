"""Whether a job of Slurm has anything to do, and whether it runs again when its training has ended.

`status.json` decides, not exit codes, which deepspeed and torchrun do not pass on. What was decided
is kept in `restarts.json`, so that a run that fails over and over ends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

RECORD: Final = "restarts.json"
BAD_NODES: Final = "bad_nodes.json"
"""Written by the checks of nodes before training: {node: what is wrong}."""
MAX_WAITS: Final = 30
"""Restarts in a row that gained no step by nobody's fault: more than an hour at Slurm's usual two
minutes each."""

_STAMP: Final = re.compile(r"(\d{8}T\d{6}Z)(?:_(\d+))?")  # see `freeze.new_folder`

Action = Literal["start", "requeue", "end", "fail"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the jobs of one submission have behind them."""

    submission: str = ""
    """Name of the submission; another one begins anew."""
    step: int = 0
    """Step of the newest checkpoint at the last decision."""
    restarts: int = 0
    """Restarts in a row that gained no step."""
    waits: int = 0
    """Restarts in a row without a step because another job still had the run's directory, or since
    the run was asked to end before its first step."""
    seen: str = ""
    """Which `status.json` the job found: one that is still there says nothing of the job."""
    ended: str = ""
    """Why this submission is over; empty while it is not."""


@dataclass(frozen=True)
class Decision:
    """What a job does now, and why in one line."""

    action: Action
    """start: train; requeue: run again; end: nothing is left to do; fail: give up."""
    reason: str
    record: Record


def decide_start(status: Mapping[str, Any], record: Record, submission: str) -> Decision:
    """Decide whether a job that begins trains.

    Args:
        status: the content of `status.json`; empty where there is none.
        record: of the last job.
        submission: the name of this job's submission.
    """
    if later(record.submission, submission):
        return Decision("end", _taken_over(record), record)
    if record.submission != submission:
        # Whoever submits a run anew wants it to go on, also one that was stopped, or that is done
        # and got a longer stream.
        record = Record(submission=submission, step=_step(status))
    elif record.ended:
        return Decision("end", f"this submission is over: {record.ended}", record)
    elif status.get("status") in ("done", "stopped"):
        return _over("end", _said(status), record)
    return Decision("start", _where(status), replace(record, seen=_identity(status)))


def decide_refused(record: Record) -> Decision:
    """What follows where the program refuses its configuration or data before any rank starts."""
    return _over("fail", "the run is refused, see above", record)


def decide_not_started(record: Record) -> Decision:
    """What follows where Slurm's warning came before any rank was started."""
    return _wait("warned before any rank was started", record, 0)


def decide_taken_over(record: Record, submission: str) -> Decision | None:
    """What follows for a job whose run another submission has begun meanwhile; None: none has."""
    if record.submission in ("", submission):
        return None
    return Decision("end", _taken_over(record), record)


def decide_end(
    status: Mapping[str, Any],
    record: Record,
    exit_code: int,
    max_restarts: int,
    twin: str = "",
    bad_nodes: Mapping[str, str] | None = None,
) -> Decision:
    """Decide whether a job whose training has ended runs again.

    Args:
        status: the content of `status.json`; empty where there is none.
        record: of the last job.
        exit_code: of the launcher, which need not be the training program's.
        max_restarts: restarts in a row that may gain no step, >= 0.
        twin: who else trains in this directory right now; empty where nobody does.
        bad_nodes: what was found wrong with nodes, which are left out from now on.
    """
    if exit_code != 0 and _identity(status) == record.seen:
        status = {"status": "not begun", "step": _step(status)}
    state, step = status.get("status"), _step(status)
    gained = step - record.step
    if state in ("done", "stopped") and not twin:
        return _over("end", _said(status), replace(record, step=step))
    if twin:
        # What it gains is not this job's.
        what = f"{twin} still trains in this directory"
        return _wait(what, replace(record, step=step), 0, "another run does not end there")
    if state == "requeue":
        return _wait(_said(status), replace(record, step=step, restarts=0), gained)
    restarts = 0 if gained > 0 else record.restarts
    what = f"{_said(status)}, exit code {exit_code}, {_gain(gained)}"
    if bad_nodes:
        what += f", left out from now on: {', '.join(sorted(bad_nodes))}"
    if restarts >= max_restarts:
        text = (
            f"{what}; {restarts} restarts in a row gained no step, and {max_restarts} are allowed"
        )
        return _over("fail", text, replace(record, step=step))
    left = f"restart {restarts + 1} of {max_restarts} without a step"
    new = replace(record, step=step, restarts=restarts + 1, waits=0)
    return Decision("requeue", f"{what}; {left}", new)


def _wait(
    what: str, record: Record, gained: int, why: str = "is the time limit too short?"
) -> Decision:
    """Runs again for a reason that is no fault, but not for ever."""
    if gained > 0:
        return Decision("requeue", what, replace(record, waits=0))
    text = f"{what}; {record.waits + 1} of {MAX_WAITS} restarts in a row for such a reason"
    if record.waits >= MAX_WAITS:
        text = f"{what}; {MAX_WAITS} restarts in a row gained no step: {why}"
        return _over("fail", text, record)
    return Decision("requeue", text, replace(record, waits=record.waits + 1))


def _over(action: Action, reason: str, record: Record) -> Decision:
    return Decision(action, reason, replace(record, ended=reason))


def _taken_over(record: Record) -> str:
    return f"submission {record.submission} came later and has taken over this run"


def later(one: str, other: str) -> bool:
    """Whether a submission was surely made after another; both named by the time or both by ids."""
    if one.isdigit() and other.isdigit():
        return int(one) > int(other)
    times = [_STAMP.fullmatch(name) for name in (one, other)]
    first, second = ((match[1], int(match[2] or 1)) if match else None for match in times)
    return first is not None and second is not None and first > second


def _identity(status: Mapping[str, Any]) -> str:
    return " ".join(str(status.get(key)) for key in ("status", "step", "host", "pid", "time"))


def _step(status: Mapping[str, Any]) -> int:
    step = status.get("step", 0)
    return step if isinstance(step, int) else 0


def _said(status: Mapping[str, Any]) -> str:
    # Training had no time to say that it ends.
    state = "killed" if status.get("status") == "running" else str(status.get("status", "unknown"))
    reason = str(status.get("reason") or "").partition("\n")[0]
    return f"{state} at step {_step(status)}" + (f" ({reason})" if reason else "")


def _where(status: Mapping[str, Any]) -> str:
    return f"status.json is at step {_step(status)}" if status else "from the beginning"


def _gain(gained: int) -> str:
    return f"{gained} steps gained" if gained > 0 else "no step gained"


# Files ------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; an empty one where there is none, or a torn one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_record(output_dir: Path) -> Record:
    """What the last job of a run left."""
    content = read_object(output_dir / RECORD)
    known: dict[str, Any] = asdict(Record())
    kept = {key: content[key] for key in known if isinstance(content.get(key), type(known[key]))}
    return Record(**kept)


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file whole.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def keep(decision: Decision, output_dir: Path) -> None:
    """Keep what was decided for the next job.

    Raises:
        OSError: it cannot be written; names the file.
    """
    path = output_dir / RECORD
    try:
        write_object(path, {**asdict(decision.record), "reason": decision.reason})
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def live_twin(output_dir: Path) -> str:
    """Who trains in a directory right now; empty where nobody does.

    A job whose node was cut off may run on while Slurm has requeued it. The lock of a live run
    counts up, so this watches for two of its heartbeats, where there is a lock at all.
    """
    lock = output_dir / ".lock"
    first = read_object(lock)
    if not first.get("id"):
        return ""
    beat = first.get("beat_seconds")
    time.sleep(2 * (float(beat) if isinstance(beat, (int, float)) else 5.0))
    now = read_object(lock)
    alive = now.get("id") and (now["id"], now.get("beats")) != (first["id"], first.get("beats"))
    return f"a run on {now.get('host', 'another host')}" if alive else ""
