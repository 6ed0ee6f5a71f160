"""Verdicts before any compute: every layer named, sizes exact, nothing read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.base import Capabilities, Finding, Packed, Target
from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.cli import main
from qcompile.compiler import capture
from qcompile.compiler import compile as compile_model
from qcompile.errors import RecipeError, TargetError
from qcompile.estimates import estimate
from qcompile.formats import Format, parse_format
from qcompile.inspection_tables import preflight_tables
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore, sources
from qcompile.legality import Preflight, preflight
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import recipe_phases
from qcompile.planning import plan
from qcompile.progress import Progress
from qcompile.recipe import Recipe, load_recipe
from qcompile.tables import format_tables

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

LINEARS = 2 * 7
"""Linear layers of the tiny model, without lm_head."""

REFUSED = "int4-g24"
"""A format that the kernels of the cpu target cannot read: they load 16 weights at a time."""

INSTEAD = "use int4-g32, or leave it float"


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: TinyCheckpoint) -> Program:
    return capture(tiny_checkpoint("llama"))


@pytest.fixture(scope="module")
def tied(tiny_checkpoint: TinyCheckpoint) -> Program:
    return capture(tiny_checkpoint("llama", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def mlp() -> Program:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    return capture(module, torch.randn(3, 32))


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight can be read."""

    def refuse(store: WeightStore, name: str, dtype: torch.dtype | None = None) -> NoReturn:
        raise AssertionError(f"'{name}' was read")

    monkeypatch.setattr(WeightStore, "materialize", refuse)


def weights_recipe(**options: Any) -> Recipe:
    return load_recipe({"steps": [{"quantize_weights": {"format": "int4-g16", **options}}]})


def refused(verdict: Preflight) -> set[str]:
    return {finding.layer for finding in verdict.findings}


class OtherTarget(Target):
    """A target of a few capabilities; the plan that it was given is its lowered program."""

    name = "other"

    def __init__(self, activations: frozenset[str] = frozenset(), error: str = "") -> None:
        self.activations = activations
        self.error = error

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            weight_format=lambda format: None,
            embedding_format=lambda format: "no tables of 8 bits" if "8" in str(format) else None,
            activation_formats=self.activations,
        )

    def check(self, program: Program) -> list[Finding]:
        return []

    def lower(self, program: Program, context: Context) -> Program:
        if self.error:
            raise TargetError(self.error, remedy="another model")
        return program

    def pack(self, program: Program, directory: Path, progress: Progress) -> Packed:
        raise AssertionError("preflight packs nothing")


# --- Legal ---


@pytest.mark.usefixtures("unreadable")
def test_legal_verdict_is_a_table_of_all_layers(llama: Program) -> None:
    verdict = preflight(llama, "w4a8-rtn", "cpu")
    assert verdict.legal
    verdict.refuse()
    assert format_tables(preflight_tables(verdict)[:2]) == (
        "verdict\n"
        f"  model    {llama.provenance.name}\n"
        "  recipe   w4a8-rtn\n"
        "  target   cpu\n"
        "  verdict  legal\n"
        "\n"
        "layers\n"
        "  layer                                       part       shape     weight         inputs "
        "  bits  verdict\n"
        "  model.embed_tokens.weight                   embedding  260 x 32  int8-g64       float  "
        " 8.500  ok\n"
        "  model.layers.[0-1].self_attn.q_proj.weight  linear     32 x 32   int4-g32-asym  int8   "
        " 4.625  ok\n"
        "  model.layers.[0-1].self_attn.k_proj.weight  linear     16 x 32   int4-g32-asym  int8   "
        " 4.625  ok\n"
        "  model.layers.[0-1].self_attn.v_proj.weight  linear     16 x 32   int4-g32-asym  int8   "
        " 4.625  ok\n"
        "  model.layers.[0-1].self_attn.o_proj.weight  linear     32 x 32   int4-g32-asym  int8   "
        " 4.625  ok\n"
        "  model.layers.[0-1].mlp.gate_proj.weight     linear     48 x 32   int4-g32-asym  int8   "
        " 4.625  ok\n"
        "  model.layers.[0-1].mlp.up_proj.weight       linear     48 x 32   int4-g32-asym  int8   "
        " 4.625  ok\n"
        "  model.layers.[0-1].mlp.down_proj.weight     linear     32 x 48   int4-g32-asym  int8   "
        " 4.833  ok\n"
        "  lm_head.weight                              lm_head    260 x 32  int8-g64       int8   "
        " 8.500  ok"
    )


