"""`qcompile inspect --sites`: where transforms can go, and why not elsewhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.frontends.tiny_models import raised_tiny_model

from qcompile.cli import main
from qcompile.inspection_records import SiteSummary
from qcompile.inspection_sites import summarize_sites

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint


def sites_of(name: str, place: str) -> list[SiteSummary]:
    found = summarize_sites(raised_tiny_model(name)[1])
    return [site for site in found if site.place == place]


def test_layers_that_are_alike_stand_once() -> None:
    # A shift moves other axes with it than a matrix does, and is a site of its own.
    site, shifted = sites_of("llama", "value / output")
    assert shifted.legal == ()
    assert site.times == 2
    assert site.sources == ("model.layers.[0-1].self_attn.v_proj.weight",)
    assert site.sinks == ("model.layers.[0-1].self_attn.o_proj.weight",)
    assert (site.blocks, site.size) == (2, 8)
    assert {"permutation", "diagonal", "orthogonal"} <= set(site.legal)


def test_residual_stream_says_what_a_rotation_needs() -> None:
    llama, opt = (
        next(site for site in sites_of(name, "residual stream") if "orthogonal" in site.legal)
        for name in ("llama", "opt")
    )
    assert (llama.needs_folded_norms, llama.needs_centred_sources) == (True, False)
    assert (opt.needs_folded_norms, opt.needs_centred_sources) == (True, True)


@pytest.mark.parametrize(
    ("name", "place", "family", "reason"),
    [
        ("olmo2", "residual stream", "orthogonal", "the norm's gain feeds aten.add"),
        ("llama", "query / key", "orthogonal", "a rotary embedding mixes channels in pairs"),
        ("llama", "query / key", "permutation", "a rotary embedding mixes channels in pairs"),
        ("llama-tied", "residual stream", "diagonal", "weighs all channels alike"),
    ],
)
def test_what_is_not_legal_has_its_reason_and_its_node(
    name: str, place: str, family: str, reason: str
) -> None:
    reasons = {
        text: nodes
        for site in sites_of(name, place)
        for text, nodes in site.rejected.get(family, {}).items()
    }
    (found,) = (nodes for text, nodes in reasons.items() if reason in text)
    assert found


def test_command_prints_a_table_and_json(
    tiny_checkpoint: TinyCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint("llama", num_hidden_layers=3))
    assert main(["inspect", model, "--sites"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sites of equivalent transforms\n")
    assert "model.layers.[0-2].mlp.up_proj" in out
    assert "a rotary embedding mixes channels in pairs" in out
    assert "stages:" not in out

    assert main(["inspect", model, "--sites", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    places = {site["place"] for site in document["sites"]}
    assert {"residual stream", "value / output", "up / down", "query / key"} <= places
