"""Writes a trained network in a form that other runtimes take, and compares it with the original.

The file does what the network does at inference, in float32 with its batch norms folded, from
"image" (n h w 3) to "logits" (n k). Beside it lie the input specification and the labels, and what
the comparison found. A directory appears whole, or, past the tolerance, not at all.

Before editing: a format is a row of FORMATS. It is no model reference: whoever wants the network
back for `predict` or `serve` converts to the native format.
"""

import importlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from mobilevit_jax import build, report, steps
from mobilevit_jax.data import transforms
from mobilevit_jax.models import folding, kernels, zoo
from mobilevit_jax.tools import compare, coreml, files, formats, litert, onnx_graph, pretrained

PLATFORMS = ("cpu", "cuda", "tpu")
# Of max |Δ logit|, as a share of the range of the logits of an image; by --quantize.
TOLERANCES: Mapping[str, float] = {"": 1e-4, "fp16": 1e-2, "dynamic": 0.1, "int8": 0.25}
CALIBRATION = 256  # images at most


class Network(NamedTuple):
    """What is to be written.

    Attributes:
        function: of "image", a batch of uint8 RGB or of normalised float32, to "logits".
        size: (h, w) of the images.
        dtype: of the images.
        opset: of ONNX.
        quantize: key of TOLERANCES.
        calibration: images as the function takes them; none but for int8.
    """

    function: Callable[[jax.Array], jax.Array]
    size: tuple[int, int]
    dtype: np.dtype
    opset: int
    quantize: str
    calibration: Sequence[np.ndarray]

    def image(self, batch: Any) -> jax.ShapeDtypeStruct:
        """Shape of a batch of images."""
        return jax.ShapeDtypeStruct((batch, *self.size, 3), self.dtype)


class Exported(NamedTuple):
    """What was written: its place, its size, and how it compares; None where nothing can run it."""

    path: pathlib.Path
    format: str
    bytes: int
    comparison: compare.Comparison | None
    notes: tuple[str, ...]


def export(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    format: str,
    raw_input: bool = False,
    quantize: str = "",
    weights: str = "ema",
    checkpoint: str = "newest",
    size: tuple[int, int] | None = None,
    opset: int = onnx_graph.OPSET,
    images: pathlib.Path | None = None,
    calibrate: pathlib.Path | None = None,
) -> Exported:
    """Writes the model that a reference means to a new directory, and compares it.

    Args:
        source: model reference, see pretrained.FORMS.
        target: directory that is not there yet, or empty.
        format: key of `FORMATS`.
        raw_input: take uint8 RGB, and do scaling, channel order, mean and deviation inside.
        quantize: with tflite: "fp16" weights, "dynamic" (int8 weights), or "int8" (activations
            too, see `litert.quantize`).
        weights: of a run: "ema" or "raw".
        checkpoint: of a run: "newest", "best" or a step.
        size: (h, w) of the images; None for the network's own.
        opset: of ONNX, in onnx_graph.OPSETS.
        images: folder of images to compare on; None for the photographs of the package foolbox, or
            where that is not installed, noise.
        calibrate: folder of images like those it will see, for int8.

    Raises:
        ConfigError: the target is taken, options do not go together, or a package is missing.
        CheckpointError: the source cannot be read, the target not be written, or the file computes
            something else than the network.
        DataError: an image is broken, or a folder holds none.
    """
    if format not in FORMATS:
        raise build.ConfigError(f"format is {format!r}; there are {', '.join(FORMATS)}")
    row, target = FORMATS[format], pathlib.Path(target).expanduser()
    _check(format, quantize=quantize, opset=opset, calibrate=calibrate)
    files.check_free(target)
    files.check_installed(row.modules, extra=format)
    loaded = pretrained.read(source, weights=weights, checkpoint=checkpoint)
    loaded = _resized(loaded, size)
    spec = loaded.pretrained.input_spec
    shown, whence = compare.images(images, spec)
    model = loaded.pretrained.model.clone(dtype=jnp.float32, remat=())
    variables = loaded.pretrained.variables
    prepare = _prepare(spec, raw_input)
    calibration = (
        [] if calibrate is None else compare.read_folder(calibrate, spec, most=CALIBRATION)
    )
    folded = folding.complete(folding.fold_norms(variables))
    network = Network(
        inference(model, folded, spec, raw_input=raw_input),
        size=spec.size,
        dtype=np.dtype(np.uint8 if raw_input else np.float32),
        opset=opset,
        quantize=quantize,
        calibration=[prepare(image) for image in calibration],
    )
    with files.new_directory(target) as directory:
        path = directory / row.file
        row.write(network, path)
        comparison = None
        if row.open is not None:
            reference = jax.jit(inference(model, variables, spec, raw_input=True))
            comparison = compare.compare(
                row.open(path),
                reference,
                shown,
                prepare,
                source=whence,
                tolerance=TOLERANCES[quantize],
                single=row.one_thread,
            )
            compare.check_same(comparison, f"{source} as {format}")
        notes = (*row.notes, *(f"Note: {note}." for note in loaded.notes))
        exported = Exported(target / row.file, format, _size(path), comparison, notes)
        config = formats.write_native(
            loaded.family,
            zoo.fields(loaded.pretrained.model),
            loaded.pretrained.labels,
            spec,
            source=loaded.source,
        )
        files.write_json(directory / "config.json", config)
        (directory / "labels.txt").write_text(
            "".join(f"{label}\n" for label in loaded.pretrained.labels), encoding="utf-8"
        )
        files.write_json(directory / "export.json", _record(exported, network, row, raw_input))
    return exported


