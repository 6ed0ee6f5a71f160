"""The command line: arguments in, one result out, errors in one line, exit codes with a meaning.

The functions behind the commands are replaced; tests of the whole path are elsewhere.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from qcompile import errors
from qcompile.cli import main
from qcompile.cli_options import CheckOption
from qcompile.generation import Completion
from qcompile.manifest import FileInfo, Manifest, ModelInfo, Signature
from qcompile.passes.equivalence import CHECK_LEVELS
from qcompile.recipe import load_recipe, recipe_names

COMMANDS = ("compile", "run", "eval", "recipes")


class Terminal(io.StringIO):
    """A standard stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class FakeStream(Iterator[str]):
    """Pieces of a text; an exception among them is raised in its place."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self._pieces = iter(pieces)
        self.completion = Completion(
            text="".join(p for p in pieces if isinstance(p, str)),
            token_ids=tuple(range(len(pieces))),
            finish_reason="length",
            prompt_tokens=3,
        )

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, BaseException):
            raise piece
        return piece


class FakeTokenizer:
    def __init__(self, has_chat_template: bool) -> None:
        self.has_chat_template = has_chat_template


class FakeArtifact:
    """An artifact that answers what it is given and remembers what it was asked."""

    def __init__(self, *answers: FakeStream, chat: bool = True) -> None:
        self.path = Path("out")
        self.manifest = Manifest(
            qcompile_version="1.0",
            target="cpu",
            task="causal_lm",
            model=ModelInfo(name="tiny", architecture="llama", source="tiny/", fingerprint="0"),
            recipe=load_recipe("float").to_dict(),
            signature=Signature(inputs=(), outputs=()),
            bits={"stored_bits_per_weight": 4.625},
            files={"model.onnx": FileInfo(sha256="0" * 64, bytes=1_500_000)},
        )
        self.report: dict[str, Any] = {
            "source_bytes": 5_000_000,
            "seconds": {"quantize": 3.25},
            "peak_memory_bytes": 2_000_000_000,
            "notes": ["weights are tied"],
        }
        self.tokenizer = FakeTokenizer(chat)
        self.asked: list[tuple[object, dict[str, Any]]] = []
        self._answers = list(answers)

    def stream(self, prompt: object, **options: Any) -> FakeStream:
        # A chat goes on growing after it was passed.
        self.asked.append((list(prompt) if isinstance(prompt, list) else prompt, options))
        return self._answers.pop(0)


@pytest.fixture
def piped_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeArtifact], FakeArtifact]:
    """Makes `load` return this artifact."""

    def install(artifact: FakeArtifact) -> FakeArtifact:
        monkeypatch.setattr("qcompile.artifact.load", lambda path, threads=None: artifact)
        return artifact

    return install


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces `compile`; holds the arguments that it was called with."""
    called: dict[str, Any] = {}

    def fake(model: str, **options: Any) -> FakeArtifact:
        called.update(options, model=model)
        return FakeArtifact()

    monkeypatch.setattr("qcompile.compiler.compile", fake)
    return called


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


# --- help, version, usage ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: qcompile {command} " in capsys.readouterr().out


def test_no_arguments_show_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f" {command} " in out for command in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qcompile.cli import main; main(['compile', '--help']); "
        "heavy = {'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "qcompile", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qcompile ")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import qcompile

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qcompile {qcompile.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message", "help_of"),
    [
        (["compile"], "Missing argument", "qcompile compile"),
        (["compile", "m", "-o", "o", "--treads", "2"], "--treads", "qcompile compile"),
        (["compile", "m", "-o", "o", "--threads", "0"], "--threads", "qcompile compile"),
        (["comple"], "comple", "qcompile"),
    ],
)
def test_wrong_usage_exits_2_and_points_to_help(
    arguments: list[str], message: str, help_of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert f"see '{help_of} --help'" in captured.err


def test_wrong_usage_is_json_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)


# --- recipes ---


def test_recipes_lists_names_and_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(recipe_names())
    assert lines[0] == f"float\t{load_recipe('float').description}"


def test_recipe_is_printed_as_a_file_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "w4-rtn"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe("w4-rtn")


