"""The one logger of the package: rank 0 speaks, other ranks only when something is wrong."""

from __future__ import annotations

import logging
import os
from typing import Final

ROOT: Final = "megatron_mer"
CONSOLE_HANDLER: Final = "megatron_mer.console"
"""Name of the console's handler, for whoever has to replace it while a progress bar is drawn."""
FILE_HANDLER: Final = "megatron_mer.file"


def get_logger(name: str = ROOT) -> logging.Logger:
    """Gives a logger below the package's root logger.

    Args:
        name: a module's `__name__`, or a bare word that is put below the root.
    """
    if name == ROOT or name.startswith(ROOT + "."):
        return logging.getLogger(name)
    return logging.getLogger(f"{ROOT}.{name}")


def setup_logging(
    rank: int, log_file: str | os.PathLike[str] | None = None, level: int = logging.INFO
) -> None:
    """Sets up the console, and on rank 0 a log file; a second call replaces the first.

    Args:
        rank: this process's rank. Ranks above 0 print warnings and errors only, marked `[rank N]`.
        log_file: file that rank 0 appends to; its folder is made.
        level: lowest level that rank 0 prints.
    """
    root = logging.getLogger(ROOT)
    for handler in list(root.handlers):
        if handler.get_name() in (CONSOLE_HANDLER, FILE_HANDLER):
            root.removeHandler(handler)
            handler.close()
    mark = "" if rank == 0 else f"[rank {rank}] "
    root.setLevel(level if rank == 0 else max(level, logging.WARNING))
    # Libraries that configure Python's root logger would print every line a second time.
    root.propagate = False
    _add_handler(root, logging.StreamHandler(), CONSOLE_HANDLER, mark)
    if log_file is not None and rank == 0:
        folder = os.path.dirname(os.fspath(log_file))
        if folder:
            os.makedirs(folder, exist_ok=True)
        _add_handler(root, logging.FileHandler(log_file, encoding="utf-8"), FILE_HANDLER, mark)


def _add_handler(root: logging.Logger, handler: logging.Handler, name: str, mark: str) -> None:
    handler.set_name(name)
    layout = f"%(asctime)s %(levelname)s {mark}%(message)s"
    handler.setFormatter(logging.Formatter(layout, datefmt="%Y-%m-%d %H:%M:%S"))
    root.addHandler(handler)
