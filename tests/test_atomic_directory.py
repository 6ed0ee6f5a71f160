"""An output directory exists whole or not at all, and an old one is never lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qcompile import atomic_directory
from qcompile.atomic_directory import write_artifact_directory
from qcompile.errors import ArtifactError

OLD = '{"schema_version": 1, "qcompile_version": "0", "which": "old"}'
NEW = OLD.replace("old", "new")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An artifact that stands where the new one shall go."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text(OLD)
    return output


def contents(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in output.iterdir()}


def write(output: Path, *, error: BaseException | None = None, **options: int) -> None:
    """Replace `output` by a new artifact of 1000 bytes and more; `error` breaks in at the end."""
    with write_artifact_directory(output, overwrite=True, **options) as directory:
        (directory / "model.onnx.data").write_bytes(bytes(1000))
        (directory / "manifest.json").write_text(NEW)
        if error is not None:
            raise error


def siblings(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_directory_appears_with_its_content_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out"
    with write_artifact_directory(output, overwrite=False) as directory:
        (directory / "manifest.json").write_text(NEW)
        assert directory.parent == output.parent
        assert not output.exists()
    assert contents(output) == {"manifest.json": NEW}
    assert siblings(output) == ["out"]


def test_new_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with write_artifact_directory(tmp_path / "out", overwrite=False):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_existing_artifact_is_replaced_only_when_allowed(output: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="holds an artifact already") as caught,
        write_artifact_directory(output, overwrite=False),
    ):
        pytest.fail("refused before any work")
    assert "--overwrite" in str(caught.value)
    with write_artifact_directory(output, overwrite=True) as directory:
        (directory / "manifest.json").write_text(NEW)
        assert contents(output) == {"manifest.json": OLD}
    assert contents(output) == {"manifest.json": NEW}
    assert siblings(output) == ["out"]


def test_empty_directory_is_filled_without_asking(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with write_artifact_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "manifest.json").write_text(NEW)
    assert contents(tmp_path / "out") == {"manifest.json": NEW}


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_artifact_is_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(ArtifactError, match="not a qcompile artifact"),
        write_artifact_directory(home, overwrite),
    ):
        pytest.fail("refused before any work")
    with (
        pytest.raises(ArtifactError, match="not a directory"),
        write_artifact_directory(home / "thesis.txt", overwrite),
    ):
        pytest.fail("refused before any work")
    assert contents(home) == {"thesis.txt": "years of work"}


def test_link_to_an_artifact_stays_a_link(output: Path) -> None:
    link = output.parent / "link"
    link.symlink_to(output)
    with write_artifact_directory(link, overwrite=True) as directory:
        (directory / "manifest.json").write_text(NEW)
    assert link.is_symlink()
    assert contents(output) == {"manifest.json": NEW}


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(1)])
def test_failure_leaves_the_old_artifact_and_nothing_else(
    output: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        write(output, error=error)
    assert contents(output) == {"manifest.json": OLD}
    assert siblings(output) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_disk_and_the_bytes(output: Path, number: int) -> None:
    with pytest.raises(
        ArtifactError, match=r"the disk /.* is full: .*out needs at least 123456 bytes"
    ):
        write(output, error=OSError(number, os.strerror(number)), bytes_needed=123456)
    assert contents(output) == {"manifest.json": OLD}
    assert siblings(output) == ["out"]


def test_full_disk_without_estimate_names_the_bytes_written(tmp_path: Path) -> None:
    size = 1000 + len(NEW)
    with pytest.raises(ArtifactError, match=f"out needs more than the {size} bytes"):
        write(tmp_path / "out", error=OSError(errno.ENOSPC, "No space left on device"))
    assert siblings(tmp_path / "out") == []


def test_disk_that_fills_up_while_flushing_is_reported(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="is full"):
        write(output)
    assert contents(output) == {"manifest.json": OLD}
    assert siblings(output) == ["out"]


def test_too_small_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="is full"),
        write_artifact_directory(tmp_path / "out", overwrite=False, bytes_needed=2**60),
    ):
        pytest.fail("refused before any work")
    assert siblings(tmp_path / "out") == []


def test_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*file/out: File exists \(.*file\)"),
        write_artifact_directory(tmp_path / "file" / "out", overwrite=False),
    ):
        pytest.fail("refused before any work")


def test_other_errors_of_the_writer_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        write(tmp_path / "out", error=PermissionError(errno.EACCES, "no"))


def never(first: Path, second: Path) -> bool:
    """A disk on which two directories cannot change places."""
    return False


def interrupt_on(target: Path, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """Ctrl-C comes just before or just after something is renamed to `target`."""
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if to != target or path.name.endswith("-old"):
            return rename(path, to)
        if after:
            rename(path, to)
        signal.raise_signal(signal.SIGINT)
        return to if after else rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_goes_with_and_without_an_exchange_of_names(
    output: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic_directory, "_exchange", never)
    write(output)
    assert contents(output)["manifest.json"] == NEW
    assert siblings(output) == ["out"]


def test_old_artifact_returns_when_the_new_one_cannot_take_its_place(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_the_second(path: Path, target: Path) -> Path:
        if target == output and not path.name.endswith("-old"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(atomic_directory, "_exchange", never)
    monkeypatch.setattr(Path, "rename", fail_the_second)
    with pytest.raises(ArtifactError, match=r"cannot write .*out: Device or resource busy"):
        write(output)
    assert contents(output) == {"manifest.json": OLD}
    assert siblings(output) == ["out"]


@pytest.mark.parametrize("after", [False, True])
def test_interrupt_while_names_change_waits_until_they_have(
    output: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr(atomic_directory, "_exchange", never)
    interrupt_on(output, monkeypatch, after=after)
    with pytest.raises(KeyboardInterrupt):
        write(output)
    assert contents(output)["manifest.json"] == NEW
    assert siblings(output) == ["out"]


def test_interrupt_while_the_directory_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def interrupted(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_threads_other_than_the_main_one_may_write(tmp_path: Path) -> None:
    thread = threading.Thread(target=write, args=(tmp_path / "out",))
    thread.start()
    thread.join()
    assert contents(tmp_path / "out")["manifest.json"] == NEW


def killed_while_writing(output: Path) -> None:
    """Another process that starts to write `output` and dies of SIGKILL."""
    program = (
        "import os, sys, pathlib; from qcompile.atomic_directory import write_artifact_directory\n"
        "with write_artifact_directory(pathlib.Path(sys.argv[1]), True) as directory:\n"
        "    (directory / 'part').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(output)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_killed_run_leaves_one_sibling_that_the_next_run_clears(output: Path) -> None:
    killed_while_writing(output)
    left, old = siblings(output)
    assert left.startswith(".tmp-out-")
    assert old == "out"
    assert contents(output) == {"manifest.json": OLD}
    write(output)
    assert siblings(output) == ["out"]


def test_output_moved_aside_by_a_killed_run_comes_back(output: Path) -> None:
    output.rename(output.with_name(".tmp-out-0123abcd-old"))
    with pytest.raises(ValueError, match="fails again"):
        write(output, error=ValueError("fails again"))
    assert contents(output) == {"manifest.json": OLD}
    assert siblings(output) == ["out"]


def test_directories_of_other_runs_are_left_alone(output: Path) -> None:
    other = output.parent / ".tmp-out-big-0123abcd"
    other.mkdir()
    with (
        write_artifact_directory(output, overwrite=True) as first,
        write_artifact_directory(output, overwrite=True) as second,
    ):
        assert first.is_dir()
        assert second.is_dir()
    assert other.is_dir()
