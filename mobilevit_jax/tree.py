"""Parameter trees by path: flatten to "a/b/c" names, select by pattern, compare two trees readably.

Paths are public (checkpoints, conversion tables and configs name them), so there is one spelling of
them, made here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

Tree = Any  # a pytree; jax has no better type for one


def path_name(path: tuple[Any, ...]) -> str:
    """Spells a jax key path as "layer_1/block_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, in the tree's own order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Applies `function(path, leaf)` to every leaf and keeps the structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )


def difference(expected: Tree, given: Tree) -> list[str]:
    """Says leaf by leaf how `given` differs from `expected` in names and shapes.

    Returns:
        One line a leaf, sorted by path: "- path shape" is missing in `given`, "+ path shape" is too
        many there, "~ path shape, expected shape" has another shape. Empty when the two agree.
    """
    want = {name: tuple(leaf.shape) for name, leaf in flatten(expected).items()}
    have = {name: tuple(leaf.shape) for name, leaf in flatten(given).items()}
    lines = []
    for name in sorted(want.keys() | have.keys()):
        if name not in have:
            lines.append(f"- {name} {want[name]}")
        elif name not in want:
            lines.append(f"+ {name} {have[name]}")
        elif want[name] != have[name]:
            lines.append(f"~ {name} {have[name]}, expected {want[name]}")
    return lines


def count(tree: Tree) -> int:
    """Number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flatten_mapping(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted path, such as "optimizer.weight_decay"."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten_mapping(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
