"""A program that answers lines, in a process and perhaps an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys


class LineProcess:
    """A program that prints ``ready`` once it is, and then a line of JSON for every line it reads.

    Other lines that it prints are passed over.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read("ready")

    def ask(self, line: str) -> str:
        """The answer to a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read("{")

    def close(self) -> None:
        """Lets the program end."""
        self._process.communicate()

    def _read(self, beginning: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line
        print(f"{' '.join(self._process.args)} failed", file=sys.stderr)
        raise SystemExit("a peer failed; its message stands above")
