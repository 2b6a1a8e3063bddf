"""Files of weights from elsewhere, safetensors, PyTorch's and the Hub's; new directories for ours.

Before editing: files come from strangers. Nothing in them is executed, and whatever is wrong with
them is one message. torch and huggingface_hub are optional, and imported where they are needed.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mobilevit_jax import build, checkpoint
from mobilevit_jax.tools import names

# Weights in a directory, the first that is there.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
HUB_PREFIX = "hf-hub:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Exact in float32.
DTYPES = (np.float32, np.float16, jnp.bfloat16)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is not there or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise checkpoint.CheckpointError(f"{path} holds no JSON object")
    return values


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays of a file by key, floating-point ones in float32.

    Raises:
        ConfigError: the name is not that of a file of weights, or torch is missing to read it.
        CheckpointError: it is broken, or holds something else than tensors.
    """
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        state = _read_torch(path)
    else:
        raise build.ConfigError(
            f"{path} is no file of weights; those end in {', '.join(TORCH_SUFFIXES)} or "
            ".safetensors"
        )
    wrong = [
        f"{key} {array.dtype}"
        for key, array in state.items()
        if array.dtype not in DTYPES and not key.endswith(names.COUNTER)
    ]
    if wrong:
        raise checkpoint.CheckpointError(
            f"{path} holds arrays that are not float32, float16 or bfloat16:{names.failures(wrong)}"
        )
    return {
        key: array if key.endswith(names.COUNTER) else array.astype(np.float32, copy=False)
        for key, array in state.items()
    }


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise checkpoint.CheckpointError(
            f"{path} is no whole safetensors file ({error}); half a download? Fetch it again"
        ) from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = optional("torch", f"{path.name} was written by PyTorch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, just before it fails
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load it all the same.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise _not_torch(path, "another kind of pickle, or none") from error
        raise checkpoint.CheckpointError(
            f"{path} holds Python code ({code[1]}) that would be executed on loading, and is "
            "refused. Ask for a file that holds nothing but tensors, best in safetensors"
        ) from error
    except Exception as error:  # whatever torch's readers raise on bad bytes
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _not_torch(path, reason) from error
    if not isinstance(state, Mapping):
        raise checkpoint.CheckpointError(f"{path} holds a {type(state).__name__}, no state dict")
    others = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        shown = ", ".join(str(key) for key in others[:5])
        raise checkpoint.CheckpointError(
            f"{path} is no plain state dict: besides tensors it holds {shown}. "
            "Of cvnets' training files, give checkpoint_*.pt, not training_checkpoint_*.pt"
        )
    return {str(key): _to_numpy(torch, tensor) for key, tensor in state.items()}


def _not_torch(path: pathlib.Path, reason: str) -> checkpoint.CheckpointError:
    return checkpoint.CheckpointError(
        f"{path} is no whole PyTorch file ({reason}); half a download? Fetch it again"
    )


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    # numpy has no bfloat16 that torch knows of; widening to float32 is exact.
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.detach().contiguous().numpy()


def optional(module: str, purpose: str) -> Any:
    """Imports a package that not everyone has.

    Raises:
        ConfigError: it is not installed; `purpose` begins the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise build.ConfigError(f"{purpose}; for that, pip install {module}") from error


def check_installed(modules: Iterable[str], *, extra: str) -> None:
    """Raises ConfigError where a module of one of our extras is missing; imports none."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise build.ConfigError(
                f"{module} is not installed; for that, pip install 'mobilevit_jax[{extra}]'"
            )


# --- new directories ------------------------------------------------------------------------------


def check_free(target: pathlib.Path) -> None:
    """Raises ConfigError where `new_directory` could not make one."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise build.ConfigError(
            f"{target} is there already and is not overwritten; give another, or delete it"
        )


@contextlib.contextmanager
def new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write to; it becomes the target whole, or goes with the first error.

    Raises:
        CheckpointError: it cannot be made or written to.
    """
    beside: pathlib.Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o777 & ~mask)  # mkdtemp's is for the owner only
        beside.rename(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise checkpoint.CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Values as people read them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the Hub ------------------------------------------------------------------------------------


def is_hub_id(reference: str) -> bool:
    """Whether it reads like owner/name or hf-hub:owner/name, with @revision or without.

    Where there is a directory called owner, only the second is an id: the first is a mistyped path.
    """
    name = reference.removeprefix(HUB_PREFIX)
    if HUB_ID.fullmatch(name) is None:
        return False
    return name != reference or not pathlib.Path(name).parent.is_dir()


def download(reference: str) -> pathlib.Path:
    """The directory of a model on the Hub, fetched where its files are not in the cache.

    Raises:
        ConfigError: huggingface_hub is not installed.
        CheckpointError: there is no such model, or no way to it.
    """
    repository, _, revision = reference.removeprefix(HUB_PREFIX).partition("@")
    config = _hub_file(repository, revision or None, "config.json")
    if config is None:
        raise checkpoint.CheckpointError(
            f"{repository} has no config.json on the Hugging Face Hub; it is no model of this kind"
        )
    # The cache names a directory after the commit: all files are to be of the same one.
    fetch = functools.partial(_hub_file, repository, config.parent.name)
    # What is in the cache is used as it is; the Hub is asked only for what is not.
    for local_only in (True, False):
        if any(fetch(name, local_only=local_only) for name in WEIGHTS[:2]):
            break
    else:
        raise checkpoint.CheckpointError(
            f"{repository} has no {' or '.join(WEIGHTS[:2])} on the Hugging Face Hub"
        )
    if "model_type" in read_json(config):  # timm has no such file
        try:
            fetch("preprocessor_config.json")
        except checkpoint.CheckpointError:
            warnings.warn(
                f"{repository}: preprocessor_config.json is not in the cache of the Hub; images "
                "are prepared as for the published weights",
                stacklevel=4,
            )
    return config.parent


def _hub_file(
    repository: str, revision: str | None, name: str, *, local_only: bool = False
) -> pathlib.Path | None:
    """A file of a repository, from the cache or else the network; None where there is none."""
    purpose = f"{repository} is an id on the Hugging Face Hub"
    hub = optional("huggingface_hub", purpose)
    errors = optional("huggingface_hub.errors", purpose)
    fetch = functools.partial(hub.hf_hub_download, repository, name, revision=revision)
    try:
        try:
            return pathlib.Path(fetch(local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return None if local_only else pathlib.Path(fetch())
    except errors.LocalEntryNotFoundError as error:
        raise checkpoint.CheckpointError(
            f"{repository}: {name} is not in the cache of the Hugging Face Hub, and the Hub cannot "
            f"be reached. Fetch it where there is a network (hf download {repository}) and copy "
            f"the cache, or give a directory.\n(There is no directory {repository} here.)"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise checkpoint.CheckpointError(
            f"{repository} cannot be fetched from the Hugging Face Hub: {reason}\n"
            f"(There is no directory {repository} here.)"
        ) from error
