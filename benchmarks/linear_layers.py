"""Quantized linear layers as ONNX nodes: ours, and those of the engines that we compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from qcompile.backends.cpu.packable import layout_of
from qcompile.formats import LookupFormat, parse_format
from qcompile.kernels.cpu import OPERATOR_DOMAIN, library_path
from qcompile.kernels.cpu.layout import pack_linear

Initializers = list[onnx.TensorProto]
Layer = tuple[list[onnx.NodeProto], Initializers, int]
"""Nodes, weights, and the bytes of the weights."""


@dataclass(frozen=True)
class Shape:
    """Of a layer: output and input features."""

    n: int
    k: int


MakeLayer = Callable[[Shape, int, str, str], Layer]
"""Of a shape, the layer's number, and the names of its input and output."""

Run = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Variant:
    """How a layer is written, what runs it, and the group of weights that share a scale."""

    make: MakeLayer
    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    group: int = 0


def codes_and_scale(shape: Shape, bits: int, group: int, seed: int) -> tuple[np.ndarray, ...]:
    """Random codes, and a scale that keeps activations of order one along the chain."""
    rng = np.random.default_rng(seed)
    groups = 1 if group == 0 else shape.k // group
    codes = rng.integers(0, 1 << bits, (shape.n, shape.k), dtype=np.uint8)
    deviation = (1 << bits) / 12**0.5
    scale = np.full((shape.n, groups), np.float16(1 / (deviation * shape.k**0.5)), np.float32)
    # Codes lie half a step below zero in the mean. Rows of both signs keep that from adding up.
    scale[1::2] *= -1
    return codes, scale


def ours(bits: int, group: int, act: str) -> MakeLayer:
    def make(shape: Shape, index: int, source: str, target: str) -> Layer:
        codes, scale = codes_and_scale(shape, bits, group, index)
        packed = pack_linear(codes, scale, bits=bits, group_size=group)
        node = helper.make_node(
            "QLinear",
            [source, f"w{index}"],
            [target],
            domain=OPERATOR_DOMAIN,
            N=shape.n,
            K=shape.k,
            bits=bits,
            group_size=group,
            scale_dtype=1,
            act=act,
        )
        return [node], [onnx.numpy_helper.from_array(packed, f"w{index}")], packed.nbytes

    return make


