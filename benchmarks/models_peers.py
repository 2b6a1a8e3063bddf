"""The systems that benchmarks/models.py compares: one network, in one of them, in a process.

Started by models.py, as `python models_peers.py JOB`. When the network is built, compiled and warm,
the process says so in a line of JSON; then it runs a turn for every line it reads, and answers with
the seconds of each call. Each system imports what it needs in its own function.
"""

import contextlib
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

INFERENCE, TRAIN = "inference", "train"
CHECKED_STEPS = 3  # of training, whose losses are compared
CLASSES = 1000
# What every system does in a train step.
RATE, DECAY, SMOOTHING, EMA_DECAY = 1e-4, 0.05, 0.1, 0.9995


class Job(NamedTuple):
    """What a process is to do.

    Attributes:
        system: key of SYSTEMS.
        network: name of the zoo; timm has the same one under it.
        mode: INFERENCE or TRAIN.
        size: (h, w) of the images.
        dtype: "float32", or "bfloat16": ours computes in it, PyTorch by autocast.
        device: "cpu" or "cuda".
        cores: to run on.
        directory: holds the images and labels, and the weights in the layout of each library.
        orders: channel order that the weights want in each library.
    """

    system: str
    network: str
    mode: str
    size: tuple[int, int]
    dtype: str
    device: str
    cores: int
    directory: str
    orders: Mapping[str, str]

    def image(self) -> np.ndarray:
        """The batch: uint8 RGB, b h w 3."""
        return np.load(Path(self.directory) / "image.npy")

    def label(self) -> np.ndarray:
        """Its classes, int32."""
        return np.load(Path(self.directory) / "label.npy")

    def weights(self, layout: str) -> Path:
        """The directory with the weights in the layout of a library."""
        return Path(self.directory) / layout


class Program(NamedTuple):
    """`run` does one inference or one train step, and waits; `fetch` brings its result to numpy.

    That is the probabilities of the classes, or the loss.
    """

    run: Callable[[], Any]
    fetch: Callable[[Any], np.ndarray]
    # Hands memory back that the next process needs; whether the next call has to get it again.
    release: Callable[[], bool] = lambda: False


def mobilevit_jax(job: Job) -> Program:
    """The project's predict step, or its train step, as the command line runs them."""
    import jax

    run = {INFERENCE: _our_inference, TRAIN: _our_training}[job.mode](job)
    return Program(lambda: jax.block_until_ready(run()), np.asarray)


def _our_inference(job: Job) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    from mobilevit_jax.tools import predict, pretrained

    model = pretrained.load(job.weights("native"))
    model = model._replace(model=model.model.clone(dtype=jnp.dtype(job.dtype)))
    program = predict.program(model)
    image = jax.device_put(job.image())
    return lambda: program(model.variables, image)["probability"]


def _our_training(job: Job) -> Callable[[], Any]:
    import ours

    from mobilevit_jax import sharding, train
    from mobilevit_jax.tools import pretrained

    batch = {"image": job.image(), "label": job.label(), "mask": np.ones(len(job.label()), bool)}
    config = ours.config(job.network, size=job.size, batch_size=len(job.label()), dtype=job.dtype)
    built = ours.built(config)
    variables = pretrained.read(job.weights("native")).pretrained.variables
    shardings = sharding.shardings(built.abstract_state)
    state = train._warm_start(built.state(), variables, job.network, shardings)
    return ours.stepping(built, train.program(built.run, built.abstract_state), state, batch)


