"""The PyTorch originals for side-by-side tests: imports that skip where they are not installed."""

import os
import warnings

import pytest

REASON = "the PyTorch originals (torch, transformers, timm) are not installed"


def import_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=REASON)
    torch.set_num_threads(1)  # more wait for one another where others use the cores too
    return torch


def _prepare():
    """Declares what torchvision's import asks for: both libraries import it.

    There is no build of it for torch without CUDA, so its operators are not there to be extended.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch = import_torch()
    # A CUDA build brings its own operators, and declaring them twice ends the process.
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _prepare.library = library  # its operators vanish with it


def import_transformers():
    _prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason=REASON)
        assert transformers.MobileViTForImageClassification
        assert transformers.MobileViTV2ForImageClassification
    return transformers


def import_timm():
    _prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("timm", reason=REASON)


def import_torchvision():
    _prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchvision", reason=REASON)
