"""Adds rows of other projects' packages to the accuracy table: same data, same bits, same scorer.

Each peer quantizes with its own package, in an environment of its own, and leaves its decoded
weights; they take the place of the float ones in the program that `accuracy.py` scores.

    python -m venv peers
    peers/bin/pip install torch transformers gguf llmcompressor hqq auto-round
    python benchmarks/peers.py --python peers/bin/python --text valid.txt
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from accuracy import add_protocol_arguments, fill_defaults, protocol_of
from accuracy_results import Measured, Results, cells, digest, tables
from accuracy_rows import SETTINGS
from safetensors.torch import load_file
from scoring import Scorer

from qcompile.calibration.samples import TokenWindows
from qcompile.passes.quantize.layers import Part, layer_weights
from qcompile.tables import print_tables

WIDTHS = {"w4": (4, 0), "w4-g64": (4, 64), "w3-g64": (3, 64), "w2-g64": (2, 64)}
"""Bits and group of each setting; a group of 0 is a row."""


@dataclass(frozen=True)
class Peer:
    """A method of another package.

    Attributes:
        package: Where it comes from.
        zero_point_bits: Stored per group beside a float16 scale; None: as wide as the codes.
    """

    package: str
    zero_point_bits: int | None = 0


PEERS = {
    "gptq": Peer("llmcompressor"),
    "hqq": Peer("hqq", 16),
    "autoround": Peer("auto-round"),
    "awq": Peer("llmcompressor", None),
}


def measure(options: argparse.Namespace, scorer: Scorer, name: str, setting: str) -> Measured:
    """Runs a peer in its environment and scores what it leaves."""
    bits, group = WIDTHS[setting]
    with TemporaryDirectory() as folder:
        data = scorer.calibration()(scorer.program)
        assert isinstance(data, TokenWindows)
        np.save(Path(folder) / "tokens.npy", data.tokens)
        command = [str(options.python), str(Path(__file__).with_name("peers_run.py")), name]
        command += ["--model", options.model, "--tokens", f"{folder}/tokens.npy", "--out", folder]
        command += ["--bits", str(bits), "--group", str(group)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        facts = json.loads((Path(folder) / "facts.json").read_text(encoding="utf-8"))
        quantized = scorer.with_weights(load_file(Path(folder) / "weights.safetensors"))
        found = scorer.score(quantized)
    return Measured(
        f"{PEERS[name].package}: {name}",
        setting,
        f"int{bits}" + (f"-g{group}" if group else ""),
        stored_bits(scorer, PEERS[name], bits, group),
        found.perplexity,
        found.kl or 0.0,
        found.top1_agreement or 0.0,
        found.reference_perplexity or 0.0,
        **facts,
        made_by=made_by(options, name, setting),
    )


def stored_bits(scorer: Scorer, peer: Peer, bits: int, group: int) -> float:
    """Per weight of linears: codes, a float16 scale per group, and its zero point."""
    zero_point = bits if peer.zero_point_bits is None else peer.zero_point_bits
    total = weights = 0
    for weight in layer_weights(scorer.program)[0]:
        if weight.parts == {Part.LINEAR}:
            rows, columns = scorer.program.weights.spec(weight.name).shape
            groups = -(-columns // group) if group else 1
            total += rows * (columns * bits + groups * (16 + zero_point))
            weights += rows * columns
    return total / weights


def made_by(options: argparse.Namespace, name: str, setting: str) -> str:
    """Hash of the package's version and of what it is asked for."""
    package = PEERS[name].package
    query = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = subprocess.run(
        [str(options.python), "-c", query], check=True, stdout=subprocess.PIPE, text=True
    )
    return digest([package, found.stdout.strip(), WIDTHS[setting]])


def main() -> None:
    """Measures every peer that was asked for and prints the table with all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_protocol_arguments(parser)
    parser.add_argument("--python", type=Path, required=True, help="of the peers' environment")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    options = fill_defaults(parser.parse_args())
    if options.blocks is not None:
        parser.error("peers quantize whole models: leave --blocks out")
    protocol = protocol_of(options)
    results = Results(options.output, protocol.identity)
    scorer = Scorer(protocol, options.kept)
    for name in options.only:
        for setting in options.settings:
            row = f"{PEERS[name].package}: {name}"
            if results.find(row, setting, made_by(options, name, setting)) is None:
                results.add(measured := measure(options, scorer, name, setting))
                print(setting, *cells(measured), file=sys.stderr, flush=True)
    if options.json:
        print(options.output.read_text(encoding="utf-8"))
    else:
        print_tables(list(tables(results.rows(), dict(SETTINGS))))


if __name__ == "__main__":
    main()
