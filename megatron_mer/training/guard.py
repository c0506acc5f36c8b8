"""What a run does about the world outside: requests, dead ranks, standing still, a last word.

Every start has one guard on each rank. It collects what the run is asked for, watches that it
moves, hears of ranks that fail, and writes into ``status.json`` how the run ended.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megatron_mer.config import LaunchConfig
from megatron_mer.engine.distributed import device, set_time_limit
from megatron_mer.engine.peers import Peers, is_gone
from megatron_mer.errors import ConfigError, MegatronMerError, PeerError, RunRequeued, RunStopped
from megatron_mer.launch.requests import Pace, Request, Requests, job_end
from megatron_mer.launch.watchdog import SECONDS_TO_TELL, Watchdog
from megatron_mer.log import get_logger
from megatron_mer.training.outputs import RunDirectory, Status

_STALLED = "stalled "  # before what the peers say, so that the others print where they stand
_SECONDS_TO_SPEAK = 1.0

logger = get_logger(__name__)


class Guard:
    """Watches over one start of a run, on one rank.

    Args:
        config: time limits.
        outputs: the run's directory.
        rank: this rank.

    Raises:
        LaunchError: the end of the job is no time.
    """

    def __init__(self, config: LaunchConfig, outputs: RunDirectory, rank: int) -> None:
        self.config = config
        self.pace = Pace(config.end_margin_seconds)
        self.owner: list[object] | None = None
        """Host and process of rank 0 once the run is alive; until then no status is written."""
        self._outputs = outputs
        self._rank = rank
        self.requests = Requests(job_end(os.environ), outputs.root if rank == 0 else None)
        self._watchdog = Watchdog(
            rank,
            config.watchdog_seconds,
            config.setup_timeout_seconds,
            self._stalled,
            self.requests.term_came,
        )
        self._peers: Peers | None = None
        self._heard: str | None = None
        self._ending = False
        self._in_training = False
        self._save_from: int | None = None
        # Until the ranks have met, SIGTERM ends the process: there is nothing to save.
        self.requests.listen(signal.SIGUSR1, signal.SIGUSR2)

    def start(self, store: Store) -> None:
        """The ranks have met.

        Args:
            store: what they share by name.
        """
        self.requests.listen()
        self._peers = Peers(store, self._peer_ends)
        self._peers.start()
        self._watchdog.start()

    def built(self, rank_bytes: int) -> None:
        """The engine and all its groups are there. On all ranks.

        Args:
            rank_bytes: of this rank's part of a checkpoint.
        """
        set_time_limit(self.config.setup_timeout_seconds)
        self.pace = Pace(self.config.end_margin_seconds, rank_bytes, dist.get_world_size())

    def progress(self) -> None:
        """Something was done."""
        self._watchdog.progress()

    def report(self) -> float:
        """What this rank is asked for, right before a step; all hear of it with the step."""
        self._watchdog.step_begins(self.pace.longest_step)
        return float(self.requests.now(self.pace.seconds_needed))

    def step_ended(self, seconds: float) -> None:
        """A step of so many seconds is done. On all ranks."""
        self._watchdog.step_ends()
        self.pace.step(seconds)
        if not self._in_training:
            self._in_training = True
            set_time_limit(self.config.step_timeout_seconds)

    def before_the_first_step(self, step: int) -> None:
        """End the run if any rank was asked to while it loaded. Collective.

        The end of the job is left to the steps: each start shall gain one.

        Args:
            step: the newest checkpoint's, which stands for all that was trained.

        Raises:
            RunStopped: it was.
        """
        asked = torch.tensor([int(self.requests.now(0.0))], device=device())
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        request = Request(int(asked.item()))
        if request.effect in ("stop", "requeue"):
            raise self.stop(request, step, saved=False)

    def agreed(self, reports: Iterable[float]) -> Request:
        """What is asked for, by all ranks' reports."""
        return Request(int(max(reports)))

    def answer(self, request: Request, step: int) -> None:
        """A checkpoint of this step begins, if one is asked for."""
        if request:
            self.requests.saving()
            self._save_from = step
            if self._rank == 0:
                logger.info("%s: a checkpoint of step %d is written", request.text, step)

    def saved(self, step: int) -> None:
        """The checkpoint of a step is whole."""
        if self._save_from is not None and step >= self._save_from:
            self.requests.saved()
            self._save_from = None

    def stop(self, request: Request, step: int, saved: bool) -> RunStopped:
        """The error that ends the run as it was asked to, after the last write."""
        text = f"{request.text} asked the run to end; "
        text += f"the checkpoint of step {step} was saved" if saved else "no step was trained"
        text += ". Start again to go on"
        if request.effect == "stop":
            return RunStopped(text)
        return RunRequeued(text)

    def no_more_steps(self) -> None:
        """Training is over; what follows, such as copies, takes as long as it takes. All ranks."""
        limits = self.config
        set_time_limit(max(limits.setup_timeout_seconds, limits.step_timeout_seconds))
        self._watchdog.close()
        # Nothing is left to save: SIGTERM ends what is still waited for.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def close(self) -> None:
        """Watch no more."""
        self._watchdog.close()
        if self._peers:
            self._peers.close()

    def end(self, error: BaseException) -> BaseException:
        """Write down why the run ends early, and tell the others.

        Args:
            error: what ended it on this rank.

        Returns:
            What to raise: the error, or one that names the rank that it began with.
        """
        if isinstance(error, RunStopped):
            # Every rank stops here, after the last write.
            dist.barrier()
            self.close()
            if self._rank == 0:
                step = int(self._outputs.read_status().get("step", 0))
                self._outputs.write_status(error.status, step, str(error))
                if error.status == "stopped":
                    # Not earlier: killed in between, the run would start again.
                    self.requests.stopped()
            return error
        if isinstance(error, KeyboardInterrupt):
            self._tell(f"rank {self._rank} was interrupted")
            self.note("stopped", "interrupted; start again to resume from the last checkpoint")
            return error
        if isinstance(error, MegatronMerError):
            text = f"rank {self._rank}: {error}"
        elif is_gone(error):
            error = self._explained(error)
            text = f"rank {self._rank}: {error}"
        else:
            text = f"rank {self._rank}: {type(error).__name__}: {error}"
        if self.owner is not None or not isinstance(error, ConfigError):
            self._tell(text)
        self.note("failed", text)
        return error

    def note(self, status: Status, reason: str) -> None:
        """Say how the run ended; the first rank has the cause, the others its consequences.

        A rank that outlives rank 0 for long finds another start's status, and leaves it alone.
        """
        last = self._outputs.read_status()
        # A run that is done may be stopped while its last checkpoint is copied.
        if self.owner is None or last.get("status", "running") != "running":
            return
        if last and [last.get("host"), last.get("pid")] != self.owner:
            return
        try:
            self._outputs.write_status(status, int(last.get("step", 0)), reason)
        except MegatronMerError as error:
            logger.error("status.json cannot be written (%s): %s, %s", error, status, reason)

    def begin(self, step: int) -> list[object]:
        """Say that the run is alive; host and process that say so. On rank 0."""
        self._outputs.write_status("running", step)
        return [platform.node(), os.getpid()]

    def _explained(self, error: BaseException) -> PeerError:
        """A lost connection is not the cause: the rank that has it speaks first."""
        end = time.monotonic() + SECONDS_TO_TELL
        while self._heard is None and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(_SECONDS_TO_SPEAK)
        lost = (str(error).strip().splitlines() or [type(error).__name__])[0]
        text = self._heard or f"it said nothing, so it was killed, or its node is lost ({lost})"
        return PeerError(f"another rank is gone: {text}")

    def _tell(self, text: str) -> None:
        self._ending = True
        if self._peers:
            self._peers.tell(text)

    def _stalled(self, text: str) -> None:
        """The watchdog is about to end this rank."""
        self._tell(f"{_STALLED}rank {self._rank}: {text}")
        self.note("failed", f"rank {self._rank}: {text}")

    def _peer_ends(self, text: str) -> None:
        """Another rank fails: this one will not get on, whatever it waits for."""
        self._heard = text.removeprefix(_STALLED)
        if self._ending:
            return
        stalled = text.startswith(_STALLED)
        if not stalled:
            time.sleep(SECONDS_TO_TELL + 2 * _SECONDS_TO_SPEAK)
        # By now the main thread has found out by itself, and has ended, or it hangs.
        self._watchdog.say_and_leave(f"another rank is gone: {self._heard}", stacks=stalled)
