"""What ranks tell each other beside their collectives: that one fails, before the others hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

_LOOK_SECONDS = 1.0
_KEY = "end"

# What gloo and NCCL say when the other end of a connection is gone, or does not answer in time.
_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "application timeout caused pair closure",
    "timed out waiting",
)


class Peers:
    """Watches whether a rank has said that it fails; its word is the first one's alone.

    Args:
        store: what the ranks share by name.
        heard: called in a thread, once, with what was said.
    """

    def __init__(self, store: Store, heard: Callable[[str], None]) -> None:
        self._store = store
        self._heard = heard
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        self._stop.set()

    def tell(self, text: str) -> None:
        """Say that this rank fails, unless another has said so before; waits a moment at most."""
        work = threading.Thread(target=self._tell, args=(text,), daemon=True)
        work.start()
        work.join(_LOOK_SECONDS)

    def _tell(self, text: str) -> None:
        try:
            _connection(self._store).compare_set(_KEY, "", text)
        except (dist.DistError, RuntimeError):
            return  # Who keeps the store is gone, which the others see themselves.

    def _watch(self) -> None:
        # A connection of its own: the main thread may wait on the other.
        try:
            store = _connection(self._store)
            while not self._stop.wait(_LOOK_SECONDS):
                if store.check([_KEY]):
                    self._heard(store.get(_KEY).decode())
                    return
        except (dist.DistError, RuntimeError):
            if not self._stop.is_set():
                self._heard("rank 0, or the launcher of its node, is gone")


def is_gone(error: BaseException) -> bool:
    """Whether a collective failed because another rank is not there any more."""
    known = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    return known or any(text in str(error).lower() for text in _GONE)


def _connection(store: Any) -> Any:
    """Another connection to the same store; torch's types do not know of it."""
    return store.clone()
