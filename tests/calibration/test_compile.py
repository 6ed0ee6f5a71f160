"""`compile` with calibration: from the command's arguments to an artifact that runs."""

import numpy as np
import pytest

import qcompile as qc
from qcompile.calibration.generate import GREEDY, generate_windows
from qcompile.errors import DataError


def contents(artifact):
    """The files that hold numbers, by name."""
    skipped = {"report.json", "manifest.json"}
    files = (p for p in artifact.path.rglob("*") if p.is_file() and p.name not in skipped)
    return {p.relative_to(artifact.path): p.read_bytes() for p in files}


def test_artifact_is_the_same_for_any_threads_and_memory_limit(tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("llama")
    made = [
        qc.compile(
            model,
            "w4a8-gptq",
            output=tmp_path / f"out{threads}",
            calibration="self",
            calibration_samples=20,
            calibration_length=24,
            threads=threads,
            memory_limit=limit,
            work_dir=tmp_path / f"work{threads}",
            seed=3,
            check="off",
        )
        for threads, limit in ((1, None), (2, "1MiB"))
    ]
    assert contents(made[0]) == contents(made[1])
    assert any("20 x 24 tokens of text that the model wrote" in n for n in made[0].report["notes"])
    assert made[0].forward(np.array([[1, 2, 3]])).shape == (1, 3, 260)


def test_model_writes_the_same_windows_for_the_same_seed(tiny_checkpoint):
    program = qc.capture(tiny_checkpoint("llama"))
    one, same, other = (generate_windows(program, 5, 12, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (5, 12)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len(set(one[:, 0].tolist())) == 5  # every window starts differently


def test_first_tokens_are_the_likeliest(tiny_checkpoint):
    program = qc.capture(tiny_checkpoint("llama"))
    import torch

    written = generate_windows(program, 2, GREEDY + 2, seed=1)
    logits = program(torch.from_numpy(written)).logits
    likeliest = logits.argmax(-1).numpy()
    assert np.array_equal(written[:, 1 : GREEDY + 1], likeliest[:, :GREEDY])


def test_text_that_is_missing_leaves_nothing_behind(tiny_checkpoint, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt' does not exist"):
        qc.compile(
            tiny_checkpoint("llama"),
            "w4-gptq",
            output=tmp_path / "out",
            calibration=tmp_path / "nowhere.txt",
            check="off",
        )
    assert list(tmp_path.iterdir()) == []
