"""A small disk of its own for a test: really full, really read-only."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE = 16 << 20  # bytes


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting needs root (mount {' '.join(arguments)}: {done.stderr.strip()})")


class SmallDisk:
    """A tmpfs; root may fill it and write-protect it as a disk would."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(root))

    def fill(self, leave: int = 0) -> str:
        """A shell command that leaves so many bytes."""
        free = f"$(( $(stat -f -c '%a*%S' {self.root}) - {leave} ))"
        return f"fallocate -l {free} {self.root}/ballast"

    def empty(self) -> None:
        (self.root / "ballast").unlink()

    def protect(self, path: Path) -> str:
        """A shell command after which nothing can be opened for writing below a folder.

        A mount on top of it: the disk itself cannot be switched while a run has files open.
        """
        return f"mount --bind {path} {path} && mount -o remount,bind,ro {path}"

    def close(self) -> None:
        """Take away what was mounted, the last first."""
        lines = Path("/proc/mounts").read_text().splitlines()
        for point in reversed([line.split()[1] for line in lines]):
            if point == str(self.root) or point.startswith(f"{self.root}/"):
                subprocess.run(["umount", "--lazy", point], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = SmallDisk(tmp_path / "disk")
    try:
        yield disk
    finally:
        disk.close()