def ours_in_format(name: str, act: str) -> MakeLayer:
    """Our product with a weight in any format that the kernels read."""

    def make(shape: Shape, index: int, source: str, target: str) -> Layer:
        format = parse_format(name)
        layout = layout_of(format)
        generator = torch.Generator().manual_seed(index)
        deviation = 1 / shape.k**0.5
        # A few rows over and over: encoding takes longer than all the rest.
        rows = torch.randn(64, shape.k, generator=generator) * deviation
        quantized = format.encode(rows.repeat(shape.n // 64, 1))
        tensors = {
            part: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            for part, tensor in quantized.tensors.items()
        }
        outer = tensors.get("outer_scale")
        levels = None
        if isinstance(format, LookupFormat) and layout.coding == "table":
            levels = np.array(format.levels, np.float32)
        packed = pack_linear(
            tensors["codes"],
            tensors["scale"],
            bits=layout.bits,
            group_size=layout.group_size,
            scale_dtype=layout.scale_dtype,
            coding=layout.coding,
            levels=levels,
            outer_scale=None if outer is None else outer.reshape(-1),
        )
        attributes: dict[str, Any] = layout.attributes()
        node = helper.make_node(
            "QLinear",
            [source, f"w{index}"],
            [target],
            domain=OPERATOR_DOMAIN,
            N=shape.n,
            K=shape.k,
            **attributes,
            act=act,
        )
        return [node], [onnx.numpy_helper.from_array(packed, f"w{index}")], packed.nbytes

    return make


def matmul_nbits(bits: int, group: int, level: int = 4) -> MakeLayer:
    """ONNX Runtime's weight-only matrix product.

    It takes 2, 4 and 8 bits (1.31); a model with 3 is refused when its session is made.

    Args:
        bits: Of the codes.
        group: Weights per scale along K.
        level: Of accuracy: 4 multiplies with int8 activations; 1, and 0 alike, with float32.
    """

    def make(shape: Shape, index: int, source: str, target: str) -> Layer:
        codes, scale = codes_and_scale(shape, bits, group, index)
        blocks = codes.reshape(shape.n, shape.k // group, group)
        per_byte = 8 // bits
        places = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
        parts = blocks.reshape(*blocks.shape[:2], -1, per_byte) << places
        blocks = np.bitwise_or.reduce(parts, axis=-1)
        weights = [
            onnx.numpy_helper.from_array(np.ascontiguousarray(blocks), f"w{index}"),
            onnx.numpy_helper.from_array(scale.reshape(-1), f"s{index}"),
        ]
        node = helper.make_node(
            "MatMulNBits",
            [source, f"w{index}", f"s{index}"],
            [target],
            domain="com.microsoft",
            N=shape.n,
            K=shape.k,
            bits=bits,
            block_size=group,
            accuracy_level=level,
        )
        return [node], weights, blocks.nbytes + scale.nbytes

    return make


def matmul_integer() -> MakeLayer:
    """ONNX's dynamically quantized product: one scale per tensor of activations."""

    def make(shape: Shape, index: int, source: str, target: str) -> Layer:
        codes, scale = codes_and_scale(shape, 8, 0, index)
        weight = np.ascontiguousarray((codes.T.astype(np.int16) - 128).astype(np.int8))
        q, s, z, i, f, t = (f"{name}{index}" for name in "qszift")
        nodes = [
            helper.make_node("DynamicQuantizeLinear", [source], [q, s, z]),
            helper.make_node("MatMulInteger", [q, f"w{index}", z], [i]),
            helper.make_node("Cast", [i], [f], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f, s], [t]),
            helper.make_node("Mul", [t, f"c{index}"], [target]),
        ]
        weights = [
            onnx.numpy_helper.from_array(weight, f"w{index}"),
            onnx.numpy_helper.from_array(np.float32(scale[0, 0]), f"c{index}"),
        ]
        return nodes, weights, weight.nbytes

    return make


def onnxruntime(model: onnx.ModelProto, threads: int) -> Run:
    """With our library registered."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options)
    return lambda x: session.run(None, {"x0": x})


VARIANTS = {
    name: Variant(make)
    for name, make in {
        "qcompile int4 g32": ours(4, 32, "int8_token"),
        "qcompile int4 g64": ours(4, 64, "int8_token"),
        "qcompile int4 g128": ours(4, 128, "int8_token"),
        "qcompile int4 g32 float": ours(4, 32, "float"),
        "qcompile int8": ours(8, 0, "int8_token"),
        **{
            f"qcompile int{bits} g64": ours(bits, 64, "int8_token")
            for bits in (1, 2, 3, 5, 6, 7, 8)
        },
        "qcompile ternary": ours_in_format("ternary", "int8_token"),
        "qcompile ternary g64": ours_in_format("ternary-g64", "int8_token"),
        "qcompile ternary float": ours_in_format("ternary", "float"),
        "qcompile nf4 g64 float": ours_in_format("nf4-g64", "float"),
        "qcompile mxfp4": ours_in_format("mxfp4", "int8_token"),
        "qcompile mxfp4 float": ours_in_format("mxfp4", "float"),
        "qcompile nvfp4": ours_in_format("nvfp4", "int8_token"),
        "qcompile fp8 float": ours_in_format("fp8", "float"),
        "MatMulNBits int2 g64": matmul_nbits(2, 64),
        "MatMulNBits int2 g128": matmul_nbits(2, 128),
        "MatMulNBits int4 g32": matmul_nbits(4, 32),
        "MatMulNBits int4 g64": matmul_nbits(4, 64),
        "MatMulNBits int4 g128": matmul_nbits(4, 128),
        "MatMulNBits int4 g32 float": matmul_nbits(4, 32, level=1),
        "MatMulNBits int4 g128 float": matmul_nbits(4, 128, level=1),
        "MatMulNBits int8 g64": matmul_nbits(8, 64),
        "MatMulInteger int8": matmul_integer(),
    }.items()
}

for group in (32, 128):
    VARIANTS[f"OpenVINO int4 g{group}"] = Variant(matmul_nbits(4, group), "openvino", group)


def chain(name: str, shape: Shape, least_bytes: int) -> tuple[onnx.ModelProto, int, int]:
    """A model of equal layers with weights of their own, one after the other.

    Args:
        name: One of `VARIANTS`.
        shape: Of every layer. Where it is not square, ``Slice`` or ``Concat`` adapt the values.
        least_bytes: Of all weights together.

    Returns:
        The model from ``x0``, its layers, and the bytes of one layer's weights.
    """
    nodes: list[onnx.NodeProto] = []
    initializers: Initializers = []
    layers = total = weight_bytes = 0
    while total < least_bytes:
        source, target = f"x{layers}", f"x{layers + 1}"
        result = target if shape.n == shape.k else f"y{layers}"
        made, weights, weight_bytes = VARIANTS[name].make(shape, layers, source, result)
        nodes += [*made, *_adapted(shape, result, target)]
        initializers += weights
        layers, total = layers + 1, total + weight_bytes
    initializers += list(_constants(shape))
    ports: list[str | int | None] = ["rows", shape.k]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ports)],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ports)],
        initializers,
    )
    domains = [("", 20), (OPERATOR_DOMAIN, 1), ("com.microsoft", 1)]
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), layers, weight_bytes


def _adapted(shape: Shape, source: str, target: str) -> list[onnx.NodeProto]:
    """The output of a layer as the input of the next."""
    if shape.n == shape.k:
        return []
    if shape.n > shape.k:
        return [helper.make_node("Slice", [source, "zero", "k", "one"], [target])]
    copies = [source] * -(-shape.k // shape.n)
    wide = f"{target}.wide"
    return [
        helper.make_node("Concat", copies, [wide], axis=1),
        helper.make_node("Slice", [wide, "zero", "k", "one"], [target]),
    ]


def _constants(shape: Shape) -> Iterator[onnx.TensorProto]:
    if shape.n == shape.k:
        return
    for name, value in (("zero", 0), ("one", 1), ("k", shape.k)):
        yield onnx.numpy_helper.from_array(np.array([value], np.int64), name)
