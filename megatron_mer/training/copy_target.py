"""What can be known of `checkpoint.copy_to` before training without asking any service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_mer.config.checks import local_path
from megatron_mer.errors import Problem

_KEY = "checkpoint.copy_to"


def copy_target_problems(place: str | None) -> Iterator[Problem]:
    """Why there can be no copies in a place; imports no torch.

    Args:
        place: a path or URL; None: there are to be no copies.
    """
    if place is None:
        return
    path = local_path(place)
    yield from _protocol(place) if path is None else _directory(Path(path))


def _protocol(url: str) -> Iterator[Problem]:
    # Only a run with copies pays for it.
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        allowed = "a directory, or a URL that fsspec knows, such as s3://, gs://, abfs://, sftp://"
        yield Problem(_KEY, f"given {url}, with an unknown protocol", allowed)
    except ImportError as error:
        known = known_implementations[protocol]["class"]
        package = known.partition(".")[0]
        if package in ("s3fs", "gcsfs"):  # These go with one version of fsspec.
            package += f"=={fsspec.__version__}"
        remedy = f"pip install {package}" if not known.startswith("fsspec.") else str(error)
        given = f"given {url}, for whose protocol a package is not installed"
        yield Problem(_KEY, given, remedy=remedy)


def _directory(path: Path) -> Iterator[Problem]:
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        given = f"given {path}, but {place} is no directory that can be written"
        yield Problem(_KEY, given, "a directory that rank 0 can write")
