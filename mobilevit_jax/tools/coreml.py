"""Core ML packages (.mlpackage), through StableHLO; made anywhere, run on Apple's machines only."""

import contextlib
import importlib
import io
import logging
import pathlib
import warnings
from collections.abc import Callable

import jax

from mobilevit_jax import checkpoint

MODULES = ("coremltools", "stablehlo_coreml")


def convert(
    function: Callable[[jax.Array], jax.Array], image: jax.ShapeDtypeStruct, path: pathlib.Path
) -> None:
    """Writes a function from "image" to "logits", of static shapes, in float16 inside.

    Raises:
        CheckpointError: what was written has other inputs or outputs than the function.
    """
    # Each import says what it lacks on a machine that is not Apple's.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    tools = importlib.import_module("coremltools")
    stablehlo = importlib.import_module("stablehlo_coreml")
    # Depthwise convolutions are whole on a TPU, and in pieces on a CPU.
    lowered = jax.jit(function).trace(image).lower(lowering_platforms=("tpu",))
    target = tools.target.iOS18
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # and its progress bars
        model = tools.convert(
            stablehlo.convert(lowered.compiler_ir("stablehlo"), minimum_deployment_target=target),
            source="milinternal",
            minimum_deployment_target=target,
            pass_pipeline=stablehlo.build_pass_pipeline(),
        )
        spec = model.get_spec()
        for ends, name in ((spec.description.input, "image"), (spec.description.output, "logits")):
            tools.utils.rename_feature(spec, ends[0].name, name)
        tools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True).save(
            str(path)
        )
        written = tools.models.MLModel(str(path), skip_model_load=True).get_spec().description
    expected = {"image": image.shape, "logits": jax.eval_shape(function, image).shape}
    found = {
        end.name: tuple(end.type.multiArrayType.shape) for end in (*written.input, *written.output)
    }
    if found != expected:
        raise checkpoint.CheckpointError(
            f"coremltools wrote a package with {found}, and the network has {expected}"
        )