def pytorch(job: Job, *, library: str, compiled: bool, channels_last: bool) -> Program:
    """A PyTorch network, as its library builds it, in inference or in a train step."""
    torch = _torch(job)
    network = {"timm": _timm, "hf": _hugging_face}[library](job)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):  # Hugging Face's v1 has some of its own
            module.p = 0.0
    order = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(device=job.device, memory_format=order)
    # Its input is there as it wants it, where ours begins with uint8 and scales it.
    pixels = torch.from_numpy(job.image()).permute(0, 3, 1, 2) / 255
    if job.orders[library] == "bgr":
        pixels = pixels.flip(1)
    pixels = pixels.contiguous().to(device=job.device, memory_format=order)
    autocast = functools.partial(
        torch.autocast, job.device, dtype=torch.bfloat16, enabled=job.dtype == "bfloat16"
    )
    forward = torch.compile(network) if compiled else network
    if job.mode == INFERENCE:
        network.eval()

        def run() -> Any:
            with torch.inference_mode(), autocast():
                return torch.softmax(_logits(forward(pixels)).float(), -1)
    else:
        run = _pytorch_step(job, network, forward, pixels, autocast)

    def synchronized() -> Any:
        result = run()
        if job.device == "cuda":
            torch.cuda.synchronize()
        return result

    def release() -> bool:
        if job.device == "cuda":
            torch.cuda.empty_cache()
        return job.device == "cuda"

    return Program(synchronized, lambda result: result.detach().float().cpu().numpy(), release)


def _pytorch_step(
    job: Job, network: Any, forward: Any, pixels: Any, autocast: Callable[[], Any]
) -> Callable[[], Any]:
    """Forward, loss, backward, AdamW and the average of weights and statistics."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    network.train()
    label = torch.from_numpy(job.label()).long().to(job.device)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits = _logits(forward(pixels))
        loss = torch.nn.functional.cross_entropy(logits.float(), label, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        return loss

    return run


def _torch(job: Job) -> Any:
    """PyTorch at as many threads as there are cores, with the precision that jax has on a GPU."""
    import torch

    torch.set_num_threads(job.cores)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    # timm and transformers import torchvision, which there may be no build of for this PyTorch: its
    # own operators are then declared, so that the import finds them.
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        torch.declared = library  # its operators vanish with it
    return torch


def _timm(job: Job) -> Any:
    import timm

    network = timm.create_model(job.network, num_classes=CLASSES)
    directory = job.weights("timm")
    if directory.exists():
        timm.models.load_checkpoint(network, str(directory / "model.safetensors"))
    else:  # a MobileNet has no converter to timm: the same layers come in the same order
        _load_in_order(network, job.weights("cvnets"))
    return network


def _load_in_order(network: Any, directory: Path) -> None:
    """Gives the convolutions, norms and the classifier of a network cvnets' weights, in order."""
    import torch
    from safetensors.torch import load_file

    # A block of cvnets has them in this order, and they come by layer and block.
    parts = ("exp_1x1", "conv_3x3", "red_1x1")
    ranks = {"conv_1": 0, "conv_1x1_exp": 8, "classifier": 9}

    def rank(key: str) -> tuple[int, ...]:
        layer, *rest = key.split(".")
        if layer in ranks:
            return (ranks[layer],)
        block = int(rest[0].rpartition("_")[2])
        part = next(i for i, name in enumerate(parts) if name in rest)
        return int(layer.rpartition("_")[2]), block, part

    state = load_file(directory / "model.safetensors")
    for kind, name in (
        (torch.nn.Conv2d, "conv"),
        (torch.nn.BatchNorm2d, "norm"),
        (torch.nn.Linear, "classifier_fc"),
    ):
        layers = [module for module in network.modules() if isinstance(module, kind)]
        prefixes = {key.rpartition(".")[0] for key in state}
        prefixes = sorted((p for p in prefixes if p.endswith(name)), key=rank)
        for layer, prefix in zip(layers, prefixes, strict=True):
            own = {key: state[f"{prefix}.{key}"] for key in layer.state_dict()}
            layer.load_state_dict(own)


