"""A warm process to strike at, and tiny models to compile in it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

_TIMEOUT = 120.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: The exit code, or minus the signal; None if it did not end in time.
        seconds: How long it ran.
        output: What it printed on stdout and stderr.
        result: What it returned.
        operations: How many operations on files a strike could have chosen from.
    """

    status: int | None
    seconds: float
    output: str
    result: Any = None
    operations: int = 0


class WarmProcess:
    """Runs jobs of `jobs.py`, each in a fresh child of one warm process.

    Args:
        directory: For logs and temporary files.
        checkpoint: A model to warm up with.
    """

    def __init__(self, directory: Path, checkpoint: Path) -> None:
        self._directory = directory
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_process.py")), str(checkpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for pytest
        )
        ready = self._pipe(self._process.stdout).readline()
        assert ready, "the warm process did not start; see its error above"

    def run(
        self,
        job: str,
        *,
        strike: dict[str, Any] | None = None,
        memory: int | None = None,
        timeout: float = _TIMEOUT,
        **arguments: Any,
    ) -> Outcome:
        """Runs one job to its end.

        Args:
            job: The name of a function in `jobs.py`.
            strike: What befalls it; see `strikes.py`.
            memory: Bytes by which its address space may grow; no limit by default.
            timeout: Seconds after which it is killed.
            **arguments: Of the job.
        """
        log = self._directory / f"{next(self._numbers)}.log"
        request = {
            "job": job,
            "arguments": arguments,
            "log": str(log),
            "strike": strike,
            "memory": memory,
            "timeout": timeout,
        }
        requests = self._pipe(self._process.stdin)
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        reply = json.loads(self._pipe(self._process.stdout).readline())
        return Outcome(output=log.read_text(encoding="utf-8", errors="replace"), **reply)

    def close(self) -> None:
        """Ends the process."""
        with self._process:
            self._pipe(self._process.stdin).close()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Path:
    """A Llama of one layer with tied embeddings."""
    return tiny_checkpoint("llama", tie_word_embeddings=True, num_hidden_layers=1)


@pytest.fixture(scope="session")
def warm_process(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WarmProcess]:
    """A process that has imported everything; forks a child for each job."""
    process = WarmProcess(tmp_path_factory.mktemp("warm"), checkpoint)
    yield process
    process.close()