@pytest.mark.parametrize(("name", "recipe"), [("llama", "w4a8-rtn"), ("tied", "float")])
def test_predicted_files_are_those_of_the_artifact(
    name: str, recipe: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program: Program = request.getfixturevalue(name)
    predicted = preflight(program, recipe).estimate
    assert predicted is not None
    assert predicted.exact
    artifact = compile_model(program, recipe, output=tmp_path / "out")
    files = {name: file.bytes for name, file in artifact.manifest.files.items()}
    assert dict(predicted.files) == files
    assert predicted.artifact_bytes == sum(files.values())


def test_planned_program_is_the_compiled_one_without_numbers(tied: Program) -> None:
    recipe = load_recipe("w4a8-rtn")
    planned, _ = plan(tied, recipe)
    compiled, _ = PassManager(recipe_phases(recipe)).run(tied)
    assert planned.text() == compiled.text()
    assert count_bits(planned) == count_bits(compiled)


def test_formats_are_chosen_for_the_weights_that_transforms_leave(tied: Program) -> None:
    """Split layers have formats of their own, and tables that serve two layers may become two."""
    verdict = preflight(tied, "w4a4-resq-rtn", "onnx")
    found = {layer.name: (layer.format, layer.activations) for layer in verdict.layers}
    query = "model.layers.0.self_attn.q_proj"
    assert found[f"{query}.low.weight"] == ("int4-g64", "int4")
    assert found[f"{query}.high.weight"] == ("int8-g64", "int8")
    assert not [warning for warning in verdict.warnings if "matches no weight" in warning]
    steps = [
        {"rotate": {}},
        {"quantize_weights": {"format": "int8", "embedding": "int8", "lm_head": "int4"}},
    ]
    preflight(tied, load_recipe({"steps": steps})).refuse()


TRANSFORMS: dict[str, dict[str, Any]] = {
    "rotate": {"online": ["down_proj", "o_proj"]},
    "quip": {},
    "quip without scales": {"rescale": False},
    "quip by kronecker": {"rotation": "kronecker"},
    "rptq": {"clusters": 4},
    "duquant": {"block_size": 8},
    "spinquant": {"steps": 1},
    "resq": {},
    "resq with keys": {"query_key": True},
}


@pytest.mark.parametrize("model", ["llama", "tied"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_planned_with_all_that_they_leave_in_the_program(
    name: str, model: str, request: pytest.FixtureRequest
) -> None:
    """Nodes and parameters that stay, and tables that no longer serve two layers."""
    program: Program = request.getfixturevalue(model)
    steps = [{name.split()[0]: TRANSFORMS[name]}, {"quantize_weights": {"format": "int8"}}]
    recipe = load_recipe({"name": "transformed", "steps": steps})
    tokens = np.random.default_rng(0).integers(2, 60, (4, 16))
    context = Context(calibration=Calibration(TokenWindows(tokens)))
    compiled, _ = PassManager(recipe_phases(recipe)).run(program, context)
    planned, _ = plan(program, recipe)
    assert planned.text() == compiled.text()
    assert count_bits(planned) == count_bits(compiled)


@pytest.mark.parametrize("name", ["w3-quip-gptq", "w4a4-duquant-rtn", "w4a4-resq-rtn"])
def test_planning_transforms_reads_no_weight(
    name: str, tied: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    materialize = WeightStore.materialize

    def only_parameters(
        store: WeightStore, weight: str, dtype: torch.dtype | None = None
    ) -> Tensor:
        assert not any(sources(store.expression(weight))), f"'{weight}' was read"
        return materialize(store, weight, dtype)

    monkeypatch.setattr(WeightStore, "materialize", only_parameters)
    verdict = preflight(tied, name, "onnx")
    verdict.refuse()
    assert verdict.estimate is not None


def test_layers_that_stay_float_say_why(llama: Program) -> None:
    recipe = weights_recipe(
        ignore=["*.k_proj"], overrides=[{"match": "lm_head", "format": "float"}]
    )
    layers = {layer.name: layer for layer in preflight(llama, recipe).layers}
    key = layers["model.layers.1.self_attn.k_proj.weight"]
    assert (key.format, key.bits_per_weight, key.legal) == ("float32", 32, True)
    assert key.reason == "ignored by pattern '*.k_proj'"
    assert layers["lm_head.weight"].reason == "float by pattern 'lm_head'"
    assert layers["model.embed_tokens.weight"].reason == "the recipe keeps the embedding float"


def test_program_is_not_changed(llama: Program) -> None:
    before = llama.text()
    preflight(llama, "w4a8-rtn")
    assert llama.text() == before


# --- Not legal ---


@pytest.mark.usefixtures("unreadable")
def test_every_layer_of_an_unsupported_format_is_named_with_a_remedy(llama: Program) -> None:
    verdict = preflight(llama, weights_recipe(format=REFUSED, lm_head="int8"))
    assert not verdict.legal
    assert verdict.estimate is None
    assert len(refused(verdict)) == LINEARS
    assert {finding.reason for finding in verdict.findings} == {
        f"{REFUSED}: the cpu kernels read groups of a multiple of 16"
    }
    assert {finding.remedy for finding in verdict.findings} == {INSTEAD}
    assert [layer.name for layer in verdict.layers if layer.legal] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("name", ["int4-g24", "int3-g40-asym-bf16", "int5-g8"])
def test_remedy_is_a_format_that_the_target_runs(name: str, llama: Program) -> None:
    first = preflight(llama, weights_recipe(format=name)).findings[0]
    assert first.remedy is not None
    remedy = first.remedy.removeprefix("use ").removesuffix(", or leave it float")
    assert parse_format(remedy) != parse_format(name)
    assert preflight(llama, weights_recipe(format=remedy)).legal


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("format", "target", "remedy"),
    [
        ("nf4-g24", "cpu", "use nf4-g32, or leave it float"),
        ("nf4-g64", "cuda", "use int4-g64, or leave it float"),
        ("fp8", "cuda", "use int8, or leave it float"),
    ],
)
def test_lookup_format_that_the_target_lacks_has_a_remedy(
    format: str, target: str, remedy: str, llama: Program
) -> None:
    verdict = preflight(llama, weights_recipe(format=format), target)
    assert len(verdict.findings) == 15  # seven layers in two blocks, and the head
    assert {finding.remedy for finding in verdict.findings} == {remedy}
    assert all(finding.reason.startswith(f"{format}: ") for finding in verdict.findings)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("format", ["ternary-g16", "nf4-g16-dq", "fp8", "mxfp4", "nvfp4"])
def test_lookup_formats_are_legal_on_the_cpu(format: str, llama: Program) -> None:
    verdict = preflight(llama, weights_recipe(format=format), "cpu")
    verdict.refuse()
    assert format in {layer.format for layer in verdict.layers}


@pytest.mark.usefixtures("unreadable")
def test_tied_weight_with_two_formats_stands_in_the_way(tied: Program) -> None:
    verdict = preflight(tied, weights_recipe(embedding="int8", lm_head="int4"))
    (finding,) = verdict.findings
    assert finding.layer == "model.embed_tokens.weight"
    assert "two formats: int8 and int4" in finding.reason
    assert finding.remedy == "give embedding and lm_head the same format, or leave one of them out"


def test_embedding_and_linear_are_judged_apart(llama: Program) -> None:
    verdict = preflight(llama, weights_recipe(format="int8", embedding="int8"), OtherTarget())
    assert refused(verdict) == {"model.embed_tokens.weight"}
    (finding,) = verdict.findings
    assert finding.reason == "int8: no tables of 8 bits"
    assert finding.remedy == "use int7, or leave it float"


def test_tied_weight_must_be_legal_as_table_and_as_layer(tied: Program) -> None:
    verdict = preflight(tied, weights_recipe(format="int8"), OtherTarget())
    assert refused(verdict) == {"model.embed_tokens.weight"}


def test_unsupported_activations_name_every_layer_that_has_them(llama: Program) -> None:
    recipe = "w4a8-rtn"
    verdict = preflight(llama, recipe, OtherTarget())
    about = [f for f in verdict.findings if "activations" in f.reason]
    assert len(about) == LINEARS + 1  # lm_head
    assert about[0].reason == "the other target has no int8 activations"
    assert about[0].remedy == "leave the step out"
    allowed = preflight(llama, recipe, OtherTarget(frozenset({"int8"})))
    assert refused(allowed) == {"model.embed_tokens.weight"}


@pytest.mark.usefixtures("unreadable")
def test_activations_are_judged_layer_by_layer(llama: Program) -> None:
    rounding = {
        "ignore": ["lm_head"],
        "overrides": [
            {"match": "*down_proj*", "format": "fp8"},
            {"match": "*lm_head*", "format": "int4"},
        ],
    }
    steps = [{"quantize_weights": {"format": "int8"}}, {"quantize_activations": rounding}]
    recipe = load_recipe({"name": "mixed", "steps": steps})
    verdict = preflight(llama, recipe, "cuda")
    assert refused(verdict) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert {f.reason for f in verdict.findings} == {"the cuda target has no e4m3 activations"}
    rounded = {layer.activations for layer in preflight(llama, recipe, "cpu").layers}
    assert rounded == {"e4m3", "float", "int8"}


def test_shape_that_a_format_refuses_is_a_finding(
    mlp: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(format: Format, shape: tuple[int, ...]) -> NoReturn:
        raise RecipeError(f"rows of {shape[-1]} are no multiple of 7")

    monkeypatch.setattr("qcompile.formats.integer.IntegerFormat.tensors", refuse)
    findings = preflight(mlp, weights_recipe()).findings
    assert [(finding.layer, finding.reason) for finding in findings] == [
        ("0.weight", "rows of 32 are no multiple of 7"),
        ("2.weight", "rows of 48 are no multiple of 7"),
    ]
    assert findings[0].remedy == "leave it float: 'ignore' it in quantize_weights"


def test_what_lowering_refuses_is_a_finding(mlp: Program) -> None:
    verdict = preflight(mlp, weights_recipe(), OtherTarget(error="too odd"))
    assert verdict.findings == (Finding("Sequential", "too odd", "another model"),)


def test_operator_that_the_target_lacks_is_a_finding() -> None:
    class Inverse(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(torch.relu(x))

    verdict = preflight(capture(Inverse(), torch.eye(4)), "float")
    assert not verdict.legal
    assert any("linalg_inv" in finding.reason for finding in verdict.findings)


@pytest.mark.usefixtures("unreadable")
def test_compile_refuses_before_any_compute_and_names_all_layers(
    llama: Program, tmp_path: Path
) -> None:
    with pytest.raises(TargetError) as caught:
        compile_model(llama, weights_recipe(format=REFUSED), output=tmp_path / "out")
    message = str(caught.value)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert f"{part}.weight" in message
    assert "[0-1]" in message
    assert "lm_head.weight" in message
    assert INSTEAD in message
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_is_an_error_of_the_recipe(mlp: Program) -> None:
    with pytest.raises(RecipeError, match="no recipe named 'w5'"):
        preflight(mlp, "w5")


# --- Remarks ---


def test_patterns_without_a_match_are_warned_of(llama: Program) -> None:
    recipe = weights_recipe(ignore=["*.attn"], overrides=[{"match": "h.*", "format": "float"}])
    assert preflight(llama, recipe).warnings == (
        "the pattern '*.attn' of quantize_weights matches no weight",
        "the pattern 'h.*' of quantize_weights matches no weight",
    )


def test_groups_wider_than_a_layer_are_warned_of(mlp: Program) -> None:
    recipe = weights_recipe(format="int4-g48")
    (warning,) = preflight(mlp, recipe).warnings
    assert warning == "0.weight is narrower than its group: it has one group per row"


def test_recipe_that_quantizes_nothing_is_warned_of(mlp: Program) -> None:
    assert preflight(mlp, weights_recipe(ignore=["*"])).warnings == (
        "the recipe quantizes no weight of this model",
    )
    assert preflight(mlp, "float").warnings == ()


def test_model_without_cache_is_noted(mlp: Program, llama: Program) -> None:
    (note,) = preflight(mlp, "w8-rtn").notes
    assert "keeps no cache" in note
    assert not any("cache" in note for note in preflight(llama, "w8-rtn").notes)


# --- Estimates ---


def test_estimates_grow_with_the_work(llama: Program, mlp: Program) -> None:
    large, small, float_only, searched = (
        preflight(program, recipe).estimate
        for program, recipe in [
            (llama, weights_recipe()),
            (mlp, weights_recipe()),
            (llama, load_recipe("float")),
            (llama, weights_recipe(scale_search="mse")),
        ]
    )
    assert large is not None
    assert small is not None
    assert float_only is not None
    assert searched is not None
    assert large.peak_memory_bytes > small.peak_memory_bytes
    assert large.total_seconds > small.total_seconds
    assert searched.seconds["quantize"] > large.seconds["quantize"] > 0
    assert float_only.seconds["quantize"] == 0


def test_codes_of_all_weights_are_kept_in_memory(llama: Program) -> None:
    recipe = weights_recipe(format="int4", embedding="int4")
    planned, _ = plan(llama, recipe)
    bits = count_bits(planned)
    quantized, plain = (
        estimate(llama, program, recipe, bits=bits, files=None).peak_memory_bytes
        for program in (planned, llama)
    )
    codes = sum(
        tensor.weights + tensor.scale_bits // 8 for tensor in bits.tensors if tensor.quantized
    )
    assert quantized - plain == codes


def test_size_of_a_target_that_cannot_tell_is_that_of_the_bits(mlp: Program) -> None:
    predicted = preflight(mlp, weights_recipe(), OtherTarget()).estimate
    assert predicted is not None
    assert not predicted.exact
    planned, _ = plan(mlp, weights_recipe())
    assert predicted.artifact_bytes == count_bits(planned).bytes


# --- The command ---


@pytest.fixture
def captured(llama: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.compiler.capture", lambda model, dequantize=False: llama)


@pytest.mark.usefixtures("captured", "unreadable")
def test_check_of_a_legal_compilation_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "model", "--recipe", "w8-rtn"]) == 0
    out = capsys.readouterr().out
    assert "  verdict  legal\n" in out
    assert "(exact)\n" in out
    assert "(estimate)\n" in out


@pytest.mark.usefixtures("captured", "unreadable")
def test_check_of_an_illegal_compilation_exits_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "model", "--set", f"quantize_weights.format={REFUSED}"]) == 4
    out = capsys.readouterr().out
    assert "  verdict  not legal\n" in out
    assert "what stands in the way\n" in out
    assert f"{INSTEAD}\n" in out
    assert "prediction" not in out


@pytest.mark.usefixtures("captured", "unreadable")
@pytest.mark.parametrize(("format", "code"), [("int4", 0), (REFUSED, 4)])
def test_check_prints_one_document_whatever_the_verdict(
    format: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "m", "--json", "--set", f"quantize_weights.format={format}"]) == code
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "schema_version",
        "model",
        "recipe",
        "target",
        "legal",
        "findings",
        "warnings",
        "notes",
        "layers",
        "estimate",
    ]
    assert document["legal"] is (code == 0)
    assert len(document["layers"]) == LINEARS + 2
    assert (document["estimate"] is None) == bool(document["findings"])


def test_check_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    assert "Example: qcompile check " in capsys.readouterr().out
