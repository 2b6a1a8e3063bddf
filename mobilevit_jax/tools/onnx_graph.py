"""A JAX function as an ONNX model: every equation of its trace becomes a node or two.

What depends on constants only is computed here, so weights arrive in the form their node wants.
JAX's maps are NHWC and ONNX's convolutions want NCHW: a value is kept in the layout in which it was
made, and transposed where a node needs another one, once. Elementwise nodes and reductions take any
layout, so that a network of convolutions is transposed at its input only, and one with attention
at the borders of its blocks.

Before editing: only what our networks trace to is here, and whatever else appears is refused by
name. The batch is one symbolic dimension; shapes name it -1.
"""

import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

Layout = tuple[int, ...]  # physical axis i holds the logical axis layout[i]

CHANNELS_FIRST = (0, 3, 1, 2)
OPSETS = range(13, 22)
OPSET = 17  # of 2022: runtimes on phones have it
MODULES = ("onnx", "onnxruntime")

ELEMENTWISE: Mapping[str, str] = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "exp": "Exp",
    "logistic": "Sigmoid",
    "sqrt": "Sqrt",
}
# Of a constant second operand that changes nothing.
NEUTRAL: Mapping[str, float] = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "max": -math.inf}
REDUCTIONS: Mapping[str, str] = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}
SAME = ("stop_gradient", "optimization_barrier", "copy")
CALLS = ("jit", "pjit", "remat2", "checkpoint", "custom_vjp_call", "custom_jvp_call")


class _Value:
    """A tensor of the graph.

    Attributes:
        shape: logical sizes; the batch's are symbolic.
        forms: the tensor's names by layout. Empty while `whole` stands for it.
        whole: the map of which this is the flat view, (b h w) c; no node has made that yet.
    """

    def __init__(
        self,
        shape: Sequence[Any],
        forms: Mapping[Layout, str],
        whole: "_Value | None" = None,
    ) -> None:
        self.shape = tuple(shape)
        self.forms = dict(forms)
        self.whole = whole

    @property
    def canonical(self) -> Layout:
        return tuple(range(len(self.shape)))


class _Graph:
    """Nodes and weights so far."""

    def __init__(self, onnx: Any, opset: int) -> None:
        self.onnx = onnx
        self.opset = opset
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node of one output, and returns its name."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, values: Any) -> str:
        """The name of a constant; equal ones share it."""
        array = np.ascontiguousarray(values)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.names:
            self.names[key] = f"constant_{len(self.names)}"
            self.weights[self.names[key]] = array
        return self.names[key]

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(np.asarray(values, np.int64))

    def first(self, value: _Value) -> tuple[Layout, str]:
        """A layout that a value has already, and its name in that."""
        if not value.forms and value.whole is not None:
            source = self.form(value.whole, value.whole.canonical)
            shape = self.integers(_sizes(value.shape))
            value.forms[value.canonical] = self.node("Reshape", [source, shape])
        return next(iter(value.forms.items()))

    def form(self, value: _Value, layout: Layout) -> str:
        """The name of a value in a layout."""
        have, name = self.first(value)
        if layout not in value.forms:
            order = [have.index(axis) for axis in layout]
            value.forms[layout] = self.node("Transpose", [name], perm=order)
        return value.forms[layout]


