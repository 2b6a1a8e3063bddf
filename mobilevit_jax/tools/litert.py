"""LiteRT files (.tflite): from StableHLO without TensorFlow, quantised, and run on XNNPACK.

Before editing: the converter lives in a process of its own, see litert_child.py.
"""

import contextlib
import importlib
import io
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from mobilevit_jax import build

MODULES = ("litert_converter", "ai_edge_litert", "ai_edge_quantizer")
SIGNATURE = "serving_default"
QUANTIZATIONS = ("fp16", "dynamic", "int8")
# What int8 leaves in float32. Squares and roots of a norm cannot be told apart in 256 steps: with
# them a trained v2 names every tenth image differently. The others XNNPACK has not in int8, so that
# they would be slower than in float32: attention between its projections, and hard swish.
NORMS = r"/norm(_\d+)?/(?!conv)"  # by the names of our modules; batch norms are folded into `conv`
FLOATS = ("BATCH_MATMUL", "SOFTMAX", "SUB", "SUM", "DIV", "HARD_SWISH")


def convert(module: str, path: pathlib.Path) -> None:
    """Writes a StableHLO module, of one function of "image" with static shapes.

    Raises:
        ConfigError: the converter cannot express the module.
    """
    child = pathlib.Path(__file__).with_name("litert_child.py")
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / "module.mlir"
        source.write_text(module)
        done = subprocess.run(
            [sys.executable, str(child), str(source), str(path)], capture_output=True, text=True
        )
    if done.returncode == 0:
        return
    reasons = [line for line in done.stderr.splitlines() if "rror: " in line]
    reason = reasons[0] if reasons else f"it ended with status {done.returncode}"
    raise build.ConfigError(f"litert-converter cannot express this network: {reason[:300]}")


def quantize(path: pathlib.Path, *, how: str, calibration: Sequence[np.ndarray]) -> None:
    """Replaces a file by a quantised one; its input and output stay as they are.

    Args:
        path: of a float32 file made by `convert`.
        how: of QUANTIZATIONS: float16 weights; int8 weights, with activations quantised as they
            come; or int8 weights and activations but for NORMS and FLOATS, with ranges from
            `calibration`.
        calibration: images as the file takes them.
    """
    quantizer = importlib.import_module("ai_edge_quantizer.quantizer")
    types = importlib.import_module("ai_edge_quantizer.qtyping")
    algorithms = importlib.import_module("ai_edge_quantizer.algorithm_manager")
    worker = quantizer.Quantizer(bytearray(path.read_bytes()))
    everything = {"regex": ".*", "operation_name": types.TFLOperationName.ALL_SUPPORTED}
    if how == "fp16":
        config = types.OpQuantizationConfig(
            weight_tensor_config=types.TensorQuantizationConfig(
                num_bits=16, dtype=types.TensorDataType.FLOAT
            ),
            compute_precision=types.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        )
        worker.update_quantization_recipe(
            **everything, op_config=config, algorithm_key=algorithms.AlgorithmName.FLOAT_CASTING
        )
    elif how == "dynamic":
        worker.add_dynamic_config(**everything, num_bits=8)
    else:
        worker.add_static_config(**everything, activation_num_bits=8, weight_num_bits=8)
        kept = [(".*", name) for name in (*FLOATS, "INPUT", "OUTPUT")]
        for scope, name in [(NORMS, "ALL_SUPPORTED"), *kept]:
            worker.update_quantization_recipe(
                scope,
                types.TFLOperationName[name],
                algorithm_key=algorithms.AlgorithmName.NO_QUANTIZE,
            )
    batches = {SIGNATURE: [{"image": image} for image in calibration]}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # its progress bars, and a warning of its own doing
        ranges = worker.calibrate(batches) if worker.need_calibration else None
        made = worker.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    path.write_bytes(made.quantized_model)


def open_file(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """LiteRT with XNNPACK at one thread, for one image at a time."""
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    loaded = interpreter.Interpreter(str(path), num_threads=1)
    run = loaded.get_signature_runner(SIGNATURE)
    return lambda image: run(image=image)["logits"]
