"""Write a directory aside, then put it in place: an output exists whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qcompile.errors import ArtifactError
from qcompile.manifest import is_artifact

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_ASIDE = "-old"
"""Ends the name of an output that has been moved aside."""


@contextlib.contextmanager
def write_artifact_directory(
    output: Path, overwrite: bool, *, bytes_needed: int | None = None
) -> Iterator[Path]:
    """Yield an empty directory beside `output` that replaces it when the block ends well.

    On success all files reach the disk before the directory takes its name; an artifact that
    stood there is moved aside at the very end and then deleted. On any exception, Ctrl-C among
    them, what was written is removed and an existing output is left as it was. A killed process
    leaves at most a ``.tmp-*`` sibling, which the next run with the same output clears.

    Args:
        output: The directory to make; missing parents are made as well.
        overwrite: Whether an artifact that stands there may be replaced. Anything that is not
            an artifact is never replaced; an empty directory always is.
        bytes_needed: Expected size in bytes, checked against the free space at once.

    Raises:
        ArtifactError: If `output` must not be replaced, cannot be written, or the disk is full.
    """
    refuse_to_destroy(output, overwrite)
    output = output.absolute() if not output.exists() else output.resolve()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(output)
        temporary, lock = _make_temporary(output)
    except OSError as error:
        raise ArtifactError(
            f"cannot write beside {output}: {error.strerror}", remedy="choose another output"
        ) from error
    try:
        _check_free_space(output, bytes_needed)
        yield temporary
        _flush_to_disk(temporary)
        refuse_to_destroy(output, overwrite)
        _put_in_place(temporary, output)
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise _full_disk(output, bytes_needed, written=_size(temporary)) from error
        raise
    finally:
        # Gone already after a success.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def refuse_to_destroy(output: Path, overwrite: bool) -> None:
    """Says before the work begins that an output must not be replaced.

    Raises:
        ArtifactError: If something stands at `output` that is no artifact, or one that may not be
            overwritten.
    """
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise ArtifactError(f"{output} exists and is not a directory", remedy="choose another name")
    if not any(output.iterdir()):
        return
    if not is_artifact(output):
        raise ArtifactError(
            f"{output} is not empty and not a qcompile artifact: it will not be overwritten",
            remedy="choose another output, or remove it yourself",
        )
    if not overwrite:
        raise ArtifactError(
            f"{output} holds an artifact already",
            remedy="choose another output, or allow it to be overwritten (--overwrite)",
        )


def _make_temporary(output: Path) -> tuple[Path, int]:
    """A new sibling of `output` and the descriptor that holds its lock.

    The kernel drops the lock with the process, however it ends: a sibling that nobody locks is a
    leftover.
    """
    while True:
        path = output.parent / f"{_prefix(output)}{secrets.token_hex(4)}"
        path.mkdir()
        lock = os.open(path, os.O_RDONLY)
        # Another process may take the new directory for a leftover before it is locked.
        if _try_lock(lock) and path.is_dir():
            return path, lock
        os.close(lock)


def _clear_leftovers(output: Path) -> None:
    """Remove what killed runs left; bring back an output that one had just moved aside."""
    leftover = re.compile(re.escape(_prefix(output)) + f"[0-9a-f]{{8}}({_ASIDE})?")
    for path in [path for path in output.parent.iterdir() if leftover.fullmatch(path.name)]:
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            if not _try_lock(lock):
                continue
            if path.name.endswith(_ASIDE) and not output.exists():
                path.rename(output)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _put_in_place(temporary: Path, output: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        _fsync(output.parent)
        return
    aside = temporary.with_name(temporary.name + _ASIDE)
    # Locked, so that no other run takes it for a leftover while it stands aside.
    lock = os.open(output, os.O_RDONLY)
    try:
        _try_lock(lock)
        output.rename(aside)
        try:
            temporary.rename(output)
        except BaseException:
            aside.rename(output)
            raise
        _fsync(output.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


def _prefix(output: Path) -> str:
    return f".tmp-{output.name}-"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flush_to_disk(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            _fsync(Path(folder, name))
        _fsync(Path(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free_space(output: Path, bytes_needed: int | None) -> None:
    free = shutil.disk_usage(output.parent).free
    if bytes_needed is not None and bytes_needed > free:
        raise _full_disk(output, bytes_needed, written=0)


def _full_disk(output: Path, bytes_needed: int | None, *, written: int) -> ArtifactError:
    disk = output.parent
    while not disk.is_mount():
        disk = disk.parent
    if bytes_needed is None:
        needs = f"more than the {written} bytes that were written"
    else:
        needs = f"{bytes_needed} bytes"
    free = shutil.disk_usage(output.parent).free
    return ArtifactError(
        f"the disk {disk} is full: {output} needs {needs}, {free + written} bytes are free",
        remedy="free some space, or choose an output on another disk",
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
