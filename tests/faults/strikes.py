"""What can befall a process at any moment: kill -9, Ctrl-C, a disk that is full from now on.

A strike by operation, ``{"kind": "interrupt", "below": "/out", "operation": 7, "after": true}``,
hits before or after the seventh operation on files, counted from the first one that concerns
``below``. Only Python's own operations are counted (they are those that it audits).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from types import FrameType
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}

LAST_SPARED_DESCRIPTOR = 3
"""Up to here, descriptors can be written even when the disk is full: they are the test's own."""

_COUNTED = frozenset(
    {
        "open",
        "os.listdir",
        "os.scandir",
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "fcntl.flock",
        "shutil.rmtree",
    }
)


class Counter:
    """Counts operations on files, and strikes at one of them.

    Args:
        kind: ``"kill"``, ``"interrupt"`` or ``"full_disk"``.
        below: The directory whose first use begins the count.
        operation: Which one to strike at, from 0; None only counts.
        after: Whether to strike when it is done, not before.
    """

    def __init__(
        self,
        kind: str | None = None,
        below: str | None = None,
        operation: int | None = None,
        after: bool = False,
    ) -> None:
        self.operations = 0
        self._kind = kind
        self._below = below
        self._operation = operation
        self._after = after
        self._counts = False

    def watch(self) -> None:
        """Begins to count; there is no way to end it but `rest`."""
        if self._below is not None:
            sys.addaudithook(self._audit)

    def rest(self) -> None:
        """Counts and strikes no more."""
        self._below = None
        sys.setprofile(None)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._below is None or event not in _COUNTED:
            return
        self._counts = self._counts or str(arguments[0]).startswith(self._below)
        if not self._counts:
            return
        self.operations += 1
        if self.operations - 1 == self._operation:
            if self._after:
                # The first thing that Python sees after the operation is the return of whatever
                # called it, and a signal is handled no earlier.
                sys.setprofile(self._strike_on_return)
            else:
                self._strike()

    def _strike_on_return(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "return" and frame.f_code is not Counter._audit.__code__:
            sys.setprofile(None)
            self._strike()

    def _strike(self) -> None:
        if self._kind == "full_disk":
            fill_disk()
        else:
            os.kill(os.getpid(), SIGNALS[str(self._kind)])


def prepare(strike: dict[str, Any] | None) -> Counter:
    """Makes ready for a strike by operation; one by moment comes from outside."""
    options = {key: value for key, value in (strike or {}).items() if key != "moment"}
    counter = Counter(**options)
    counter.watch()
    return counter


# --- A full disk, as the kernel reports it -------------------------------------------------------

# System calls that need room on the disk, by their number on each machine.
_WRITES = {
    "x86_64": {"write": 1, "pwrite64": 18, "writev": 20, "ftruncate": 77, "fallocate": 285},
    "aarch64": {"write": 64, "pwrite64": 68, "writev": 66, "ftruncate": 46, "fallocate": 47},
}
_MAKES = {"x86_64": {"mkdir": 83, "mkdirat": 258}, "aarch64": {"mkdirat": 34}}
_OPENAT = {"x86_64": 257, "aarch64": 56}

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_FAIL = 0x00050000 | errno.ENOSPC
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _FIRST, _THIRD = 0, 16, 32
"""Offsets in ``struct seccomp_data``: the call's number, the low halves of two arguments."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def can_fill_disk() -> bool:
    """Whether this machine is one that `fill_disk` knows."""
    return sys.platform == "linux" and platform.machine() in _WRITES


def fill_disk() -> None:
    """From now on, whatever needs room on a disk fails with ENOSPC; deleting still works.

    A seccomp filter, which needs no privilege: the kernel itself refuses the system calls of this
    process, whichever library makes them.
    """
    program = b"".join(_filter(platform.machine()))
    buffer = ctypes.create_string_buffer(program)
    filter_ = _Program(len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp is not available")


def _filter(machine: str) -> list[bytes]:
    """Berkeley packet filter: each test jumps over the instructions of its own group."""
    program = [_instruction(_LOAD, _NUMBER)]
    for number in _MAKES[machine].values():
        program += [_instruction(_EQUAL, number, otherwise=1), _instruction(_RETURN, _FAIL)]
    for number in _WRITES[machine].values():
        program += [
            _instruction(_EQUAL, number, otherwise=4),
            _instruction(_LOAD, _FIRST),
            _instruction(_GREATER, LAST_SPARED_DESCRIPTOR, otherwise=1),
            _instruction(_RETURN, _FAIL),
            _instruction(_RETURN, _ALLOW),
        ]
    program += [
        _instruction(_EQUAL, _OPENAT[machine], otherwise=3),
        _instruction(_LOAD, _THIRD),
        _instruction(_ANY_BIT, os.O_CREAT, otherwise=1),
        _instruction(_RETURN, _FAIL),
        _instruction(_RETURN, _ALLOW),
    ]
    return program


def _instruction(code: int, value: int, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, 0, otherwise, value)
