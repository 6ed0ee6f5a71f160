"""Export a language model for an NPU toolchain, and run the file without qcompile.

    python examples/export_npu.py HuggingFaceTB/SmolLM2-135M-Instruct exported/

Such toolchains take an ONNX file of standard operators with fixed shapes. `export` writes one; all
else here is what a device's own program does with it: it reads the prompt in pieces of as many
tokens as the model takes, and hands the end of the returned cache on to the next call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

QUERY, PAST = 16, 240
"""Tokens that one call reads, and tokens that the cache holds before it."""


def export(model: str, directory: Path) -> Path:
    """The model in int4, one row at a time, for toolchains that know ONNX up to opset 21."""
    import qcompile as qc

    artifact = qc.compile(
        model,
        recipe="w4-rtn",
        target=f"onnx:opset=21:batch=1:query={QUERY}:past={PAST}",
        output=directory,
        overwrite=True,
    )
    return artifact.path / "model.onnx"


def generate(path: Path, prompt: list[int], count: int) -> Iterator[int]:
    """The likeliest `count` tokens after a prompt, by nothing but ONNX Runtime and NumPy."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    cache = {
        value.name: np.zeros(value.shape, np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    mask = np.zeros((1, PAST), np.int64)
    tokens = prompt
    for _ in range(count):
        for start in range(0, len(tokens), QUERY):
            piece = tokens[start : start + QUERY]
            logits, cache, mask = _call(session, piece, cache, mask)
        tokens = [int(logits[0, -1].argmax())]
        yield tokens[0]


def _call(
    session: onnxruntime.InferenceSession,
    tokens: list[int],
    cache: dict[str, np.ndarray],
    mask: np.ndarray,
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """One run: the logits, and the cache and its mask without what only filled the input."""
    fill = QUERY - len(tokens)
    mask = np.concatenate([mask, np.zeros((1, fill), int), np.ones((1, len(tokens)), int)], axis=1)
    inputs = {
        "input_ids": np.array([[0] * fill + tokens]),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -QUERY:],
    }
    taken = {value.name for value in session.get_inputs()}
    feeds = {name: value for name, value in inputs.items() if name in taken} | cache
    logits, *present = session.run(None, feeds)
    kept = np.r_[:PAST, PAST + fill : PAST + QUERY][-PAST:]
    grown = (np.ascontiguousarray(value[:, :, kept]) for value in present)
    return logits, dict(zip(cache, grown, strict=True)), mask[:, kept]


def main() -> None:
    """Exports, generates, and says which operators a toolchain will meet."""
    model, directory = sys.argv[1], Path(sys.argv[2])
    path = export(model, directory)

    import onnx
    import tokenizers

    nodes = onnx.load(path, load_external_data=False).graph.node
    print(f"{path}: {', '.join(sorted({node.op_type for node in nodes}))}")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = tokenizer.encode("The capital of France is").ids
    print(tokenizer.decode(list(generate(path, prompt, 8))))


if __name__ == "__main__":
    main()
