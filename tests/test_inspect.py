"""What `inspect` finds in models and artifacts, and how commands show it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from qcompile.analysis.cost import Cost, Sizes
from qcompile.artifact_inspection import ArtifactInspection
from qcompile.backends.registry import get_target
from qcompile.cli import main
from qcompile.compiler import open_model
from qcompile.errors import RecipeError
from qcompile.inspection import inspect
from qcompile.inspection_records import (
    Barrier,
    Inspection,
    PhaseSummary,
    PortSummary,
    StageSummary,
)
from qcompile.inspection_tables import artifact_tables, count_text, inspection_tables
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore
from qcompile.manifest import Manifest
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import front_phases, recipe_phases
from qcompile.recipe import load_recipe
from qcompile.tables import format_tables

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

RECIPE = "w4a8-rtn"
PHASES = ("capture", "canonicalize", "raise", "quantize_weights", "quantize_activations", "lower")


@pytest.fixture(scope="module")
def captured(tiny_checkpoint: TinyCheckpoint) -> Program:
    """A tiny model before any pass."""
    return open_model(tiny_checkpoint("llama", num_hidden_layers=3), None, False)


@pytest.fixture(scope="module")
def inspection(captured: Program) -> Inspection:
    found = inspect(captured, RECIPE, texts=["all"])
    assert isinstance(found, Inspection)
    return found


def inspect_module(module: nn.Module, *inputs: Tensor) -> Inspection:
    found = inspect(module, example_inputs=inputs)
    assert isinstance(found, Inspection)
    return found


# --- Phases ---


def test_phases_are_those_of_a_compilation(inspection: Inspection) -> None:
    assert tuple(phase.name for phase in inspection.phases) == PHASES


def test_operators_are_counted_after_each_phase(inspection: Inspection) -> None:
    phases = {phase.name: phase.operators for phase in inspection.phases}
    linears, attentions, norms = 3 * 7 + 1, 3, 3 * 2 + 1
    assert phases["capture"]["aten.linear"] == linears
    assert phases["raise"]["qc.attention"] == attentions
    assert phases["raise"]["qc.rms_norm"] == norms
    assert "aten.rsqrt" not in phases["raise"]
    assert phases["quantize_weights"]["qc.dequantize"] == linears + 1  # the embedding
    # Query, key and value are one node, and so are gate and up; the others stand alone.
    assert phases["lower"]["qc.cpu_linears"] == attentions
    assert phases["lower"]["qc.cpu_gated_linear"] == attentions
    assert phases["lower"]["qc.cpu_linear"] == linears - 5 * attentions
    assert "qc.dequantize" not in phases["lower"]


def test_texts_are_those_of_the_compiled_program(captured: Program, inspection: Inspection) -> None:
    expected: dict[str, str] = {}

    def keep(name: str, program: Program) -> None:
        expected[name] = program.text()

    keep("capture", captured)
    phases = (*front_phases(), *recipe_phases(load_recipe(RECIPE)))
    compiled, _ = PassManager(phases, on_phase=keep).run(captured)
    keep("lower", get_target("cpu").lower(compiled, Context()))
    assert {phase.name: phase.text for phase in inspection.phases} == expected


def test_no_weight_is_read(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    read = WeightStore.materialize
    buffers = {"model.rotary_emb.inv_freq"}  # computed by the model, in no checkpoint

    def refuse(store: WeightStore, name: str, dtype: torch.dtype | None = None) -> Tensor:
        assert name in buffers
        return read(store, name, dtype)

    assert buffers < set(captured.weights)
    monkeypatch.setattr(WeightStore, "materialize", refuse)
    found = inspect(captured, RECIPE)
    assert isinstance(found, Inspection)
    assert len(found.phases) == len(PHASES)


def test_without_recipe_the_program_is_raised_and_stays_float(captured: Program) -> None:
    found = inspect(captured, texts=["raise"])
    assert isinstance(found, Inspection)
    assert [phase.name for phase in found.phases] == list(PHASES[:3])
    assert [phase.text is not None for phase in found.phases] == [False, False, True]
    assert (found.recipe, found.target) == (None, None)
    assert found.weight_bytes == 4 * found.parameters


def test_unknown_phase_is_refused_before_the_model_is_opened() -> None:
    with pytest.raises(RecipeError, match="no phase 'rise'") as caught:
        inspect("nowhere", texts=["rise"])
    assert "did you mean 'raise'?" in str(caught.value.remedy)


def test_recipe_that_the_target_refuses_leaves_a_note(captured: Program) -> None:
    found = inspect(captured, RECIPE, overrides={"quantize_weights.format": "int4-g24"})
    assert isinstance(found, Inspection)
    assert [phase.name for phase in found.phases] == list(PHASES[:-1])
    assert any("multiple of 16" in note for note in found.notes)


# --- Stages ---


def test_repeated_blocks_are_one_line(inspection: Inspection) -> None:
    assert inspection.blocks == 3
    blocks = [stage for stage in inspection.stages if len(stage.stages) > 1]
    assert [(stage.name, len(stage.stages)) for stage in blocks] == [("model.layers.[0-2]", 3)]
    assert blocks[0].operators["qc.attention"] == 1


def test_stages_add_up_to_the_model(inspection: Inspection) -> None:
    def total(values: list[tuple[int, int]]) -> int:
        return sum(times * value for times, value in values)

    times = [len(stage.stages) for stage in inspection.stages]
    weights = [stage.weights for stage in inspection.stages]
    stored = [stage.weight_bytes for stage in inspection.stages]
    assert total(list(zip(times, weights, strict=True))) == inspection.parameters
    assert total(list(zip(times, stored, strict=True))) == inspection.weight_bytes
    for name, whole in inspection.totals.items():
        costs = [stage.costs[name] for stage in inspection.stages]
        assert total(list(zip(times, (c.flops for c in costs), strict=True))) == whole.flops
        cache = [cost.cache_bytes for cost in costs]
        assert total(list(zip(times, cache, strict=True))) == whole.cache_bytes
        assert max(cost.activation_bytes for cost in costs) == whole.activation_bytes


def test_weights_take_what_the_recipe_stores(captured: Program, inspection: Inspection) -> None:
    phases = (*front_phases(), *recipe_phases(load_recipe(RECIPE)))
    compiled, _ = PassManager(phases).run(captured)
    bits = count_bits(compiled)
    slack = len(bits.tensors)  # each tensor is rounded up to a byte
    assert bits.bytes <= inspection.weight_bytes <= bits.bytes + slack


def test_shared_weight_is_counted_once(tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama", num_hidden_layers=1, tie_word_embeddings=True)
    found = inspect(model)
    assert isinstance(found, Inspection)
    assert sum(len(s.stages) * s.weights for s in found.stages) == found.parameters


def test_workloads_are_prefill_and_decode_or_those_asked_for(
    captured: Program, inspection: Inspection
) -> None:
    assert inspection.workloads == {"prefill": Sizes(1, 512, 0), "decode": Sizes(1, 1, 512)}
    asked = inspect(captured, workloads={"big": Sizes(4, 8, 16)})
    assert isinstance(asked, Inspection)
    assert list(asked.totals) == ["big"]
    assert asked.totals["big"].cache_bytes == 3 * 2 * 4 * 2 * (8 + 16) * 8 * 4


def test_inputs_and_outputs_name_their_sizes(inspection: Inspection) -> None:
    inputs = {port.name: port for port in inspection.inputs}
    assert inputs["input_ids"].shape == ("batch", "query")
    assert inputs["past_key_values.1.key"].shape == ("batch", 2, "past", 8)
    outputs = {port.name: port for port in inspection.outputs}
    assert outputs["logits"].shape == ("batch", "query", 260)
    assert outputs["present.1.key"].shape == ("batch", 2, "past + query", 8)


# --- Barriers ---


def test_model_that_is_raised_has_no_barriers(inspection: Inspection) -> None:
    assert inspection.barriers == ()


def test_what_is_not_recognized_is_named_with_its_reason() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.score(x), dim=-1)

    (barrier,) = inspect_module(Gate(), torch.randn(3, 8)).barriers
    assert (barrier.operator, barrier.reason) == ("aten.softmax", "a softmax that is no attention")
    assert barrier.stage == "score"


def test_what_the_target_cannot_run_is_a_barrier() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(torch.relu(x))

    found = inspect(Inverse(), "float", example_inputs=torch.eye(4))
    assert isinstance(found, Inspection)
    assert found.barriers
    assert {barrier.stage for barrier in found.barriers} == {"stage 0"}
    assert any("linalg_inv" in barrier.operator for barrier in found.barriers)
    assert all(barrier.reason for barrier in found.barriers)


# --- Tables ---

EXAMPLE = Inspection(
    model="tiny",
    architecture="TinyForCausalLM",
    source="models/tiny",
    parameters=1_234_567,
    checkpoint_bytes=2_469_134,
    blocks=3,
    recipe="w4",
    target="cpu",
    inputs=(
        PortSummary("input_ids", "input_ids", "int64", ("batch", "query")),
        PortSummary("past.0.key", "past_key", "float32", ("batch", 2, "past", 8)),
        PortSummary("past.1.key", "past_key", "float32", ("batch", 2, "past", 8)),
    ),
    outputs=(PortSummary("logits", "logits", "float32", ("batch", "query", 260)),),
    workloads={"prefill": Sizes(1, 512, 0)},
    totals={"prefill": Cost(5_500_000_000, 2_048, 8_192)},
    weight_bytes=700_000,
    phases=(
        PhaseSummary("capture", 12, {"aten.linear": 3, "aten.rsqrt": 10}),
        PhaseSummary("raise", 5, {"aten.linear": 3, "qc.rms_norm": 10}),
    ),
    stages=(
        StageSummary("embed", (0,), {}, 1_000, 4_000, {"prefill": Cost(0, 512, 0)}),
        StageSummary("l.[0-2]", (1, 2, 3), {}, 9_999, 5_000, {"prefill": Cost(2_000, 2_048, 64)}),
    ),
    barriers=(
        Barrier("softmax", "aten.softmax", "l.[0-2]", "no attention"),
        Barrier("softmax_1", "aten.softmax", "l.[0-2]", "no attention"),
    ),
    notes=("the head is tied",),
)


def test_tables_of_a_model_are_aligned_text() -> None:
    assert format_tables(inspection_tables(EXAMPLE)) == (
        "model\n"
        "  name             tiny\n"
        "  architecture     TinyForCausalLM\n"
        "  source           models/tiny\n"
        "  parameters       1.2 M\n"
        "  repeated blocks  3\n"
        "  recipe           w4\n"
        "  target           cpu\n"
        "  weights stored   700.0 kB\n"
        "  prefill          batch 1, query 512, past 0: 5.5 G operations, 2.0 kB activations,"
        " 8.2 kB cache\n"
        "  note             the head is tied\n"
        "\n"
        "inputs\n"
        "  name            role       type\n"
        "  input_ids       input_ids  int64[batch, query]\n"
        "  past.[0-1].key  past_key   float32[batch, 2, past, 8]\n"
        "\n"
        "outputs\n"
        "  name    role    type\n"
        "  logits  logits  float32[batch, query, 260]\n"
        "\n"
        "operators after each phase\n"
        "  operator     capture  raise\n"
        "  aten.linear        3      3\n"
        "  aten.rsqrt        10      -\n"
        "  qc.rms_norm        -     10\n"
        "  all               13     13\n"
        "\n"
        "stages: memory and operations of each\n"
        "  stage    times  weights  stored  prefill ops  prefill act.  prefill cache\n"
        "  embed      1 x    1.0 k  4.0 kB            0         512 B            0 B\n"
        "  l.[0-2]    3 x   10.0 k  5.0 kB        2.0 k        2.0 kB           64 B\n"
        "\n"
        "barriers\n"
        "  operator      times  first             reason\n"
        "  aten.softmax    2 x  l.[0-2]: softmax  no attention"
    )


def test_sections_and_phases_can_be_chosen() -> None:
    tables = inspection_tables(replace(EXAMPLE, barriers=()), ["barriers", "ops"], ["raise"])
    assert format_tables(tables) == (
        "operators after each phase\n"
        "  operator     raise\n"
        "  aten.linear      3\n"
        "  qc.rms_norm     10\n"
        "  all             13\n"
        "\n"
        "barriers: none"
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (134_515_008, "134.5 M"), (2e13, "20.0 T")]
)
def test_counts_are_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert count_text(count) == text


# --- Artifacts and the command ---


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    manifest = {
        "schema_version": 1,
        "qcompile_version": "0.1.0",
        "target": "cpu",
        "task": "causal_lm",
        "model": {"name": "tiny", "architecture": "Tiny", "source": "here", "fingerprint": ""},
        "recipe": {"name": "w4"},
        "signature": {
            "inputs": [
                {
                    "name": "input_ids",
                    "dtype": "int64",
                    "shape": ["batch", "query"],
                    "role": "input_ids",
                }
            ],
            "outputs": [],
        },
        "bits": {"stored_bits_per_weight": 4.625, "weights": 32},
        "files": {"model.onnx": {"sha256": "0" * 64, "bytes": 1500}},
    }
    assert Manifest.model_validate(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def opened(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model a command names is the tiny one."""
    monkeypatch.setattr("qcompile.inspection.open_model", lambda *arguments: captured)


