"""Write a directory aside, then put it in place: an output exists whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from qcompile.errors import ArtifactError
from qcompile.manifest import is_artifact

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_ASIDE = "-old"
"""Ends the name of an output that has been moved aside."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def write_artifact_directory(
    output: Path, overwrite: bool, *, bytes_needed: int | None = None
) -> Iterator[Path]:
    """Yield an empty directory beside `output` that replaces it when the block ends well.

    On success all files reach the disk before the directory takes its name; an artifact that
    stood there changes places with it at the very end and is then deleted. On any exception,
    Ctrl-C among them, what was written is removed and an existing output is left as it was. A
    killed process leaves at most a ``.tmp-*`` sibling, which the next run with the same output
    clears.

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
    with contextlib.ExitStack() as stack:
        with _naming_the_output(output, bytes_needed):
            output.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(output)
            _check_free_space(output, bytes_needed)
            with _interrupts_held_back():
                temporary, lock = _make_temporary(output)
                stack.callback(_remove, temporary, lock)
        try:
            yield temporary
        except OSError as error:
            if not is_full_disk(error):
                raise
            raise _full_disk(output, bytes_needed, written=_size(temporary)) from error
        with _naming_the_output(output, bytes_needed, temporary):
            _flush_to_disk(temporary)
            refuse_to_destroy(output, overwrite)
            with _interrupts_held_back():
                _put_in_place(temporary, output)


def is_full_disk(error: OSError) -> bool:
    """Whether an operation failed for want of room: the disk is full, or the user's share of it."""
    return error.errno in _FULL_DISK


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


@contextlib.contextmanager
def _naming_the_output(
    output: Path, bytes_needed: int | None, temporary: Path | None = None
) -> Iterator[None]:
    """Errors of the disk as errors that name the output, and what it needs if there is no room."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            written = 0 if temporary is None else _size(temporary)
            raise _full_disk(output, bytes_needed, written=written) from error
        place = f" ({error.filename})" if error.filename else ""
        raise ArtifactError(
            f"cannot write {output}: {error.strerror}{place}", remedy="choose another output"
        ) from error


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C has its effect at the end of the block, so that the block is not left half done."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # an interrupt is no exception here
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


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


def _remove(temporary: Path, lock: int) -> None:
    # After a success the old artifact has this name, or nothing.
    with _interrupts_held_back():
        shutil.rmtree(temporary, ignore_errors=True)
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
    elif not _exchange(temporary, output):
        _replace(temporary, output)
    _fsync(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Lets two paths change places in one step, where the system and the disk can do that."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return bool(renameat2(*paths, _RENAME_EXCHANGE) == 0)


def _replace(temporary: Path, output: Path) -> None:
    """The same in two steps; a kill between them leaves the old output aside for the next run."""
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
    if bytes_needed is None or bytes_needed <= written:
        needs = f"more than the {written} bytes that were written"
    else:
        needs = f"at least {bytes_needed} bytes"
    free = shutil.disk_usage(output.parent).free
    return ArtifactError(
        f"the disk {disk} is full: {output} needs {needs}, {free + written} bytes are free",
        remedy="free some space, or choose an output on another disk",
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