def _check(format: str, *, quantize: str, opset: int, calibrate: pathlib.Path | None) -> None:
    if quantize not in TOLERANCES:
        allowed = ", ".join(filter(None, TOLERANCES))
        raise build.ConfigError(f"quantize is {quantize!r}; there are {allowed}")
    if quantize and format != "tflite":
        raise build.ConfigError(f"only tflite is quantised here; leave --quantize={quantize} out")
    if (quantize == "int8") != (calibrate is not None):
        raise build.ConfigError(
            "int8 needs images like those it will see: --calibrate=DIR; nothing else takes any"
        )
    if opset not in onnx_graph.OPSETS:
        opsets = onnx_graph.OPSETS
        raise build.ConfigError(f"opset is {opset}; there are {opsets[0]} to {opsets[-1]}")


def _resized(loaded: pretrained.Loaded, size: tuple[int, int] | None) -> pretrained.Loaded:
    """The network for images of another size, of which as much is cropped as before."""
    network = loaded.pretrained
    spec = network.input_spec
    if size is not None and min(size) > 0:
        resize = round(spec.resize * min(size) / min(spec.size))
        spec = spec._replace(size=size, resize=resize)
    shape = jax.ShapeDtypeStruct((1, *(size or spec.size), 3), jnp.float32)
    try:
        jax.eval_shape(network.model.apply, network.variables, shape)
    except (ValueError, TypeError) as error:  # the network's own words
        height, width = size or spec.size
        message = str(error).splitlines()[0]
        raise build.ConfigError(f"images of {height}x{width}: {message}") from error
    return loaded._replace(pretrained=network._replace(input_spec=spec))


def inference(
    model: zoo.nn.Module, variables: Any, spec: transforms.InputSpec, *, raw_input: bool
) -> Callable[[jax.Array], jax.Array]:
    """The function from images, uint8 RGB with `raw_input` or else normalised, to logits.

    In it are XLA's operations only: no other program knows our kernels.
    """
    variables = jax.tree.map(jnp.asarray, variables)

    def run(image: jax.Array) -> jax.Array:
        x = steps.normalize(image, spec) if raw_input else image
        with kernels.use(False):
            outputs: Any = model.apply(variables, x)
        return outputs["logits"]

    return run


def _prepare(spec: transforms.InputSpec, raw_input: bool) -> compare.Run:
    """From images as they are decoded to those that the file takes."""
    if raw_input:
        return lambda image: image
    normalize = jax.jit(lambda image: steps.normalize(image, spec))
    return lambda image: np.asarray(normalize(image))


def _size(path: pathlib.Path) -> int:
    inside = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in inside if each.is_file())


def _record(exported: Exported, network: Network, row: "Format", raw: bool) -> dict[str, Any]:
    """export.json: how to feed the file, and what the comparison found."""
    comparison = exported.comparison
    return {
        "format": exported.format,
        "file": row.file,
        "bytes": exported.bytes,
        "input": {
            "name": "image",
            "dtype": row.pixels if raw else network.dtype.name,
            "shape": ["batch" if row.any_batch else 1, *network.size, 3],
            "pixels": "RGB, 0..255" if raw else "normalised as input_spec in config.json says",
        },
        "output": "logits, in the order of labels.txt",
        "quantize": network.quantize or None,
        "opset": network.opset if exported.format == "onnx" else None,
        "comparison": None if comparison is None else comparison._asdict(),
        "versions": {
            name: importlib.metadata.version(name.replace("_", "-"))
            for name in ("mobilevit_jax", "jax", *row.modules)
        },
    }