def convert(
    function: Callable[[jax.Array], jax.Array],
    image: jax.ShapeDtypeStruct,
    *,
    opset: int = OPSET,
    producer: str,
) -> bytes:
    """The ONNX file of a function from "image" to "logits".

    Args:
        function: of one array; what it closes over becomes weights.
        image: its shape, of which the first dimension may be symbolic, and dtype.
        opset: of OPSETS.
        producer: name that the file gives as its maker.

    Raises:
        NotImplementedError: the function does something that has no node here.
    """
    onnx = importlib.import_module("onnx")
    graph = _Graph(onnx, opset)
    closed = jax.make_jaxpr(function)(image)
    start = _Value(image.shape, {tuple(range(len(image.shape))): "image"})
    consts = [np.asarray(const) for const in closed.consts]
    (result,) = _run(graph, closed.jaxpr, consts, [start])
    last = graph.form(result, result.canonical)
    graph.nodes.append(onnx.helper.make_node("Identity", [last], ["logits"], "logits"))
    _merge_softmaxes(graph)
    nodes = _merge_biases(graph)
    used = {name for node in nodes for name in node.input}
    helper = onnx.helper
    tensor = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            nodes,
            producer,
            [tensor("image", helper.np_dtype_to_tensor_dtype(image.dtype), _named(image.shape))],
            [tensor("logits", onnx.TensorProto.FLOAT, _named(result.shape))],
            [
                onnx.numpy_helper.from_array(array, name)
                for name, array in graph.weights.items()
                if name in used
            ],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", opset)]),
        producer_name=producer,
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _run(graph: _Graph, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Adds the nodes of a trace; inputs and results are values or, where known, arrays."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        results = _equation(graph, equation, given)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(graph: _Graph, equation: Any, given: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
        consts = getattr(inner, "consts", ())
        return _run(graph, getattr(inner, "jaxpr", inner), list(map(np.asarray, consts)), given)
    if name == "platform_index":
        return [np.int32(0)]  # the choice below does not look at it
    if name == "cond" and params.get("branches_platforms"):
        # Convolutions in pieces are for XLA on a CPU only.
        inner = params["branches"][params["branches_platforms"].index(None)]
        return _run(graph, inner.jaxpr, list(map(np.asarray, inner.consts)), given[1:])
    if name in SAME:
        return given
    if not any(isinstance(each, _Value) for each in given):
        found = equation.primitive.bind(*given, **params)
        return list(map(np.asarray, found if equation.primitive.multiple_results else [found]))
    shape = equation.outvars[0].aval.shape
    if name in ELEMENTWISE:
        return [_elementwise(graph, name, given, shape)]
    if name in REDUCTIONS:
        return [_reduce(graph, name, given[0], params["axes"])]
    if name not in OTHERS:
        raise NotImplementedError(f"{name} has no form in ONNX here")
    found = OTHERS[name](graph, params, *given, shape)
    return found if isinstance(found, list) else [found]


# --- nodes ----------------------------------------------------------------------------------------


def _elementwise(graph: _Graph, name: str, given: list[Any], shape: tuple[Any, ...]) -> Any:
    """Operands have the rank of the result or none, and sizes that broadcast."""
    values = [each for each in given if isinstance(each, _Value)]
    if len(given) == 2 and len(values) == 1 and name in NEUTRAL:
        constant = given[1] if isinstance(given[0], _Value) else given[0]
        swapped = constant is given[0] and name in ("sub", "div")
        if not swapped and np.all(constant == NEUTRAL[name]) and values[0].shape == shape:
            return values[0]
    layout = _common_layout(graph, values, shape)
    names = []
    for each in given:
        if isinstance(each, _Value):
            names.append(graph.form(each, layout if each.shape else ()))
        else:
            ordered = np.transpose(each, layout) if each.ndim else each
            names.append(graph.constant(ordered))
    return _Value(shape, {layout: graph.node(ELEMENTWISE[name], names)})


def _common_layout(graph: _Graph, values: Sequence[_Value], shape: tuple[Any, ...]) -> Layout:
    """One that costs no transposition if there is one; else that of the trace, for the tokens."""
    for value in values:
        graph.first(value)
    large = [value for value in values if value.shape == shape] or list(values[:1])
    canonical = tuple(range(len(shape)))
    shared = set.intersection(*(set(value.forms) for value in large))
    if len(shared) == 1:
        return shared.pop()
    return canonical


def _reduce(graph: _Graph, name: str, value: _Value, axes: Sequence[int]) -> _Value:
    if len(axes) == 1 and axes[0] == len(value.shape) - 1:
        layout = value.canonical  # a norm of tokens: their block goes on in this layout
    else:
        layout, _ = graph.first(value)
    source = graph.form(value, layout)
    physical = sorted(layout.index(axis) for axis in axes)
    if name == "reduce_max" and graph.opset < 18:
        made = graph.node("ReduceMax", [source], axes=physical, keepdims=0)
    else:
        made = graph.node(REDUCTIONS[name], [source, graph.integers(physical)], keepdims=0)
    left = [axis for axis in range(len(layout)) if axis not in axes]
    order = tuple(left.index(axis) for axis in layout if axis not in axes)
    return _Value([value.shape[axis] for axis in left], {order: made})


def _reshape(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    if value.shape == shape:
        return value
    if value.whole is not None and value.whole.shape == shape:
        return value.whole
    if len(shape) == 2 and len(value.shape) > 2 and value.shape[-1] == shape[-1]:
        return _Value(shape, {}, whole=value)
    graph.first(value)
    views = [name for have, name in value.forms.items() if _is_view(value.shape, have)]
    source = views[0] if views else graph.form(value, value.canonical)
    made = graph.node("Reshape", [source, graph.integers(_sizes(shape))])
    return _Value(shape, {tuple(range(len(shape))): made})


def _broadcast(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    places = params["broadcast_dimensions"]
    given = [1] * len(shape)
    for axis, place in enumerate(places):
        given[place] = value.shape[axis]
    if tuple(given) != tuple(shape):
        raise NotImplementedError("broadcast_in_dim that repeats values has no form in ONNX here")
    return _reshape(graph, {}, value, tuple(shape))


def _transpose(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    order = params["permutation"]
    graph.first(value)
    renamed = {axis: new for new, axis in enumerate(order)}
    forms = {tuple(renamed[axis] for axis in have): name for have, name in value.forms.items()}
    return _Value(shape, forms)


def _cast(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    kind = graph.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
    layout, name = graph.first(value)
    return _Value(shape, {layout: graph.node("Cast", [name], to=kind)})


def _square(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    return _elementwise(graph, "mul", [value, value], shape)


def _rsqrt(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    root = _elementwise(graph, "sqrt", [value], shape)
    layout, name = graph.first(root)
    return _Value(shape, {layout: graph.node("Reciprocal", [name])})


def _reverse(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> _Value:
    layout, name = graph.first(value)
    for axis in params["dimensions"]:
        order = graph.integers(range(shape[axis])[::-1])
        name = graph.node("Gather", [name, order], axis=layout.index(axis))
    return _Value(shape, {layout: name})


def _concatenate(graph: _Graph, params: Mapping[str, Any], *given: Any) -> _Value:
    *values, shape = given
    layouts = [set(value.forms) for value in values]
    layout = min(set.intersection(*layouts) or {values[0].canonical})
    names = [graph.form(value, layout) for value in values]
    axis = layout.index(params["dimension"])
    return _Value(shape, {layout: graph.node("Concat", names, axis=axis)})


def _split(graph: _Graph, params: Mapping[str, Any], value: _Value, shape: Any) -> list[_Value]:
    layout, name = graph.first(value)
    sizes = [int(size) for size in params["sizes"]]
    first = f"split_{len(graph.nodes)}"
    names = [f"{first}_{i}" for i in range(len(sizes))]
    graph.nodes.append(
        graph.onnx.helper.make_node(
            "Split", [name, graph.integers(sizes)], names, first, axis=layout.index(params["axis"])
        )
    )
    shapes = [
        [size if i == params["axis"] else old for i, old in enumerate(value.shape)]
        for size in sizes
    ]
    return [_Value(each, {layout: name}) for each, name in zip(shapes, names, strict=True)]


def _convolution(
    graph: _Graph, params: Mapping[str, Any], value: _Value, kernel: Any, shape: Any
) -> _Value:
    """NHWC and HWIO, as all of models.convolution."""
    numbers = params["dimension_numbers"]
    plain = (numbers.lhs_spec, numbers.rhs_spec) == (CHANNELS_FIRST, (3, 2, 0, 1))
    if isinstance(kernel, _Value) or not plain or set(params["lhs_dilation"]) != {1}:
        raise NotImplementedError("a convolution of another kind has no form in ONNX here")
    (top, bottom), (left, right) = params["padding"]
    made = graph.node(
        "Conv",
        [graph.form(value, CHANNELS_FIRST), graph.constant(np.transpose(kernel, (3, 2, 0, 1)))],
        strides=list(params["window_strides"]),
        pads=[int(top), int(left), int(bottom), int(right)],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    return _Value(shape, {CHANNELS_FIRST: made})


class _Product(NamedTuple):
    """What a dot_general sums over, and pairs; of each operand."""

    contracted: tuple[Sequence[int], Sequence[int]]
    batched: tuple[Sequence[int], Sequence[int]]


def _dot(graph: _Graph, params: Mapping[str, Any], left: Any, right: Any, shape: Any) -> _Value:
    product = _Product(*params["dimension_numbers"])
    (left_axis,), (right_axis,) = product.contracted
    if product.batched[0]:
        return _batched_dot(graph, product, left, right, shape)
    if isinstance(right, np.ndarray) and right.ndim == 2:
        matrix = right if right_axis == 0 else right.T  # contracted, new
        if left.whole is not None and left_axis == 1:
            whole = _pointwise(graph, left.whole, matrix)
            return _Value(shape, {}, whole=whole)
        return _times_matrix(graph, left, left_axis, matrix, shape, new=len(shape) - 1)
    if isinstance(left, np.ndarray) and left.ndim == 2:
        matrix = left if left_axis == 0 else left.T
        return _times_matrix(graph, right, right_axis, matrix, shape, new=0)
    raise NotImplementedError("a product of another kind has no form in ONNX here")


def _pointwise(graph: _Graph, value: _Value, matrix: np.ndarray) -> _Value:
    """A 1x1 convolution of a map that is channels first, else a product of its last axis."""
    shape = (*value.shape[:-1], matrix.shape[1])
    if CHANNELS_FIRST in value.forms and value.canonical not in value.forms:
        kernel = graph.constant(matrix.T[:, :, None, None])
        made = graph.node("Conv", [value.forms[CHANNELS_FIRST], kernel], kernel_shape=[1, 1])
        return _Value(shape, {CHANNELS_FIRST: made})
    name = graph.form(value, value.canonical)
    made = graph.node("MatMul", [name, graph.constant(matrix)])
    return _Value(shape, {value.canonical: made})


def _times_matrix(
    graph: _Graph, value: _Value, axis: int, matrix: np.ndarray, shape: Any, *, new: int
) -> _Value:
    """Replaces an axis by one that goes to the place `new`; matrix is (old, new)."""
    others = [each for each in range(len(value.shape)) if each != axis]
    # The logical axes of the result: those left in their order, with the new one at its place.
    places = {old: at + (at >= new) for at, old in enumerate(others)}
    if axis == len(value.shape) - 1:
        name = graph.form(value, value.canonical)
        made = graph.node("MatMul", [name, graph.constant(matrix)])
        return _Value(shape, {(*(places[each] for each in others), new): made})
    layout = (*others[:-1], axis, others[-1])
    made = graph.node("MatMul", [graph.constant(matrix.T), graph.form(value, layout)])
    return _Value(shape, {(*(places[each] for each in others[:-1]), new, places[others[-1]]): made})


def _batched_dot(
    graph: _Graph, product: _Product, left: _Value, right: _Value, shape: Any
) -> _Value:
    names = []
    sides = ((left, 0), (right, 1))
    for value, side in sides:
        (axis,), batch = product.contracted[side], tuple(product.batched[side])
        (free,) = set(range(len(value.shape))) - {axis, *batch}
        last = (free, axis) if side == 0 else (axis, free)
        names.append(graph.form(value, (*batch, *last)))
    return _Value(shape, {tuple(range(len(shape))): graph.node("MatMul", names)})


OTHERS: Mapping[str, Callable[..., Any]] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "convert_element_type": _cast,
    "square": _square,
    "rsqrt": _rsqrt,
    "rev": _reverse,
    "concatenate": _concatenate,
    "split": _split,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
}


# --- helpers --------------------------------------------------------------------------------------


def _sizes(shape: Sequence[Any]) -> list[int]:
    """A shape for a node: the batch's dimension, which is no number, as -1."""
    return [size if isinstance(size, int) else -1 for size in shape]


def _named(shape: Sequence[Any]) -> list[int | str]:
    return [size if isinstance(size, int) else "batch" for size in shape]


def _is_view(shape: Sequence[Any], have: Layout) -> bool:
    """Whether a layout's memory is that of the trace's: only axes of one element have moved."""
    moved = [axis for axis in have if shape[axis] != 1]
    return moved == sorted(moved)


def _merge_softmaxes(graph: _Graph) -> None:
    """Makes one node of exp(x - max x) / sum exp(x - max x) along one axis."""
    makers = {name: node for node in graph.nodes for name in node.output}

    def maker(name: str, kind: str) -> Any:
        node = makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def reduced(name: str, kind: str) -> tuple[str, int] | None:
        """What a node reduces, and along which axis, where the axis is kept with one element."""
        shape = maker(name, "Reshape")
        node = shape and maker(shape.input[0], kind)
        if not node:
            return None
        attributes = {each.name: list(each.ints) for each in node.attribute}
        axes = attributes["axes"] if len(node.input) == 1 else graph.weights[node.input[1]]
        kept = len(axes) == 1 and graph.weights[shape.input[1]][axes[0]] == 1
        return (node.input[0], int(axes[0])) if kept else None

    for node in graph.nodes:
        total = reduced(node.input[1], "ReduceSum") if node.op_type == "Div" else None
        exponential = maker(node.input[0], "Exp") if total else None
        if not exponential or total is None or total[0] != exponential.output[0]:
            continue
        difference = maker(exponential.input[0], "Sub")
        if difference and reduced(difference.input[1], "ReduceMax") == (
            difference.input[0],
            total[1],
        ):
            softmax = graph.onnx.helper.make_node(
                "Softmax", difference.input[:1], node.output, node.name, axis=total[1]
            )
            node.CopyFrom(softmax)
    needed = {"logits"}
    for node in reversed(graph.nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
    graph.nodes = [node for node in graph.nodes if needed.intersection(node.output)]


def _merge_biases(graph: _Graph) -> list[Any]:
    """The nodes, with what is added to a convolution's channels made its bias."""
    uses = Counter(name for node in graph.nodes for name in node.input)
    makers = {node.output[0]: node for node in graph.nodes if node.op_type == "Conv"}
    nodes, renamed = [], {}
    for node in graph.nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        conv = makers.get(node.input[0]) if node.op_type == "Add" else None
        offset = graph.weights.get(node.input[1]) if conv is not None else None
        if conv is None or offset is None or uses[conv.output[0]] > 1 or len(conv.input) > 2:
            nodes.append(node)
            continue
        channels = graph.weights[conv.input[1]].shape[0]
        if offset.shape != (1, channels, 1, 1):
            nodes.append(node)
            continue
        conv.input.append(graph.constant(offset.reshape(channels)))
        renamed[node.output[0]] = conv.output[0]
    return nodes