def test_recipes_are_json_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == list(recipe_names())
    assert main(["recipes", "w4-rtn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_recipe("w4-rtn").to_dict()


def test_recipes_make_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["recipes"]) == 0
    assert "what it does" in terminal.getvalue()


# --- compile ---


def test_compile_passes_every_option_on(compiled: dict[str, Any]) -> None:
    plain = ["-r", "w8-rtn", "-t", "cpu", "--threads", "2", "--overwrite", "--dequantize"]
    plain += ["--check", "local"]
    plain += ["--calibration", "t.txt", "--samples", "3", "--length", "64", "--seed", "7"]
    plain += ["--memory-limit", "2GiB", "--work-dir", "w"]
    settings = ["--set", "a.b=int8", "--set", "a.c=[x]"]
    settings += ["--target-bits", "3.25", "--target-size", "80MiB"]
    assert main(["compile", "dir", "-o", "out", *plain, *settings]) == 0
    compiled.pop("progress")
    assert compiled == {
        "model": "dir",
        "output": Path("out"),
        "recipe": "w8-rtn",
        "target": "cpu",
        "threads": 2,
        "overwrite": True,
        "dequantize": True,
        "check": "local",
        "calibration": "t.txt",
        "calibration_samples": 3,
        "calibration_length": 64,
        "memory_limit": "2GiB",
        "work_dir": Path("w"),
        "seed": 7,
        "overrides": {
            "a.b": "int8",
            "a.c": ["x"],
            "quantize_weights.target_bits": 3.25,
            "quantize_weights.target_size": "80MiB",
        },
    }


def test_checks_are_those_of_the_compiler() -> None:
    assert get_args(get_args(CheckOption)[0]) == CHECK_LEVELS


def test_unknown_check_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "dir", "--check", "fully"]) == 2
    assert "'full', 'local', 'off'" in capsys.readouterr().err


def test_compile_prints_what_came_out(
    compiled: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "dir", "-o", "out"]) == 0
    captured = capsys.readouterr()
    rows = dict(line.split("\t") for line in captured.out.splitlines())
    assert rows == {
        "model": "tiny",
        "recipe": "float",
        "target": "cpu",
        "size before": "5.0 MB",
        "size after": "1.5 MB",
        "bits per weight of the model, stored": "4.625",
        "time: quantize": "3.25 s",
        "peak memory": "2.0 GB",
        "artifact": "out",
    }
    assert captured.err == "note: weights are tied\n"


def test_quiet_compile_keeps_its_notes(
    compiled: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "dir", "--quiet"]) == 0
    assert compiled["output"] is None
    assert capsys.readouterr().err == ""


def test_compile_prints_one_json_document(
    compiled: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "dir", "-o", "out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["artifact"] == "out"
    assert document["bytes"] == 1_500_000
    assert document["bits"] == {"stored_bits_per_weight": 4.625}
    assert document["recipe"]["name"] == "float"


def test_compile_refuses_a_setting_without_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "dir", "-o", "out", "--set", "a.b"]) == 2
    assert "step.option=value" in capsys.readouterr().err


# --- errors ---

