"""ONNX graphs of every network and attention, run in ONNX Runtime against JAX."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilevit_jax import steps
from mobilevit_jax.models import zoo
from mobilevit_jax.models.folding import complete, fold_norms
from mobilevit_jax.tools import onnx_graph
from tests.nets import SPEC
from tests.weights import random_variables

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BGR = SPEC._replace(channel_order="bgr", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
# The last maps of the networks with attention are 2x3, and are resized to 2x4.
NETWORKS = {
    "v1": ("mobilevit", {"variant": "xxs"}, (64, 96)),
    "v2": ("mobilevit_v2", {"width": 0.5}, (64, 96)),
    "linformer": ("mobilevit_v2", {"width": 0.5, "attention": "linformer", "latents": 4}, (64, 64)),
    "mobilenet_v1": ("mobilenet_v1", {"width": 0.25}, (64, 64)),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.25}, (64, 64)),
    "mobilenet_v3": ("mobilenet_v3", {"variant": "small"}, (64, 64)),
}


SOFTMAXES = {"v1": (9, 0), "linformer": (9, 0), "v2": (0, 9)}


@functools.cache
def network(name):
    """The function, a batch of its images, and their logits of the network as it was trained."""
    family, fields, size = NETWORKS[name]
    model = zoo.create(family, num_classes=6, **fields)
    trained = random_variables(model, seed=4, size=size)

    def run(image, variables):
        variables = jax.tree.map(jnp.asarray, variables)
        return model.apply(variables, steps.normalize(image, BGR))["logits"]

    image = np.random.default_rng(5).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    expected = jax.jit(functools.partial(run, variables=trained))(image)
    return (
        functools.partial(run, variables=complete(fold_norms(trained))),
        image,
        np.asarray(expected),
    )


def converted(name, *, opset=onnx_graph.OPSET):
    function, image, _ = network(name)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *image.shape[1:]), jnp.uint8)
    return onnx_graph.convert(function, shape, opset=opset, producer="test")


def session(content):
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.ptp(expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_network_does(name):
    content = converted(name)
    _, image, expected = network(name)
    file = session(content)
    (together,) = file.run(["logits"], {"image": image})
    close(together, expected)
    (alone,) = file.run(["logits"], {"image": image[1:2]})
    close(alone, expected[1:2])

    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(content)).graph
    ranks = [len(value.type.tensor_type.shape.dim) for value in graph.value_info]
    assert len(ranks) > 40
    assert max(ranks) <= 5
    kinds = Counter(node.op_type for node in graph.node)
    # Separable attention has its softmax over two axes, for which there is no node.
    assert (kinds["Softmax"], kinds["Exp"]) == SOFTMAXES.get(name, (0, 0))
    assert not kinds.keys() & {"BatchNormalization", "Gemm", "Einsum", "Expand", "GatherND"}


def test_norms_are_biases_and_maps_stay_channels_first():
    graph = onnx.load_from_string(converted("mobilenet_v1")).graph
    kinds = Counter(node.op_type for node in graph.node)
    # One transposition of the image; 27 convolutions with a bias each; the pooling; the head.
    assert kinds["Conv"] == 27
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "Conv")
    assert kinds["Transpose"] == 1
    assert kinds["Add"] == 1
    assert kinds["Mul"] == 0
    names = {weight.name for weight in graph.initializer}
    assert names == {name for node in graph.node for name in node.input if name in names}


@pytest.mark.parametrize("opset", [13, 21])
def test_opsets(opset):
    content = converted("v2", opset=opset)
    assert [each.version for each in onnx.load_from_string(content).opset_import] == [opset]
    _, image, expected = network("v2")
    close(session(content).run(None, {"image": image})[0], expected)


def test_what_there_is_no_node_for_is_named():
    (batch,) = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    with pytest.raises(NotImplementedError, match="cumsum has no form"):
        onnx_graph.convert(lambda x: jnp.cumsum(x, 1).sum((1, 2)), image, producer="test")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (2.0 - x).sum((1, 2)),  # a constant first
        lambda x: (x / 2 + x).max((1, 3)),
        lambda x: jnp.einsum("bhwc,ph->bpwc", x, jnp.ones((3, 8))).sum((1, 2)),
        lambda x: jnp.einsum("bhwc,cd->dbhw", x, jnp.eye(3, 5)).sum((0, 2)),
        lambda x: jnp.concatenate([x, -1.0 * x], -1).swapaxes(1, 3).sum((2, 3)),
        lambda x: jnp.flip(x, (1, 3)).max(2).reshape(-1, 24),
    ],
)
def test_nodes_by_themselves(function):
    (batch,) = jax.export.symbolic_shape("batch")
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    image = jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)
    (found,) = session(onnx_graph.convert(function, image, producer="test")).run(None, {"image": x})
    np.testing.assert_allclose(found, function(jnp.asarray(x)), rtol=1e-5, atol=1e-5)
