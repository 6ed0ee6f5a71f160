"""kill -9, Ctrl-C and a full disk at random points of a compilation.

Whatever happens: the output is absent or whole, an artifact that stood there is the old or the new
one, and nothing is left beside it (what kill -9 leaves, the next run removes).
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.faults.conftest import Outcome, WarmProcess
from tests.faults.strikes import can_fill_disk

from qcompile.errors import ArtifactError, DataError

SEEDS = 50
FAST_SEEDS = 3
OUTSIDE_SHARE = 0.4
"""Of the signals come from outside, at a moment; the others at an operation on files."""


@dataclass(frozen=True)
class Scenario:
    """A compilation to strike at.

    Attributes:
        options: Of ``qcompile compile``; ``{work}`` stands for a new work directory.
        replaces: Whether an artifact of another recipe stands at the output before.
    """

    options: tuple[str, ...] = ()
    replaces: bool = False


CALIBRATED = "--set quantize_weights.method=gptq --samples 2 --length 32 --work-dir {work}"

SCENARIOS = {
    "replacing": Scenario(replaces=True),
    "calibrated": Scenario(tuple(CALIBRATED.split())),
    "cuda, replacing": Scenario(("--target", "cuda"), replaces=True),
    "new": Scenario(),
}

OLD = Scenario(("--recipe", "float"))
"""Makes the artifact that is to be replaced."""


@dataclass(frozen=True)
class Rehearsal:
    """An undisturbed compilation.

    Attributes:
        files: What it writes.
        seconds: How long it takes.
        operations: On files, from the first look at the output.
    """

    files: dict[str, bytes]
    seconds: float
    operations: int


@dataclass(frozen=True)
class Struck:
    """A compilation that something befell.

    Attributes:
        name: Of its scenario.
        output: Where it was to write; the parent directory is its own.
        outcome: How it ended.
    """

    name: str
    output: Path
    outcome: Outcome

    @property
    def siblings(self) -> list[str]:
        """What stands at the output and beside it."""
        return sorted(path.name for path in self.output.parent.iterdir())

    @property
    def unfinished(self) -> list[Path]:
        """Files in the work directory that are no finished entries."""
        files = [path for path in work_directory(self.output).rglob("*") if path.is_file()]
        return [path for path in files if path.suffix != ".safetensors"]


class Workshop:
    """Compiles one model in a warm process, each time into a directory of its own.

    Args:
        process: Where it is compiled.
        checkpoint: The model.
        root: Holds the directories.
    """

    def __init__(self, process: WarmProcess, checkpoint: Path, root: Path) -> None:
        self.process = process
        self._checkpoint = checkpoint
        self._root = root
        self.rehearsal = cache(self._rehearse)
        self.old = cache(self._make_old)

    def strike(self, kind: str, seed: int) -> Struck:
        """Compiles, and strikes at a point that the seed chooses."""
        generator = random.Random(f"{kind} {seed}")
        name = list(SCENARIOS)[seed % len(SCENARIOS)]
        rehearsal = self.rehearsal(name)
        output = self._new_output(f"{kind} {seed}", SCENARIOS[name])
        strike: dict[str, Any] = {"kind": kind}
        if kind != "full_disk" and generator.random() < OUTSIDE_SHARE:
            strike["moment"] = generator.uniform(0, rehearsal.seconds)
        else:
            strike["below"] = str(output.parent)
            strike["operation"] = generator.randrange(rehearsal.operations)
            strike["after"] = generator.random() < 0.5
        return Struck(name, output, self.compile(output, SCENARIOS[name], strike))

    def compile(
        self, output: Path, scenario: Scenario, strike: dict[str, Any] | None = None
    ) -> Outcome:
        """``qcompile compile`` as a scenario has it."""
        arguments = ["compile", str(self._checkpoint), "-o", str(output), "--threads", "1", "-q"]
        work = str(work_directory(output))
        arguments += [option.replace("{work}", work) for option in scenario.options]
        arguments += ["--overwrite"] if scenario.replaces else []
        return self.process.run("command_line", arguments=arguments, strike=strike)

    def assert_absent_or_whole(self, struck: Struck) -> None:
        """The output is as it was before, or the new artifact; either runs."""
        replaces = SCENARIOS[struck.name].replaces
        if struck.output.exists():
            whole = [self.rehearsal(struck.name).files]
            whole += [hashed_files(self.old())] if replaces else []
            assert hashed_files(struck.output) in whole
            used = self.process.run("use", path=str(struck.output))
            assert used.status == 0, used.output
        else:
            assert not replaces

    def _new_output(self, label: str, scenario: Scenario) -> Path:
        output = self._root / label / "out"
        output.parent.mkdir()
        if scenario.replaces:
            shutil.copytree(self.old(), output)
        return output

    def _rehearse(self, name: str) -> Rehearsal:
        output = self._new_output(f"rehearsal of {name}", SCENARIOS[name])
        outcome = self.compile(output, SCENARIOS[name], {"below": str(output.parent)})
        assert outcome.status == 0, outcome.output
        return Rehearsal(hashed_files(output), outcome.seconds, outcome.operations)

    def _make_old(self) -> Path:
        output = self._new_output("old", OLD)
        outcome = self.compile(output, OLD)
        assert outcome.status == 0, outcome.output
        return output


def work_directory(output: Path) -> Path:
    """Where a compilation keeps its calibration work; not beside its output."""
    return output.parent.with_name(f"{output.parent.name}, work")


def hashed_files(directory: Path) -> dict[str, bytes]:
    """All but the report, which holds timings."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "report.json"
    }


