"""Sizes of the released models, and what a bad config is told."""

import dataclasses
import math
from typing import Any

import jax
import pytest

from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from sg4v_jax.models.projector import projector_depth
from sg4v_jax.models.sharegpt4v import abstract_model

TEXT_13B = TextConfig(hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40)


@pytest.mark.parametrize("tuned_from", [0, 12, 23])
@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (TextConfig(), {"text": 6_738_415_616, "projector": 20_979_712, "vision": 303_507_456}),
        (TEXT_13B, {"text": 13_015_864_320, "projector": 31_467_520, "vision": 303_507_456}),
    ],
    ids=["7b", "13b"],
)
def test_parameter_counts(text: TextConfig, counts: dict[str, int], tuned_from: int) -> None:
    """Spec 3.1."""
    shapes = abstract_model(ModelConfig(text=text).with_tuned_from(tuned_from))[1]
    found = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[part]))
        for part in ("text", "projector", "vision")
    }
    assert found == counts
    assert sum(found.values()) in (7_062_902_784, 13_350_839_296)


def test_released_vision_tower() -> None:
    vision = VisionConfig()
    assert (vision.num_used_layers, vision.num_patches, vision.num_image_tokens) == (23, 576, 576)
    assert dataclasses.replace(vision, select_feature="cls_patch").num_image_tokens == 577


@pytest.mark.parametrize(
    ("select_layer", "used"), [(-1, 24), (-2, 23), (24, 24), (23, 23), (1, 1), (0, 0), (-25, 0)]
)
def test_layers_below_the_selected_one(select_layer: int, used: int) -> None:
    assert VisionConfig(select_layer=select_layer).num_used_layers == used


def test_head_dim() -> None:
    assert TextConfig().head_dim == 128
    assert TextConfig(head_dim=80).head_dim == 80


def test_dicts_invert() -> None:
    config = ModelConfig(text=TEXT_13B, projector="linear").with_tuned_from(12)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision": {"num_heads": 7}}, "hidden_size 1024 does not divide by num_heads 7"),
        ({"vision": {"image_size": 10}}, "image_size 10 is smaller than patch_size 14"),
        (
            {"vision": {"select_feature": "cls"}},
            r"select_feature 'cls' is not one of \('patch', 'cls_patch'\)",
        ),
        ({"vision": {"select_layer": 25}}, "select_layer 25 lies outside 24 layers"),
        ({"vision": {"select_layer": -26}}, "select_layer -26 lies outside 24 layers"),
        ({"vision": {"tuned_from": 24}}, r"tuned_from 24 must lie in 0\.\.23 .*never computed"),
        ({"vision": {"tuned_from": -1}}, r"tuned_from -1 must lie in 0\.\.23"),
        ({"text": {"num_kv_heads": 5}}, "num_heads 32 does not divide by num_kv_heads 5"),
        ({"text": {"num_heads": 0}}, "hidden_size 4096 does not divide by num_heads 0"),
        ({"text": {"head_dim": 7}}, "head_dim 7 must be even"),
        ({"text": {"hiden_size": 8}}, r"unknown field model\.text\.hiden_size; did you mean 'hidden_size'\?"),
        ({"vision": {"xyz": 8}}, r"unknown field model\.vision\.xyz; known: hidden_size, "),
        ({"projecter": "linear"}, r"unknown field model\.projecter; did you mean 'projector'\?"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("kind", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp9x_gelu", 9)]
)
def test_projector_kinds(kind: str, depth: int) -> None:
    assert projector_depth(kind) == depth


@pytest.mark.parametrize("kind", ["identity", "mlp0x_gelu", "mlp10x_gelu", "mlp2x_relu", ""])
def test_bad_projector_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match="is not 'linear' or 'mlpNx_gelu'"):
        projector_depth(kind)