def test_artifact_is_shown_by_its_manifest(artifact: Path) -> None:
    found = inspect(artifact)
    assert isinstance(found, ArtifactInspection)
    assert found.bytes == 1500
    assert format_tables(artifact_tables(found)) == (
        "artifact\n"
        "  model                   tiny\n"
        "  architecture            Tiny\n"
        "  target                  cpu\n"
        "  task                    causal_lm\n"
        "  recipe                  w4\n"
        "  qcompile version        0.1.0\n"
        "  size                    1.5 kB\n"
        "  stored bits per weight  4.625\n"
        "\n"
        "inputs\n"
        "  name       role       type\n"
        "  input_ids  input_ids  int64[batch, query]\n"
        "\n"
        "outputs\n"
        "  name  role  type\n"
        "\n"
        "files\n"
        "  name          size\n"
        "  model.onnx  1.5 kB"
    )


def test_inspect_artifact_as_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["bytes"]) == ("artifact", 1500)
    assert document["manifest"]["model"]["name"] == "tiny"


def test_artifact_has_no_phases(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact), "--text"]) == 6
    assert "has no phases" in capsys.readouterr().err


@pytest.mark.usefixtures("opened")
def test_inspect_shows_the_sections_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model", "--stages", "--barriers", "--query", "7", "--past", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stages: memory and operations of each\n")
    assert "run ops" in out
    assert out.endswith("\nbarriers: none\n")
    assert "operators after" not in out