ERRORS = [
    errors.RecipeError("culprit", remedy="way out"),
    errors.ModelError("culprit", remedy="way out"),
    errors.TargetError("culprit", remedy="way out"),
    errors.ArtifactError("culprit", remedy="way out"),
    errors.DataError("culprit", remedy="way out"),
    errors.EquivalenceError("culprit", remedy="way out"),
    errors.QCompileError("culprit", remedy="way out"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_is_two_lines_on_stderr_and_its_exit_code(
    error: errors.QCompileError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qcompile.compiler.compile", failing(error))
    assert main(["compile", "dir", "-o", "out"]) == error.exit_code != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: culprit\nremedy: way out\n"


def test_error_with_json_is_a_document_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qcompile.compiler.compile", failing(errors.ModelError("no [file] here")))
    assert main(["compile", "dir", "-o", "out", "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": {
            "type": "ModelError",
            "message": "no [file] here",
            "remedy": None,
            "exit_code": 3,
        }
    }
    assert captured.err == "error: no [file] here\n"


def test_traceback_is_raised_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_TRACEBACK", "1")
    with pytest.raises(errors.RecipeError):
        main(["recipes", "absent"])


def test_interrupt_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qcompile.compiler.compile", failing(KeyboardInterrupt()))
    assert main(["compile", "dir", "-o", "out", "--json"]) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["type"] == "Interrupted"
    assert captured.err == "error: interrupted\n"


def test_failure_of_the_machine_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(28, "No space left on device", "out/x")
    monkeypatch.setattr("qcompile.compiler.compile", failing(error))
    assert main(["compile", "dir", "-o", "out"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'out/x'\n"


def test_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.compiler.compile", failing(AssertionError("defect")))
    with pytest.raises(AssertionError, match="defect"):
        main(["compile", "dir", "-o", "out"])


def test_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from qcompile.cli import main; sys.exit(main(['recipes']))"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    reader.wait()
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (141, "")


# --- run ---


@pytest.mark.parametrize(
    ("flag", "template", "expected"),
    [
        ([], True, [{"role": "user", "content": "hi"}]),
        ([], False, "hi"),
        (["--raw"], True, "hi"),
        (["--chat"], True, [{"role": "user", "content": "hi"}]),
    ],
)
def test_run_chats_where_the_model_has_a_template(
    flag: list[str],
    template: bool,
    expected: object,
    serve: Callable[[FakeArtifact], FakeArtifact],
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = serve(FakeArtifact(FakeStream("hello", " there"), chat=template))
    assert main(["run", "out", "hi", *flag]) == 0
    assert artifact.asked[0][0] == expected
    assert capsys.readouterr().out == "hello there\n"


def test_run_passes_sampling_options_on(serve: Callable[[FakeArtifact], FakeArtifact]) -> None:
    artifact = serve(FakeArtifact(FakeStream("x")))
    options = ["--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9"]
    options += ["--seed", "1"]
    assert main(["run", "out", "hi", *options, "--stop", "a", "--stop", "b"]) == 0
    assert artifact.asked[0][1] == {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["a", "b"],
    }


def test_run_reads_the_prompt_from_a_pipe(
    serve: Callable[[FakeArtifact], FakeArtifact], piped_stdin: Callable[[str], None]
) -> None:
    artifact = serve(FakeArtifact(FakeStream("x")))
    piped_stdin("two\nlines\n")
    assert main(["run", "out", "--raw"]) == 0
    assert artifact.asked[0][0] == "two\nlines"


@pytest.mark.parametrize("text", ["", "\n"])
def test_run_refuses_an_empty_prompt(
    text: str, piped_stdin: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    piped_stdin(text)
    assert main(["run", "out"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_run_prints_one_json_document(
    serve: Callable[[FakeArtifact], FakeArtifact], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(FakeArtifact(FakeStream("hello", " there")))
    assert main(["run", "out", "hi", "--raw", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("seconds") >= 0
    assert document == {
        "prompt": "hi",
        "text": "hello there",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "new_tokens": 2,
    }


def test_conversation_remembers_its_turns_until_the_end_of_input(
    serve: Callable[[FakeArtifact], FakeArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = serve(FakeArtifact(FakeStream("a", "b"), FakeStream("c")))
    monkeypatch.setattr(sys, "stdin", Terminal("one\n\ntwo\n"))
    assert main(["run", "out"]) == 0
    assert [prompt for prompt, _ in artifact.asked] == [
        [{"role": "user", "content": "one"}],
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "two"},
        ],
    ]


def test_interrupted_answer_is_kept_as_far_as_it_came(
    serve: Callable[[FakeArtifact], FakeArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = serve(FakeArtifact(FakeStream("a", KeyboardInterrupt()), FakeStream("c")))
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n"))
    assert main(["run", "out"]) == 0
    chat = artifact.asked[1][0]
    assert isinstance(chat, list)
    assert chat[1] == {"role": "assistant", "content": "a"}


def test_conversation_and_json_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["run", "out", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "--json needs a prompt"


def test_run_without_artifact_exits_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tmp_path / "absent"), "hi"]) == errors.ArtifactError.exit_code
    assert "absent" in capsys.readouterr().err


# --- eval ---


class FakeEvaluation:
    def to_dict(self) -> dict[str, Any]:
        return {"perplexity": 12.5, "kl": None, "top1_agreement": float("nan"), "tokens": 2048}


def test_eval_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def fake(model: str, text: Path | None, **options: Any) -> FakeEvaluation:
        called.update(options, model=model, text=text)
        return FakeEvaluation()

    monkeypatch.setattr("qcompile.compiler.evaluate", fake)
    options = ["--text", "t.txt", "--reference", "ref", "--window", "64", "--max-tokens", "128"]
    options.append("--dequantize")
    assert main(["eval", "out", *options]) == 0
    called.pop("progress")
    assert called == {
        "model": "out",
        "text": Path("t.txt"),
        "reference": "ref",
        "window": 64,
        "max_tokens": 128,
        "dequantize": True,
    }


def test_eval_prints_figures_and_json_without_nan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qcompile.compiler.evaluate", lambda *args, **options: FakeEvaluation())
    assert main(["eval", "out"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "perplexity\t12.5",
        "top1 agreement\tnan",
        "tokens\t2,048",
    ]
    assert main(["eval", "out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=failing(ValueError("not JSON")))
    assert document == {"perplexity": 12.5, "kl": None, "top1_agreement": None, "tokens": 2048}


def test_printed_recipe_is_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "float"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == []
