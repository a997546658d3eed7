# SPDX-License-Identifier: Apache-2.0
"""Name tables: bijections that compute the same."""

import numpy as np
import pytest

from attnjax.errors import RecipeError
from attnjax.weights import export_params, flatten, import_params, layout_of, plan, unflatten
from attnjax.weights.names import conv, linear, norm, output, projections, rule, stacked

TABLE = tuple(
    line
    for group in (
        projections("block_{}/attention", "h.{}.qkv", ("query", "key", "value")),
        output("block_{}/attention/out", "h.{}.proj"),
        norm("block_{}/norm", "h.{}.ln"),
        conv("stem", "stem"),
        linear("head", "fc"),
        (rule("cls", "token"),),
    )
    for line in group
)
TABLES = {"theirs": TABLE}


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "cls": (1, 1, 6),
        "stem/kernel": (2, 3, 4, 6),
        "stem/bias": (6,),
        "head/kernel": (6, 5),
        "head/bias": (5,),
    }
    for i in (0, 11):
        for part in ("query", "key", "value"):
            shapes |= {
                f"block_{i}/attention/{part}/kernel": (6, 2, 3),
                f"block_{i}/attention/{part}/bias": (2, 3),
            }
        shapes |= {
            f"block_{i}/attention/out/kernel": (2, 3, 6),
            f"block_{i}/attention/out/bias": (6,),
            f"block_{i}/norm/scale": (6,),
            f"block_{i}/norm/bias": (6,),
        }
    leaves = {path: rng.standard_normal(s).astype(np.float32) for path, s in shapes.items()}
    return unflatten(leaves), shapes


def test_export_and_import_are_inverse():
    tree, shapes = params()
    for tables, rules in ((TABLES, TABLE), (None, None)):
        tensors = export_params(tree, rules)
        again = flatten(import_params(tensors, shapes, tables))
        for path, value in flatten(tree).items():
            np.testing.assert_array_equal(again[path], value)


def test_exported_tensors_compute_the_same():
    tree, _ = params()
    leaves, tensors = flatten(tree), export_params(tree, TABLE)
    x = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    assert tensors["h.11.qkv.weight"].shape == (18, 6)
    qkv = x @ tensors["h.11.qkv.weight"].T + tensors["h.11.qkv.bias"]
    value = np.einsum("bd,dnh->bnh", x, leaves["block_11/attention/value/kernel"])
    value = (value + leaves["block_11/attention/value/bias"]).reshape(4, 6)
    np.testing.assert_allclose(qkv[:, 12:], value, rtol=1e-6)
    merged = value.reshape(4, 2, 3)
    out = np.einsum("bnh,nhd->bd", merged, leaves["block_11/attention/out/kernel"])
    np.testing.assert_allclose(value @ tensors["h.11.proj.weight"].T, out, rtol=1e-5)
    np.testing.assert_array_equal(tensors["stem.weight"][5, 3], leaves["stem/kernel"][:, :, 3, 5])


def test_the_layout_is_recognised_by_names():
    tree, shapes = params()
    assert layout_of(list(export_params(tree, TABLE)), shapes, TABLES) == "theirs"
    assert layout_of(list(export_params(tree)), shapes, TABLES) == "attnjax"


def test_a_table_must_cover_every_parameter_once():
    _, shapes = params()
    with pytest.raises(RecipeError, match="parameter cls matches 0 rules"):
        plan(shapes, TABLE[:-1])
    with pytest.raises(RecipeError, match="parameter cls matches 2 rules"):
        plan(shapes, (*TABLE, rule("cls", "other")))
    with pytest.raises(RecipeError, match=r"tensor fc\.bias would hold"):
        plan(shapes, (*TABLE[:-1], rule("cls", "fc.bias")))
    lacking = {k: v for k, v in shapes.items() if k != "block_0/attention/key/kernel"}
    with pytest.raises(RecipeError, match=r"tensor h\.0\.qkv\.weight has only the parts"):
        plan(lacking, TABLE)


def test_other_dtypes_become_float32():
    tree, shapes = params()
    tensors = {k: v.astype(np.float16) for k, v in export_params(tree, TABLE).items()}
    again = flatten(import_params(tensors, shapes, TABLES))
    assert {leaf.dtype for leaf in again.values()} == {np.dtype("float32")}


def test_integers_are_no_parameters():
    with pytest.raises(RecipeError, match=r"no floating numbers \(1\): a int32"):
        import_params({"a": np.ones(2, np.int32)}, {"a": (2,)})


def test_a_tensor_may_be_fitted():
    tree, shapes = params()
    tensors = export_params(tree, TABLE) | {"token": np.ones((1, 3, 6), np.float32)}
    with pytest.raises(RecipeError, match=r"token \[1,3,6\] in the file, \[1,1,6\] here"):
        import_params(tensors, shapes, TABLES)
    fitted = import_params(
        tensors, shapes, TABLES, fit=lambda path, x, shape: x[:, :1] if path == "cls" else x
    )
    np.testing.assert_array_equal(fitted["cls"], 1)


STACKED = {"theirs": (stacked("layers/w/kernel", "h.{}.w", "in"), rule("cls", "token"))}


def test_a_stacked_parameter_is_one_tensor_per_layer():
    rng = np.random.default_rng(0)
    tree = {
        "layers": {"w": {"kernel": rng.standard_normal((11, 4, 2, 3)).astype(np.float32)}},
        "cls": rng.standard_normal(5).astype(np.float32),
    }
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    entries = plan(shapes, STACKED["theirs"])
    assert sorted(entries) == sorted([*(f"h.{i}.w" for i in range(11)), "token"])
    assert entries["h.10.w"].shape == (6, 4) and entries["h.10.w"].row == 10
    tensors = export_params(tree, STACKED["theirs"])
    np.testing.assert_array_equal(
        tensors["h.10.w"], tree["layers"]["w"]["kernel"][10].reshape(4, 6).T
    )
    again = flatten(import_params(tensors, shapes, STACKED))
    for path, leaf in flatten(tree).items():
        np.testing.assert_array_equal(again[path], leaf)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_wrong_layer_is_named(change):
    tree = {"layers": {"w": {"kernel": np.ones((3, 4, 2), np.float32)}}, "cls": np.ones(5)}
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    tensors = export_params(tree, STACKED["theirs"])
    if change == "missing":
        del tensors["h.1.w"]
    else:
        tensors |= {"h.3.w": tensors["h.1.w"]} if change == "extra" else {"h.1.w": np.ones((2, 5))}
    name = "h.3.w" if change == "extra" else "h.1.w"
    with pytest.raises(RecipeError, match=rf"{name}"):
        import_params(tensors, shapes, STACKED)


def test_parts_of_a_transposed_tensor_follow_each_other_along_its_outputs():
    """GPT-2: `[in, 3 out]` per layer holds query, key and value `[layers, in, heads, width]`."""
    rng = np.random.default_rng(0)
    parts = ("query", "key", "value")
    leaves = {part: rng.standard_normal((2, 4, 2, 3)).astype(np.float32) for part in parts}
    rules = (stacked(parts, "h.{}.qkv", "in_plain"),)
    tensors = export_params(leaves, rules)
    assert tensors["h.1.qkv"].shape == (4, 18)
    np.testing.assert_array_equal(tensors["h.1.qkv"][:, 6:12], leaves["key"][1].reshape(4, 6))
    shapes = {part: leaf.shape for part, leaf in leaves.items()}
    again = import_params(tensors, shapes, {"theirs": rules})
    for part in parts:
        np.testing.assert_array_equal(again[part], leaves[part])