@pytest.mark.usefixtures("opened")
def test_inspect_prints_the_text_after_a_phase(
    capsys: pytest.CaptureFixture[str], inspection: Inspection
) -> None:
    texts = {phase.name: phase.text for phase in inspection.phases}
    assert main(["inspect", "model", "--phase", "raise", "--text"]) == 0
    assert capsys.readouterr().out == texts["raise"]
    assert main(["inspect", "model", "--recipe", RECIPE, "--text"]) == 0
    assert capsys.readouterr().out == texts["lower"]


@pytest.mark.usefixtures("opened")
def test_inspect_writes_a_file_per_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inspection: Inspection
) -> None:
    output = tmp_path / "dump"
    assert main(["inspect", "m", "-r", RECIPE, "--phase", "all", "-o", str(output)]) == 0
    assert capsys.readouterr().out == ""
    written = {path.stem: path.read_text() for path in output.iterdir()}
    assert written == {phase.name: phase.text for phase in inspection.phases}


@pytest.mark.usefixtures("opened")
def test_inspect_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model", "--recipe", RECIPE, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "schema_version",
        "kind",
        "model",
        "architecture",
        "source",
        "parameters",
        "checkpoint_bytes",
        "blocks",
        "recipe",
        "target",
        "inputs",
        "outputs",
        "workloads",
        "totals",
        "weight_bytes",
        "phases",
        "stages",
        "barriers",
        "notes",
        "sites",
    ]
    assert document["sites"] is None
    assert document["phases"][2]["operators"]["qc.attention"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "rise"], "there is no phase 'rise'"),
        (["--phase", "lower"], "there is no phase 'lower'"),
        (["--set", "quantize_weights.format=int8"], "--set needs a recipe"),
    ],
)
def test_wrong_usage_is_said_before_the_model_is_opened(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_text_that_cannot_be_written_is_said(
    tmp_path: Path, opened: None, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["inspect", "model", "-o", str(blocked)]) == 6
    assert f"cannot write to '{blocked}'" in capsys.readouterr().err


def test_inspect_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help"]) == 0
    assert "Example: qcompile inspect " in capsys.readouterr().out
