"""Checkpoints there and back: nothing is lost or changed, whatever the format, layout and dtype."""

import json
import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from sg4v_jax.convert.checkpoint import PARTS
from sg4v_jax.convert.huggingface import read_config
from sg4v_jax.convert.load import open_part
from sg4v_jax.convert.params import from_params, padded_vocab_size, to_params
from sg4v_jax.convert.tensors import ConversionError
from sg4v_jax.models.config import ModelConfig, TextConfig, VisionConfig
from sg4v_jax.models.sharegpt4v import abstract_model, resplit_vision
from tests.convert.models import load, save
from tests.convert.writers import renamed
from tests.torch_llava import PADDED_VOCAB, VOCAB, arrays, llava_config, llava_model

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd": {
        "vision": {"image_size": 45, "num_attention_heads": 4},
        "text": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24},
    },
}
SMALL = ModelConfig(
    vision=VisionConfig(
        hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, image_size=28, patch_size=14
    ),
    text=TextConfig(
        vocab_size=VOCAB, hidden_size=12, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1
    ),
)
Params = dict[str, Any]


def random_params(config: ModelConfig, dtype: Any = np.float32) -> Params:
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(dtype), abstract_model(config)[1]
    )


def assert_equal(found: Params, expected: Params) -> None:
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg="/".join(path))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return llava_model(llava_config())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_to_us_and_back(shape: str, dtype: str, tmp_path: pathlib.Path) -> None:
    model = llava_model(llava_config(**SHAPES[shape]), dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    config, params = load(tmp_path / "theirs")
    assert config.text.vocab_size == VOCAB
    assert {str(leaf.dtype) for leaf in flatten_dict(params).values()} == {dtype}
    save(tmp_path / "ours", config, params, "hf", dtype=dtype)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again.dtype == model.dtype
    states, expected = again.state_dict(), model.state_dict()
    assert states.keys() == expected.keys()
    # Of the added rows nothing is kept: ours are the mean of the others.
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        added, rows = states[name][VOCAB:], expected[name][:VOCAB]
        assert states[name].shape == (PADDED_VOCAB, config.text.hidden_size)
        torch.testing.assert_close(
            added, rows.double().mean(0).to(rows.dtype).expand_as(added), rtol=0, atol=0
        )
        expected[name] = torch.cat([rows, added])
    for name, tensor in expected.items():
        assert states[name].dtype == tensor.dtype
        assert torch.equal(states[name], tensor), name
    config_again, params_again = load(tmp_path / "ours")
    assert config_again == config
    assert_equal(params_again, params)


def test_unused_weights_survive(theirs: Any, tmp_path: pathlib.Path) -> None:
    """The block above the selected layer and the norm after it reach the exported tower."""
    config = read_config(theirs.config.to_dict())
    params = to_params(config, arrays(theirs))
    save(tmp_path / "s", config, params, "share4v", dtype="float32")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "s" / "vision_tower")
    expected = theirs.model.vision_tower.state_dict()
    assert {"encoder.layers.3.mlp.fc1.weight", "post_layernorm.weight"} < expected.keys()
    assert tower.state_dict().keys() == expected.keys()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("layout", ["A", "B", "5", "original"])
def test_layouts(layout: str, theirs: Any, tmp_path: pathlib.Path) -> None:
    config = read_config(theirs.config.to_dict())
    tensors = {renamed(name, layout): array for name, array in arrays(theirs).items()}
    first = {"A": "language_model.model.", "B": "model.language_model.", "5": "model.language_model."}
    assert f"{first.get(layout, 'model.')}layers.0.mlp.up_proj.weight" in tensors
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq" if layout == "original" else "model.image_newline"
    tensors[extra] = np.zeros(4, np.float32)
    expected = to_params(config, arrays(theirs))
    assert_equal(to_params(config, tensors), expected)
    if layout != "original":
        theirs.config.save_pretrained(tmp_path)
        save_file(tensors, tmp_path / "model.safetensors")
        assert_equal(load(tmp_path)[1], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "mlp3x_gelu"])
