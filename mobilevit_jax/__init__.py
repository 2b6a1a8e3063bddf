"""MobileViT in JAX. What users import is loaded on first use, so that importing this costs nothing.

* `load(reference)`: a pretrained network, see `mobilevit_jax.tools.pretrained`.
* `create(name, num_classes=…)`: a network without weights, see `mobilevit_jax.models.zoo`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilevit_jax.models.zoo import create
    from mobilevit_jax.tools.pretrained import load

    __version__: str

__all__ = ["__version__", "create", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("mobilevit_jax.tools.pretrained").load
    if name == "create":
        return importlib.import_module("mobilevit_jax.models.zoo").create
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
