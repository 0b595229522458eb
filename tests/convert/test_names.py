"""The name tables cover every parameter, and their layouts and renaming rules invert."""

import collections

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sg4v_jax.convert.names import (
    LAYOUTS,
    canonical_name,
    entries,
    file_shape,
    from_file,
    share4v_name,
    stacks,
    table,
    to_file,
)
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from sg4v_jax.models.sharegpt4v import abstract_model

CONFIGS = {
    "7b": ModelConfig(),
    "7b pre-training": ModelConfig().with_tuned_from(12),
    "7b fine-tuning": ModelConfig().with_tuned_from(23),
    "grouped queries, wide heads": ModelConfig(
        text=TextConfig(num_layers=2, hidden_size=60, num_heads=6, num_kv_heads=2, head_dim=24)
    ),
    "last layer": ModelConfig(vision=VisionConfig(num_layers=3, select_layer=-1, tuned_from=1)),
    "first layer": ModelConfig(vision=VisionConfig(num_layers=3, select_layer=1)),
    "one layer": ModelConfig(
        vision=VisionConfig(num_layers=1, select_layer=-1), text=TextConfig(num_layers=1)
    ),
    "linear projector": ModelConfig(projector="linear"),
    "deep projector": ModelConfig(projector="mlp9x_gelu"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_parameter_has_its_entries(config: ModelConfig) -> None:
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_model(config)[1]).items()}
    layers = collections.defaultdict(list)
    for entry in entries(config):
        layers[entry.path].append(entry.layer)
        ours = shapes[entry.path] if entry.layer is None else shapes[entry.path][1:]
        flattened = [axis for axes in LAYOUTS[entry.row.layout] for axis in axes]
        assert sorted(flattened) == list(range(len(ours))), entry
    assert layers.keys() == shapes.keys()
    for path, found in layers.items():
        assert found in ([None], list(range(shapes[path][0]))), path
    keys = [entry.key for entry in entries(config)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("layers", "count"), [(32, 686), (40, 758)])
def test_tensor_counts(layers: int, count: int) -> None:
    """Spec 5.2: 391 of the tower, 4 of the projector, 9 per layer and 3 of the decoder."""
    assert len(list(entries(ModelConfig(text=TextConfig(num_layers=layers))))) == count


def test_blocks_keep_their_numbers_in_any_split() -> None:
    config = ModelConfig(vision=VisionConfig(num_layers=6, select_layer=-2, tuned_from=2))
    assert {name: list(blocks) for name, blocks in stacks(config)["vision"].items()} == {
        "frozen": [0, 1],
        "tuned": [2, 3, 4],
        "unused": [5],
    }
    where = {
        entry.key: (entry.path[1], entry.layer)
        for entry in entries(config)
        if entry.key.endswith("mlp.fc1.bias")
    }
    assert where["vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"] == ("frozen", 1)
    assert where["vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"] == ("tuned", 0)
    assert where["vision_tower.vision_model.encoder.layers.5.mlp.fc1.bias"] == ("unused", 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_invert(layout: str) -> None:
    rank = sum(len(axes) for axes in LAYOUTS[layout])
    shape = (2, 3, 5, 7)[:rank]
    ours = np.arange(np.prod(shape)).reshape(shape)
    stored = to_file(layout, ours)
    assert stored.shape == file_shape(layout, shape)
    np.testing.assert_array_equal(from_file(layout, stored, shape), ours)


def test_layouts_mean_what_torch_does() -> None:
    """Each against the formula its comment states, so that a wrong but invertible one is noticed."""
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=5), generator.normal(size=(5, 2, 3))
    into = to_file("linear_to_heads", kernel)
    np.testing.assert_allclose((into @ x).reshape(2, 3), np.tensordot(x, kernel, 1))
    y, out = generator.normal(size=(2, 3)), generator.normal(size=(2, 3, 5))
    np.testing.assert_allclose(to_file("linear_from_heads", out) @ y.reshape(6), np.tensordot(y, out, 2))
    np.testing.assert_array_equal(to_file("bias_to_heads", y), y.reshape(6))
    np.testing.assert_array_equal(to_file("linear", into), into.T)
    conv = generator.normal(size=(2, 3, 4, 5))
    assert to_file("conv", conv)[4, 3, 1, 2] == conv[1, 2, 3, 4]


LAYER = "layers.11.self_attn.q_proj.weight"
NAMES = {
    f"language_model.model.{LAYER}": (f"model.language_model.{LAYER}", f"model.{LAYER}"),
    "language_model.model.embed_tokens.weight": (
        "model.language_model.embed_tokens.weight",
        "model.embed_tokens.weight",
    ),
    "language_model.model.norm.weight": ("model.language_model.norm.weight", "model.norm.weight"),
    "language_model.lm_head.weight": ("lm_head.weight",),
    f"vision_tower.vision_model.encoder.{LAYER}": (
        f"model.vision_tower.vision_model.encoder.{LAYER}",
        f"model.vision_tower.encoder.{LAYER}",
        f"model.vision_tower.vision_tower.vision_model.encoder.{LAYER}",
        f"vision_model.encoder.{LAYER}",
        f"encoder.{LAYER}",
    ),
    "vision_tower.vision_model.embeddings.class_embedding": (
        "model.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.embeddings.class_embedding",
        "vision_model.embeddings.class_embedding",
    ),
    "vision_tower.vision_model.pre_layrnorm.bias": ("model.vision_tower.pre_layrnorm.bias",),
    "vision_tower.vision_model.post_layernorm.bias": ("vision_model.post_layernorm.bias",),
    "multi_modal_projector.linear_1.weight": (
        "model.multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
        "mm_projector.0.weight",
        "model.mm_projector.weight",
    ),
    "multi_modal_projector.linear_2.bias": ("model.mm_projector.2.bias",),
    "multi_modal_projector.linear_9.bias": ("model.mm_projector.16.bias",),
}


@pytest.mark.parametrize("key", NAMES)
def test_names_of_every_layout_become_canonical(key: str) -> None:
    assert canonical_name(key) == key
    for name in NAMES[key]:
        assert canonical_name(name) == key


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
        "vision_model.embeddings.position_ids",
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids",
        "model.image_newline",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "visual_projection.weight",
        "logit_scale",
    ],
)
def test_what_is_no_parameter_is_dropped(name: str) -> None:
    assert canonical_name(name) is None


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora_A.weight", "surprise", "model.x"])
def test_unknown_names_stay(name: str) -> None:
    """They are for the caller to report, not to lose."""
    assert canonical_name(name) is not None


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp9x_gelu"])
def test_share4v_names_invert(projector: str) -> None:
    config = ModelConfig(
        projector=projector, vision=VisionConfig(num_layers=2), text=TextConfig(num_layers=2)
    )
    for entry in entries(config):
        assert canonical_name(share4v_name(entry.key, projector)) == entry.key


def test_share4v_names() -> None:
    """Spec 5.1."""
    names = {share4v_name(entry.key, "mlp2x_gelu") for entry in entries(ModelConfig())}
    assert {
        "model.embed_tokens.weight",
        "model.layers.31.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.encoder.layers.23.self_attn.out_proj.bias",
    } < names
    assert share4v_name("multi_modal_projector.linear_1.bias", "linear") == "model.mm_projector.bias"
    assert share4v_name("multi_modal_projector.linear_1.bias", "mlp1x_gelu") == "model.mm_projector.0.bias"


def test_rows_name_known_layouts() -> None:
    assert all(row.layout in LAYOUTS for row in table(ModelConfig()))
