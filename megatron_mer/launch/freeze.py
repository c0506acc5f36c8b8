"""A copy of the code and an account of what it runs with, kept with a run.

A job that is requeued for a month runs what it was submitted with, whatever becomes of the
checkout.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

PARTS: Final = ("megatron_mer", "tools", "examples/slurm", "pretrain_llama_mer.py")
"""What a job needs of the project."""
COMMIT_FILE: Final = "COMMIT"


def new_folder(parent: Path) -> Path:
    """Makes a folder named by the time, such as 20260131T235959Z.

    Raises:
        OSError: it cannot be made.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder, serial = parent / stamp, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            serial += 1
            folder = parent / f"{stamp}_{serial}"


def freeze_code(root: Path, target: Path) -> None:
    """Copies what a job needs, and says which commit it is.

    Beside the copy, COMMIT names the commit, with `+changes` where the copy differs from it, and
    changes.diff holds the difference. Without git both are left out.

    Args:
        root: the project's folder.
        target: a folder to be made.

    Raises:
        OSError: something cannot be copied.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for part in PARTS:
        source, copy = root / part, target / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=ignore)
        else:
            shutil.copy2(source, copy)
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return
    changed = _git(root, "status", "--porcelain", "--", *PARTS) or ""
    commit = head.strip() + ("+changes" if changed.strip() else "")
    (target / COMMIT_FILE).write_text(commit + "\n", encoding="utf-8")
    difference = _git(root, "diff", "HEAD", "--", *PARTS)
    if changed.strip():
        (target / "changes.diff").write_text(changed + (difference or ""), encoding="utf-8")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def installed_packages() -> list[str]:
    """Every installed package as NAME==VERSION, as `pip freeze` lists them."""
    found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return sorted((f"{name}=={found[name]}" for name in found if name), key=str.lower)


def describe_environment() -> dict[str, Any]:
    """Python, machine and loaded modules; no other variable of the environment."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "modules": [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
    }
