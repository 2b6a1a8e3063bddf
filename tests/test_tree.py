import jax.numpy as jnp

from mobilevit_jax import tree

PARAMS = {"stem": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}, "head": [jnp.zeros(2)]}


def test_paths_name_dicts_and_sequences():
    assert list(tree.flatten(PARAMS)) == ["head/0", "stem/bias", "stem/kernel"]


def test_map_with_path_keeps_the_structure():
    names = tree.map_with_path(lambda name, leaf: f"{name}:{leaf.size}", PARAMS)
    assert names == {
        "stem": {"kernel": "stem/kernel:9", "bias": "stem/bias:3"},
        "head": ["head/0:2"],
    }


def test_difference_names_missing_extra_and_reshaped():
    given = {"stem": {"kernel": jnp.zeros((3, 4)), "scale": jnp.zeros(1)}, "head": [jnp.zeros(2)]}
    assert tree.difference(PARAMS, given) == [
        "- stem/bias (3,)",
        "~ stem/kernel (3, 4), expected (3, 3)",
        "+ stem/scale (1,)",
    ]
    assert tree.difference(PARAMS, PARAMS) == []


def test_flatten_mapping_spells_config_keys():
    assert tree.flatten_mapping({"a": {"b": {"c": 1}, "d": (2,)}, "e": 3}) == {
        "a.b.c": 1,
        "a.d": (2,),
        "e": 3,
    }