def test_share4v_and_back(projector: str, dtype: str, tmp_path: pathlib.Path) -> None:
    vision = VisionConfig(**{**SMALL.vision.__dict__, "select_layer": -1, "select_feature": "cls_patch"})
    config = ModelConfig(vision=vision, text=SMALL.text, projector=projector)
    params = random_params(config, {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    save(tmp_path / "s", config, params, "share4v", dtype=dtype, aspect="square")
    found, again = load(tmp_path / "s")
    assert found == config
    assert_equal(again, params)
    assert json.loads((tmp_path / "s" / "config.json").read_text())["image_aspect_ratio"] == "square"
    # Its files hold their own part only, under the names of spec 5.1.
    assert all(
        name.startswith("vision_model.") for name in load_file(tmp_path / "s/vision_tower/model.safetensors")
    )
    assert not any("vision" in name for name in load_file(tmp_path / "s/model.safetensors"))


def write_torch_shards(directory: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """PyTorch shards with an index, in bfloat16, as ShareGPT4V is published."""
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        shard = {name: torch.from_numpy(tensors[name]).bfloat16() for name in names if files[name] == file}
        torch.save(shard, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


def make_original(directory: pathlib.Path, params: Params, tower: str = "Lin-Chen/tower") -> None:
    """The layout of the published repositories: PyTorch shards, and a tower without a directory in them."""
    save(directory, SMALL, params, "share4v", dtype="float32")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    (directory / "model.safetensors").unlink()
    write_torch_shards(directory, tensors)
    fields = json.loads((directory / "config.json").read_text())
    fields |= {"mm_vision_tower": tower, "max_length": 4096, "tune_entire_model": False}
    (directory / "config.json").write_text(json.dumps(fields))


def test_tower_is_found(tmp_path: pathlib.Path) -> None:
    """By argument, else by the config relative to the directory, else inside; two are one too many."""
    params = random_params(SMALL)
    make_original(tmp_path / "s", params, tower="../elsewhere")
    inside, elsewhere = tmp_path / "s" / "vision_tower", tmp_path / "elsewhere"
    assert_equal(load(tmp_path / "s")[1]["vision"], params["vision"])
    shutil.copytree(inside, elsewhere)
    weights = load_file(inside / "model.safetensors")
    save_file({name: 2 * array for name, array in weights.items()}, elsewhere / "model.safetensors")
    # share4v's training leaves it like this: the tuned tower inside, the name of its origin in the config.
    with pytest.raises(ConversionError, match=r"two vision towers, .*elsewhere .* say which"):
        load(tmp_path / "s")
    # For the other parts it doesn't matter which.
    for part in ("text", "projector"):
        expected = {key for key in from_params(SMALL, params) if key.startswith(PARTS[part])}
        assert open_part(tmp_path / "s", part).part(part).keys() == expected
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params["vision"])
    assert_equal(load(tmp_path / "s", vision_tower=elsewhere)[1]["vision"], doubled)
    assert_equal(load(tmp_path / "s", vision_tower=inside)[1]["vision"], params["vision"])
    shutil.rmtree(inside)
    assert_equal(load(tmp_path / "s")[1]["vision"], doubled)
    shutil.rmtree(elsewhere)
    with pytest.raises(ConversionError, match="give its directory as --vision-tower"):
        load(tmp_path / "s")


def test_llava_with_tower_in_its_shards(tmp_path: pathlib.Path) -> None:
    """As LLaVA-1.5 is published; the tower's directory then gives its config only."""
    params = random_params(SMALL)
    save(tmp_path / "s", SMALL, params, "share4v", dtype="float32")
    tensors = load_file(tmp_path / "s/model.safetensors")
    tower = load_file(tmp_path / "s/vision_tower/model.safetensors")
    tensors |= {f"model.vision_tower.vision_tower.{name}": array for name, array in tower.items()}
    save_file(tensors, tmp_path / "s/model.safetensors")
    save_file(
        {name: 0 * array for name, array in tower.items()}, tmp_path / "s/vision_tower/model.safetensors"
    )
    assert_equal(load(tmp_path / "s")[1], params)


@pytest.mark.parametrize("tuned_from", [0, 1, 2, 3])
def test_split_towers(tuned_from: int, theirs: Any, tmp_path: pathlib.Path) -> None:
    """A tower split anywhere is saved whole."""
    theirs.save_pretrained(tmp_path / "theirs")
    config, whole = load(tmp_path / "theirs")
    config, params = config.with_tuned_from(tuned_from), resplit_vision(whole, tuned_from)
    stacks = [params["vision"][name] for name in ("frozen", "tuned") if name in params["vision"]]
    assert ("frozen" in params["vision"], "tuned" in params["vision"]) == (tuned_from > 0, tuned_from < 3)
    kernels = [stack["attention"]["out"]["kernel"] for stack in stacks]
    np.testing.assert_array_equal(
        np.concatenate(kernels), whole["vision"]["tuned"]["attention"]["out"]["kernel"]
    )
    save(tmp_path / "ours", config, params, "hf", dtype="float32")
    assert_equal(load(tmp_path / "ours")[1], whole)


def test_shards(tmp_path: pathlib.Path) -> None:
    params = random_params(SMALL)
    save(tmp_path / "one", SMALL, params, "hf", dtype="float32")
    save(tmp_path / "many", SMALL, params, "hf", dtype="float32", max_shard_bytes=8000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(path.name for path in (tmp_path / "many").glob("*.safetensors")) == files
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in single.values())
    for file in files:
        held = load_file(tmp_path / "many" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
        assert sum(array.nbytes for array in held.values()) <= 8000 or len(held) == 1
    assert_equal(load(tmp_path / "many")[1], params)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "many")
    assert np.array_equal(
        again.state_dict()["lm_head.weight"].numpy(), single["language_model.lm_head.weight"]
    )


def test_params_of_jax(tmp_path: pathlib.Path) -> None:
    params = random_params(SMALL, ml_dtypes.bfloat16)
    save(tmp_path / "a", SMALL, jax.tree.map(jax.numpy.asarray, params), "hf")
    assert_equal(load(tmp_path / "a")[1], params)


def test_all_problems_at_once() -> None:
    tensors = {key: tensor.read() for key, tensor in from_params(SMALL, random_params(SMALL)).items()}
    layer = "language_model.model.layers.1"
    del tensors[f"{layer}.mlp.up_proj.weight"]
    del tensors["vision_tower.vision_model.post_layernorm.bias"]
    tensors[f"{layer}.self_attn.q_proj.weight"] = np.zeros((5, 12), np.float32)
    tensors["multi_modal_projector.linear_1.bias"] = np.zeros(12, np.int8)
    tensors["language_model.lm_head.weight"] = np.zeros((VOCAB - 1, 12), np.float32)
    tensors["model.norm.weight"] = np.zeros(12, np.float32)
    tensors["model.layers.1.self_attn.q_proj.lora_A.weight"] = np.zeros(12, np.float32)
    with pytest.raises(ConversionError) as caught:
        to_params(SMALL, tensors)
    expected = {
        f"missing {layer}.mlp.up_proj.weight (for text/blocks/mlp/up/kernel)",
        "missing vision_tower.vision_model.post_layernorm.bias (for vision/post_norm/bias)",
        f"{layer}.self_attn.q_proj.weight in memory: expected shape (12, 12), found (5, 12)",
        "multi_modal_projector.linear_1.bias in memory: expected a dtype of bfloat16, float16, float32, "
        "found int8",
        f"language_model.lm_head.weight in memory: expected 100 to 128 rows of (12,), found {VOCAB - 1}",
        "model.norm.weight in memory: the same tensor as language_model.model.norm.weight "
        "(both are language_model.model.norm.weight)",
        "unexpected model.layers.1.self_attn.q_proj.lora_A.weight in memory",
    }
    assert set(caught.value.problems) == expected
    assert all(problem in str(caught.value) for problem in expected)


def test_problems_of_params() -> None:
    params = random_params(SMALL)
    del params["text"]["norm"]
    params["vision"]["extra"] = np.zeros(3)
    params["projector"]["layer_0"]["bias"] = np.zeros(3)
    with pytest.raises(ConversionError) as caught:
        from_params(SMALL, params)
    assert set(caught.value.problems) == {
        "missing text/norm/scale",
        "unexpected vision/extra",
        "projector/layer_0/bias: expected shape (12,), found (3,)",
    }
    with pytest.raises(ConversionError, match="vision/frozen"):
        from_params(SMALL.with_tuned_from(1), random_params(SMALL))


def test_mixed_dtypes_become_float32() -> None:
    tensors = {key: tensor.read() for key, tensor in from_params(SMALL, random_params(SMALL)).items()}
    name = "language_model.model.layers.0.input_layernorm.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    scale = to_params(SMALL, tensors)["text"]["blocks"]["attention_norm"]["scale"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale[0], tensors[name].astype(np.float32))


@pytest.mark.parametrize(("size", "padded"), [(32000, 32064), (62, 64), (63, 128), (100, 128)])
def test_padded_vocabulary(size: int, padded: int) -> None:
    assert padded_vocab_size(size) == padded