@pytest.fixture(scope="module")
def workshop(
    warm_process: WarmProcess, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workshop:
    return Workshop(warm_process, checkpoint, tmp_path_factory.mktemp("struck"))


each_seed = pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed < FAST_SEEDS else pytest.mark.exhaustive)
        for seed in range(SEEDS)
    ],
)


@each_seed
def test_killed_compile_leaves_nothing_that_the_next_run_does_not_clear(
    seed: int, workshop: Workshop
) -> None:
    struck = workshop.strike("kill", seed)
    assert struck.outcome.status in (-signal.SIGKILL, 0), struck.outcome.output
    if struck.output.exists() or not SCENARIOS[struck.name].replaces:
        workshop.assert_absent_or_whole(struck)
    if set(struck.siblings) - {"out"} or work_directory(struck.output).exists():
        again = Scenario(SCENARIOS[struck.name].options, replaces=True)
        assert workshop.compile(struck.output, again).status == 0
        assert struck.siblings == ["out"]
        workshop.assert_absent_or_whole(struck)


@each_seed
def test_interrupted_compile_says_so_and_leaves_nothing(seed: int, workshop: Workshop) -> None:
    before = set(workshop.process.temporary.iterdir())
    struck = workshop.strike("interrupt", seed)
    if struck.outcome.status != 0:  # the moment came after the end
        assert struck.outcome.output.splitlines() == ["error: interrupted"]
        assert struck.outcome.status == 130
    assert struck.siblings in ([], ["out"])
    assert struck.unfinished == []
    workshop.assert_absent_or_whole(struck)
    assert set(workshop.process.temporary.iterdir()) == before


@pytest.mark.skipif(not can_fill_disk(), reason="fills the disk by a filter of Linux")
@each_seed
def test_compile_on_a_full_disk_says_what_it_needs_and_leaves_nothing(
    seed: int, workshop: Workshop
) -> None:
    struck = workshop.strike("full_disk", seed)
    output = struck.outcome.output
    if struck.outcome.status == DataError.exit_code:
        work = work_directory(struck.output)
        full = os.strerror(errno.ENOSPC)
        assert output.startswith(f"error: work directory '{work}' cannot be written to: {full}")
    elif struck.outcome.status != 0:  # all was written already
        assert struck.outcome.status == ArtifactError.exit_code, output
        error, remedy = output.splitlines()
        needs = r"needs (at least \d+ bytes|more than the \d+ bytes that were written)"
        assert re.match(f"error: the disk /.* is full: {struck.output} {needs}", error)
        assert remedy.startswith("remedy: free some space")
    assert struck.unfinished == []
    assert struck.siblings in ([], ["out"])
    workshop.assert_absent_or_whole(struck)
