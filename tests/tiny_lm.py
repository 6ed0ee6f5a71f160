"""A tiny language model as an artifact, and the same model in NumPy.

One attention layer over token and position embeddings, written with standard ONNX operators only:
what the runtime does with caches, masks and positions can be compared number by number.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper

from qcompile.manifest import (
    GenerationInfo,
    Manifest,
    ModelInfo,
    Signature,
    ValueInfo,
    describe_files,
    write_manifest,
)

WIDTH = 8
POSITIONS = 256
VOCABULARY = 260  # four special tokens, then the 256 bytes
BOS, EOS, PAD, TURN = 0, 1, 2, 3
TEMPLATE = (
    "{% for message in messages %}<turn>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model:{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """The weights; `logits` is the reference."""

    tokens: np.ndarray
    positions: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    head: np.ndarray

    @classmethod
    def random(cls, seed: int = 0) -> TinyModel:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return (0.5 * rng.standard_normal(shape)).astype(np.float32)

        return cls(
            draw(VOCABULARY, WIDTH),
            draw(POSITIONS, WIDTH),
            *(draw(WIDTH, WIDTH) for _ in range(3)),
            draw(WIDTH, VOCABULARY),
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits ``[tokens, vocabulary]`` of one text."""
        x = self.tokens[ids] + self.positions[: len(ids)]
        scores = (x @ self.query) @ (x @ self.key).T
        scores[np.triu_indices(len(ids), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ (x @ self.value)
        return np.asarray((x + attended) @ self.head)

    def greedy(self, prompt: list[int], count: int, stop: tuple[int, ...] = (EOS,)) -> list[int]:
        """The likeliest continuation, one full run per token."""
        ids = list(prompt)
        while len(ids) < len(prompt) + count and (ids == prompt or ids[-1] not in stop):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def write_artifact(
    directory: Path,
    model: TinyModel | None = None,
    *,
    cache: bool = True,
    mask: bool = True,
    max_context: int | None = POSITIONS,
    tokenizer: bool = True,
    template: bool = True,
) -> Path:
    """Write the model as an artifact with a byte tokenizer."""
    directory.mkdir(exist_ok=True)
    signature = write_onnx(directory / "model.onnx", model or TinyModel.random(), cache, mask)
    if tokenizer:
        byte_tokenizer().save(str(directory / "tokenizer.json"))
        config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    save_manifest(
        directory,
        signature,
        GenerationInfo(
            eos_token_ids=(EOS,), bos_token_id=BOS, pad_token_id=PAD, max_context=max_context
        ),
    )
    return directory


def save_manifest(
    directory: Path, signature: Signature, generation: GenerationInfo, task: str = "causal_lm"
) -> None:
    write_manifest(
        directory,
        Manifest.model_validate(
            {
                "qcompile_version": "0.1.0",
                "target": "cpu",
                "task": task,
                "model": ModelInfo(name="tiny", architecture="Tiny", source="here", fingerprint=""),
                "signature": signature,
                "generation": generation,
                "files": describe_files(directory),
            }
        ),
    )


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte after four special ones; tokens 4 to 259 are the bytes."""
    alphabet = byte_alphabet()
    vocabulary = {token: index for index, token in enumerate(["<bos>", "<eos>", "<pad>", "<turn>"])}
    vocabulary |= {alphabet[byte]: 4 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>", "<turn>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def write_onnx(path: Path, model: TinyModel, cache: bool, mask: bool) -> Signature:
    """The graph: `cache` adds an appended cache, without `mask` every token is attended to."""
    assert mask or not cache
    graph = _Graph(model)
    add = graph.add
    batch = ["batch", "query"]
    graph.input("input_ids", "int64", batch, "input_ids")
    graph.input("position_ids", "int64", batch, "position_ids")
    graph.input("logit_positions", "int64", ["n"], "logit_positions")
    if mask:
        graph.input("attention_mask", "int64", ["batch", "total"], "attention_mask")
    embedded = add("Gather", "tokens", "input_ids"), add("Gather", "positions", "position_ids")
    x = add("Add", *embedded)
    query, key, value = (add("MatMul", x, name) for name in ("query", "key", "value"))
    count = add("Shape", "input_ids", start=1, end=2)
    total = add("Shape", "attention_mask", start=1, end=2) if mask else count
    past = add("Sub", total, count)
    rows = add("Add", graph.range(count), past)  # where each query stands among all tokens
    if cache:
        key, value = (
            graph.append(kind, new, rows, total) for kind, new in (("key", key), ("value", value))
        )
    scores = add("MatMul", query, add("Transpose", key, perm=[0, 2, 1]))
    columns = graph.range(total)
    allowed = add("LessOrEqual", columns, add("Unsqueeze", rows, graph.const([1])))
    if mask:
        attend = add("Cast", "attention_mask", to=TensorProto.BOOL)
        allowed = add("And", allowed, add("Unsqueeze", attend, graph.const([1])))
    scores = add("Where", allowed, scores, graph.const(-1e30, np.float32))
    attended = add("MatMul", add("Softmax", scores, axis=-1), value)
    last = add("Gather", add("Add", x, attended), "logit_positions", axis=1)
    graph.output(add("MatMul", last, "head", name="logits"), ["batch", "n", VOCABULARY], "logits")
    return graph.save(path)


class _Graph:
    def __init__(self, model: TinyModel) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = [
            numpy_helper.from_array(weight, name) for name, weight in vars(model).items()
        ]
        self.inputs: list[ValueInfo] = []
        self.outputs: list[ValueInfo] = []

    def input(self, name: str, dtype: str, shape: list[int | str], role: str) -> None:
        layer = 0 if role.startswith("past") else None
        self.inputs.append(
            ValueInfo.model_validate(
                {"name": name, "dtype": dtype, "shape": shape, "role": role, "layer": layer}
            )
        )

    def output(self, name: str, shape: list[int | str], role: str) -> None:
        layer = 0 if role.startswith("present") else None
        self.outputs.append(
            ValueInfo.model_validate(
                {"name": name, "dtype": "float32", "shape": shape, "role": role, "layer": layer}
            )
        )

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes: object) -> str:
        name = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def const(self, value: object, dtype: type = np.int64) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def range(self, length: str) -> str:
        scalar = self.add("Squeeze", length)
        return self.add("Range", self.const(0), scalar, self.const(1))

    def append(self, kind: str, new: str, rows: str, total: str) -> str:
        """Write `new` [batch, query, width] at `rows` of a cache; the part that is filled."""
        shape: list[int | str] = ["batch", 1, "capacity", WIDTH]
        past, present = f"past_key_values.0.{kind}", f"present.0.{kind}"
        self.input(past, "float32", shape, f"past_{kind}")
        new = self.add("Unsqueeze", new, self.const([1]))
        index = self.add("Unsqueeze", rows, self.const([0, 1, 3]))
        index = self.add("Expand", index, self.add("Shape", new))
        self.add("ScatterElements", past, index, new, axis=2, name=present)
        self.output(present, shape, f"present_{kind}")
        filled = self.add("Slice", present, self.const([0]), total, self.const([2]))
        return self.add("Squeeze", filled, self.const([1]))

    def save(self, path: Path) -> Signature:
        kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
        inputs, outputs = (
            [helper.make_tensor_value_info(v.name, kinds[v.dtype], list(v.shape)) for v in values]
            for values in (self.inputs, self.outputs)
        )
        graph = helper.make_graph(self.nodes, "tiny", inputs, outputs, self.weights)
        opset = [helper.make_opsetid("", 18)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(path))
        return Signature(inputs=tuple(self.inputs), outputs=tuple(self.outputs))
