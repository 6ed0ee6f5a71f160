"""What translations write with: operators, constants, sizes, weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import sympy
import torch
from torch import Tensor, fx

from qcompile.backends.onnx import sizes as size_arithmetic
from qcompile.backends.onnx.calls import Attribute, Call, output_dtype, to_attribute
from qcompile.backends.onnx.values import (
    Axis,
    Number,
    Operand,
    Packed,
    Size,
    SymbolicScalar,
    UnsupportedError,
    WeightTensor,
    constant_target,
    expression,
    same_shape,
    same_size,
    static_size,
    to_ir_dtype,
)
from qcompile.ir.weights import TensorSpec

Input = Operand | Sequence[Size] | npt.NDArray[Any] | None
"""What `Builder.op` takes for an input: besides values, numbers (in the type of the first value),
lists of sizes (as int64), arrays (as they are) and None for an input that is left out."""

_INDEX_LIMIT = 2**63 - 1


class Builder:
    """Appends ONNX nodes for one program.

    Translations get it as their first argument. While one runs, `node` is the call that it
    translates, and `result` and `dtype` say what must come out.

    Args:
        opset: Version of the standard operators.
        weight: Gives the initializer of a weight by its name in the store.
        transposable: Whether a weight is used by nothing but linears, so that it may be stored
            transposed.
        emitted: What came of the nodes of the program so far.
    """

    def __init__(
        self,
        opset: int,
        *,
        weight: Callable[[str], WeightTensor],
        transposable: Callable[[str], bool],
        emitted: Mapping[fx.Node, Any],
    ) -> None:
        self.opset = opset
        self.emitted = emitted
        self.node: fx.Node
        self.calls: list[Call] = []
        self.initializers: dict[str, ir.Value] = {}
        self.weights: dict[str, WeightTensor] = {}
        self._weight = weight
        self._transposable = transposable
        self._names: set[str] = set()
        self._repeats: Counter[str] = Counter()
        self._fakes: dict[ir.Value, Tensor] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._scalars: dict[ir.Value, ir.Value] = {}
        self._axes: dict[tuple[ir.Value, int], SymbolicScalar] = {}
        self._symbols: dict[sympy.Symbol, tuple[ir.Value, int]] = {}
        self._sizes: dict[sympy.Expr, Size] = {}
        self._shared: dict[Any, ir.Value] = {}

    # What must come out.

    @property
    def result(self) -> Tensor:
        """The fake tensor that the present call gives."""
        value = self.node.meta["val"]
        if not isinstance(value, Tensor):
            raise UnsupportedError(f"it gives a {type(value).__name__}, not a tensor")
        return value

    @property
    def results(self) -> list[Tensor]:
        """The fake tensors that the present call gives, where it gives several."""
        return list(self.node.meta["val"])

    @property
    def dtype(self) -> ir.DataType:
        """The type of `result`."""
        return to_ir_dtype(self.result.dtype)

    # Operators.

    def op(
        self,
        op_type: str,
        *inputs: Input,
        domain: str = "",
        dtype: ir.DataType | None = None,
        **attributes: Attribute | None,
    ) -> ir.Value:
        """Appends an operator with one output.

        Args:
            op_type: Name of the operator.
            *inputs: See `Input`.
            domain: Its operator set; empty for the standard one.
            dtype: Type of the output where it is neither that of the first input (``Where``: the
                second) nor fixed by the operator.
            **attributes: Its attributes; None leaves one out.
        """
        return self._append(op_type, inputs, domain, [dtype], attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: Input,
        outputs: int,
        domain: str = "",
        dtypes: Sequence[ir.DataType | None] | None = None,
        **attributes: Attribute | None,
    ) -> tuple[ir.Value, ...]:
        """Appends an operator with several outputs; as `op`, but for `outputs` and `dtypes`."""
        return self._append(op_type, inputs, domain, dtypes or [None] * outputs, attributes)

    def once(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` appends, the first time that a key is asked for; afterwards the same value.

        For what several calls of the program share and none of them is.
        """
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another type."""
        return x if x.dtype == dtype else self.op("Cast", x, to=int(dtype), dtype=dtype)

    def tensor(self, x: Operand, dtype: ir.DataType) -> ir.Value:
        """An operand as a tensor of a type; numbers become tensors of rank 0."""
        if isinstance(x, ir.Value):
            return self.cast(x, dtype)
        if isinstance(x, SymbolicScalar):
            return self.cast(self.scalar(x), dtype)
        return self.constant(x, dtype)

    def constant(self, value: npt.ArrayLike, dtype: ir.DataType) -> ir.Value:
        """A constant tensor; equal ones are made once."""
        # Narrow types with their own idea of overflow must see float64, not Python objects.
        array = np.asarray(value).astype(dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            made = self._initializer("constant", dtype, array.shape)
            made.const_value = ir.tensor(array, dtype=dtype, name=made.name)
            self._constants[key] = made
        return self._constants[key]

    def array(self, value: npt.NDArray[Any]) -> ir.Value:
        """A constant tensor in the type that NumPy has for it."""
        return self.constant(value, ir.DataType.from_numpy(value.dtype))

    # Shapes.

    def shape(self, x: ir.Value) -> tuple[Axis, ...]:
        """The shape of a value that a node of the program gave, sizes as the tracer knows them."""
        return tuple(self._fakes[x].shape)

    def rank(self, x: ir.Value) -> int:
        """Number of axes of a value that a node of the program gave."""
        return self._fakes[x].dim()

    def axis(self, x: ir.Value, dim: int) -> int:
        """An axis counted from the front."""
        return dim % max(self.rank(x), 1)

    def size(self, size: Axis) -> Size:
        """A size of a fake tensor: a number, or one computed from the inputs' sizes."""
        if (known := static_size(size)) is not None:
            return known
        expr = expression(size)
        if expr not in self._sizes:
            self._sizes[expr] = size_arithmetic.evaluate(self, expr, self._symbol)
        return self._sizes[expr]

    def sizes(self, shape: Iterable[Axis]) -> list[Size]:
        """The sizes of a fake tensor."""
        return [self.size(size) for size in shape]

    def shape_tensor(self, sizes: Sequence[Number]) -> ir.Value:
        """A list of sizes as an int64 vector."""
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in (*sizes, None):
            if isinstance(size, (int, float)):
                run.append(int(size))
                continue
            if run or (size is None and not parts):
                parts.append(self.constant(run, ir.DataType.INT64))
                run = []
            if size is not None:
                parts.append(size.value)
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def scalar(self, x: SymbolicScalar) -> ir.Value:
        """A size as a tensor of rank 0."""
        if x.value not in self._scalars:
            self._scalars[x.value] = self.op("Squeeze", x.value, [0])
        return self._scalars[x.value]

    def axis_size(self, x: ir.Value, dim: int) -> Size:
        """The size of one axis of a value."""
        if x in self._fakes and (known := static_size(self.shape(x)[dim])) is not None:
            return known
        if (x, dim) not in self._axes:
            value = self.op("Shape", x, start=dim, end=dim + 1)
            self._axes[x, dim] = SymbolicScalar(value)
        return self._axes[x, dim]

    def reshape(self, x: ir.Value, shape: Sequence[Axis]) -> ir.Value:
        """A value in another shape, with a constant target wherever one says it.

        ONNX takes 0 for "as in the input" and -1 for "what remains": most shapes with symbolic
        sizes need no more. Where a size of 0 would make that ambiguous, sizes are computed.
        """
        if x in self._fakes and same_shape(self.shape(x), shape):
            return x
        known = self.shape(x) if x in self._fakes else ()
        target = constant_target(known, shape)
        if target is not None:
            return self.op("Reshape", x, target)
        return self.op("Reshape", x, self.shape_tensor(self.sizes(shape)), allowzero=1)

    def expand(self, x: Operand, shape: Sequence[Axis], dtype: ir.DataType) -> ir.Value:
        """An operand broadcast to a shape."""
        value = self.tensor(x, dtype)
        known: tuple[Axis, ...] = self.shape(value) if value in self._fakes else ()
        if value in self._fakes and same_shape(known, shape):
            return value
        # `Expand` broadcasts both ways, so an axis that stays needs only a 1.
        padded = [1] * (len(shape) - len(known)) + list(known)
        target = [
            1 if same_size(old, new) else self.size(new)
            for old, new in zip(padded, shape, strict=True)
        ]
        return self.op("Expand", value, target)

    def slice(
        self, x: ir.Value, axis: int, start: Number, end: Number | None = None, step: int = 1
    ) -> ir.Value:
        """Part of one axis, with Python's meaning of negative and missing bounds."""
        last: Number = (_INDEX_LIMIT if step > 0 else -_INDEX_LIMIT) if end is None else end
        first = self.shape_tensor([start])
        return self.op("Slice", x, first, self.shape_tensor([last]), [axis], [step])

    # Weights.

    def weight(self, name: str) -> ir.Value:
        """A weight of the program, as the store has it."""
        weight = self._weight(name)
        return self._weight_value(weight.weight, weight)

    def weight_name(self, x: ir.Value) -> str | None:
        """The name in the store of a value that is a weight as the store has it."""
        weight = self.weights.get(str(x.name))
        return weight.weight if weight is not None and weight.arrange is None else None

    def transposed_weight(self, x: ir.Value) -> ir.Value | None:
        """A matrix ``[N, K]`` stored as ``[K, N]``; None if it is computed or needed as it is."""
        name = self.weight_name(x)
        if name is None or not self._transposable(name):
            return None
        spec = self._weight(name).spec
        turned = TensorSpec((spec.shape[1], spec.shape[0]), spec.dtype)
        return self.arranged_weight(name, "transposed", turned, lambda stored: stored.t())

    def arranged_weight(
        self,
        name: str,
        label: str,
        spec: TensorSpec,
        arrange: Callable[[Tensor], Tensor],
        packed: Packed | None = None,
    ) -> ir.Value:
        """A weight in another order, or in other bits.

        Args:
            name: The weight in the store.
            label: Names the arrangement; one weight in one arrangement is stored once.
            spec: Shape and dtype that `arrange` gives.
            arrange: From the stored tensor to what is written.
            packed: What the model sees, where several elements share a byte.
        """
        stored = self._weight(name).weight
        weight = WeightTensor(stored, spec, arrange, packed)
        return self._weight_value(f"{stored}.{label}", weight)

    # For the emitter.

    def input(self, name: str, fake: Tensor) -> ir.Value:
        """A new input of the model."""
        value = ir.Value(name=self.unique(name))
        value.dtype = to_ir_dtype(fake.dtype)
        self.know(value, fake)
        return value

    def know(self, value: ir.Value, fake: Tensor) -> None:
        """Remembers the shape of a value, and which of its axes has the size of a symbol."""
        self._fakes.setdefault(value, fake)
        for dim, size in enumerate(fake.shape):
            expr = None if type(size) is int else expression(size)
            if isinstance(expr, sympy.Symbol):
                self._symbols.setdefault(expr, (value, dim))

    def know_size(self, size: torch.SymInt, value: SymbolicScalar) -> None:
        """Remembers the value of a size that the program itself computes."""
        self._sizes.setdefault(size.node.expr, value)

    def unique(self, name: str) -> str:
        """The name, or with a number after it if it is taken."""
        candidate = name
        while candidate in self._names:
            self._repeats[name] += 1
            candidate = f"{name}_{self._repeats[name]}"
        self._names.add(candidate)
        return candidate

    def _symbol(self, symbol: sympy.Symbol) -> Size:
        if symbol not in self._symbols:
            raise UnsupportedError(f"no input has an axis of size {symbol}")
        return self.axis_size(*self._symbols[symbol])

    def _append(
        self,
        op_type: str,
        inputs: Sequence[Input],
        domain: str,
        dtypes: Sequence[ir.DataType | None],
        attributes: Mapping[str, Attribute | None],
    ) -> tuple[ir.Value, ...]:
        values = tuple(self._inputs(op_type, inputs))
        # Inputs left out at the end must not be written as empty names: ONNX Runtime crashes on
        # some (SkipLayerNormFusion).
        while values and values[-1] is None:
            values = values[:-1]
        made = tuple(self._new_value(dtype or output_dtype(op_type, values)) for dtype in dtypes)
        attrs = tuple(to_attribute(k, v) for k, v in attributes.items() if v is not None)
        self.calls.append(Call(op_type, domain, values, made, attrs))
        return made

    def _inputs(self, op_type: str, inputs: Sequence[Input]) -> Iterable[ir.Value | None]:
        like = next((x.dtype for x in inputs if isinstance(x, ir.Value)), None)
        for x in inputs:
            if x is None or isinstance(x, ir.Value):
                yield x
            elif isinstance(x, np.ndarray):
                yield self.array(x)
            elif isinstance(x, Sequence):
                yield self.shape_tensor(x)
            elif like is None:
                raise AssertionError(f"{op_type} has numbers but no tensor to take the type from")
            else:
                yield self.tensor(x, like)

    def _new_value(self, dtype: ir.DataType) -> ir.Value:
        value = ir.Value()
        value.dtype = dtype
        return value

    def _initializer(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        value = ir.Value(name=self.unique(name), shape=ir.Shape(shape))
        value.dtype = dtype
        self.initializers[str(value.name)] = value
        return value

    def _weight_value(self, name: str, weight: WeightTensor) -> ir.Value:
        key = ("weight", name)
        if key not in self._constants:
            value = self._initializer(name, weight.dtype, weight.shape)
            self.weights[str(value.name)] = weight
            self._constants[key] = value
        return self._constants[key]