def _hugging_face(job: Job) -> Any:
    import transformers

    return transformers.AutoModelForImageClassification.from_pretrained(job.weights("hf"))


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def onnx_runtime(job: Job, *, library: str) -> Program:
    """ONNX Runtime, on timm's network as PyTorch exports it, or on `launch.py export`'s file."""
    import onnxruntime

    path = Path(job.directory) / f"{library}.onnx"
    pixels = np.float32(job.image()) / 255
    if library == "timm":
        torch = _torch(job)
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        if job.orders["timm"] == "bgr":
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        torch.onnx.export(
            _timm(job).eval(),
            (torch.from_numpy(pixels),),
            path,
            dynamo=False,  # the other exporter wants one package more, and writes the same layers
            input_names=["image"],
            output_names=["logits"],
        )
    else:
        from mobilevit_jax.tools import export

        target = Path(job.directory) / "export"
        exported = export.export(job.weights("native"), target, format="onnx", size=job.size)
        path = exported.path
        if job.orders["native"] == "bgr":
            pixels = np.ascontiguousarray(pixels[..., ::-1])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.cores
    provider = "CUDAExecutionProvider" if job.device == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(path, options, providers=[provider])

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    return Program(lambda: session.run(["logits"], {"image": pixels})[0], softmax)


class System(NamedTuple):
    """What is compared.

    Attributes:
        label: for the table.
        needs: importable modules.
        layouts: of the weights it can be given, one of them at least.
        modes: that it has.
        build: makes the program.
    """

    label: str
    needs: tuple[str, ...]
    layouts: tuple[str, ...]
    modes: tuple[str, ...]
    build: Callable[[Job], Program]


def _pytorch_systems() -> Iterator[tuple[str, System]]:
    """Both libraries, eager and compiled, in both memory formats."""
    for library, label, layouts in (
        ("timm", "timm", ("timm", "cvnets")),
        ("hf", "Hugging Face", ("hf",)),
    ):
        for compiled in (False, True):
            for last in (False, True):
                name = f"{library}_{'compile' if compiled else 'eager'}{'_last' if last else ''}"
                how = "torch.compile" if compiled else "eager"
                package = "transformers" if library == "hf" else "timm"
                yield (
                    name,
                    System(
                        f"{label}, {how}{', channels_last' if last else ''}",
                        ("torch", package),
                        layouts,
                        (INFERENCE, TRAIN),
                        functools.partial(
                            pytorch, library=library, compiled=compiled, channels_last=last
                        ),
                    ),
                )


# fmt: off
SYSTEMS: Mapping[str, System] = {
    "ours": System("mobilevit_jax", (), ("native",), (INFERENCE, TRAIN), mobilevit_jax),
    **dict(_pytorch_systems()),
    "onnx_timm": System(
        "ONNX Runtime, timm's network", ("torch", "timm", "onnx", "onnxruntime"),
        ("timm", "cvnets"), (INFERENCE,), functools.partial(onnx_runtime, library="timm")),
    "onnx_ours": System(
        "ONNX Runtime, launch.py export", ("onnx", "onnxruntime"),
        ("native",), (INFERENCE,), functools.partial(onnx_runtime, library="ours")),
}
# fmt: on


def _serve(job: Job, answer: Callable[[Any], None]) -> None:
    """Builds, tells when it is ready and what it computed, and runs a turn for every line."""
    began = time.perf_counter()
    program = SYSTEMS[job.system].build(job)
    built = time.perf_counter()
    results = [program.fetch(program.run())]
    first = time.perf_counter()
    if job.mode == TRAIN:
        results += [program.fetch(program.run()) for _ in range(1, CHECKED_STEPS)]
    np.save(Path(job.directory) / f"{job.system}.npy", np.stack(results))
    program.run()
    program.release()
    answer({"build_s": built - began, "first_call_s": first - built})
    cold = program.release()
    for line in sys.stdin:
        if cold:
            program.run()
        seconds, budget = [], float(line)
        while not seconds or sum(seconds) < budget:
            seconds.append(measure.timed(program.run))
        cold = program.release()
        answer(seconds)


def main() -> None:
    """Runs one system for models.py."""
    job = Job(**json.loads(sys.argv[1]))
    job = job._replace(size=tuple(job.size))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    # What libraries print goes to the other stream: this one is for the answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")

    def answer(value: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            channel.write(json.dumps(value) + "\n")
            channel.flush()

    _serve(job, answer)


if __name__ == "__main__":
    main()