def print_exported(exported: Exported, console: Console) -> None:
    """Prints what was written and how it compares, and remarks."""
    comparison = exported.comparison
    header, cells = ["file", "MB"], [exported.path.name, f"{exported.bytes / 1e6:,.2f}"]
    if comparison is not None:
        header += ["max |Δ logit|", "of their range", "tolerance", "same label"]
        cells += [
            f"{comparison.difference:.1e}",
            f"{comparison.share:.1e}",
            f"{comparison.tolerance:.2g}",
            f"{100 * comparison.agreement:.0f} %",
        ]
        if comparison.latency is not None:
            header.append("ms an image, one thread")
            cells.append(f"{1e3 * comparison.latency:.1f}")
    report.print_table(header, [cells], console)
    notes = exported.notes
    if comparison is not None:
        notes = (f"Compared on {comparison.images} {comparison.source}.", *notes)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


# --- formats --------------------------------------------------------------------------------------


def _write_stablehlo(network: Network, path: pathlib.Path) -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    function = jax.jit(network.function)
    exported = jax.export.export(function, platforms=PLATFORMS)(network.image(batch))
    path.write_bytes(exported.serialize())


def _open_stablehlo(path: pathlib.Path) -> compare.Run:
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(exported.call)
    return lambda image: np.asarray(call(image))


def _write_onnx(network: Network, path: pathlib.Path) -> None:
    (batch,) = jax.export.symbolic_shape("batch")
    try:
        content = onnx_graph.convert(
            network.function, network.image(batch), opset=network.opset, producer=formats.LIBRARY
        )
    except NotImplementedError as error:
        raise build.ConfigError(f"this network cannot be expressed: {error}") from error
    path.write_bytes(content)


def open_onnx(path: pathlib.Path) -> compare.Run:
    """ONNX Runtime at one thread."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0]


def _lowered(network: Network) -> jax.export.Exported:
    """For one image. Depthwise convolutions are whole on a TPU, and in pieces on a CPU."""
    return jax.export.export(jax.jit(network.function), platforms=["tpu"])(network.image(1))


def _write_tflite(network: Network, path: pathlib.Path) -> None:
    litert.convert(_lowered(network).mlir_module(), path)
    if network.quantize:
        litert.quantize(path, how=network.quantize, calibration=network.calibration)


def _write_coreml(network: Network, path: pathlib.Path) -> None:
    coreml.convert(network.function, network.image(1), path)


class Format(NamedTuple):
    """A form of a network.

    Attributes:
        file: name of the file, or of the directory that stands for one.
        write: makes it.
        open: a runtime for it; None where there is none on this machine.
        modules: that the extra of the format's name installs.
        any_batch: whether it takes any number of images; else one.
        pixels: dtype of images with raw_input.
        one_thread: whether its latency is that of one thread.
        notes: for the user.
    """

    file: str
    write: Callable[[Network, pathlib.Path], None]
    open: Callable[[pathlib.Path], compare.Run] | None
    modules: Sequence[str] = ()
    any_batch: bool = True
    pixels: str = "uint8"
    one_thread: bool = True
    notes: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "stablehlo": Format(
        "model.stablehlo",
        _write_stablehlo,
        _open_stablehlo,
        one_thread=False,
        notes=(
            "Run it with jax.export.deserialize(bytes).call(image), on any of "
            f"{', '.join(PLATFORMS)}.",
        ),
    ),
    "onnx": Format(
        "model.onnx",
        _write_onnx,
        open_onnx,
        modules=onnx_graph.MODULES,
    ),
    "tflite": Format(
        "model.tflite",
        _write_tflite,
        litert.open_file,
        modules=litert.MODULES,
        any_batch=False,
    ),
    "coreml": Format(
        "model.mlpackage",
        _write_coreml,
        None,
        modules=coreml.MODULES,
        pixels="int32",  # Core ML has no arrays of uint8
        any_batch=False,
        notes=(
            "It runs on Apple's machines only (iOS 18, macOS 15), in float16: nothing here could "
            "compare it with the network.",
        ),
    ),
}
