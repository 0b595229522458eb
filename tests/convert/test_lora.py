"""Adapters in PEFT's own files, merged with their base; and everything about them that is refused.

That PEFT's `merge_and_unload` gives the same was checked with PEFT itself (docs/convert.md).
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from sg4v_jax.convert.load import convert, load_model, open_checkpoint
from sg4v_jax.convert.tensors import ConversionError
from tests.convert.writers import (
    ROWS,
    VOCAB,
    Source,
    State,
    as_arrays,
    merged,
    peer,
    renamed,
    state_of,
    write_hf,
    write_json,
    write_lora,
    write_original,
    write_parts,
    write_weights,
)

QUERY = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tokenizer_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """share4v in float32, so that nothing hides behind rounding."""
    root = tmp_path_factory.mktemp("base")
    state = state_of(peer(), torch.float32)
    return write_original(
        root / "model", state, peer().config, tokenizer_file, tower=root / "tower", named="../tower"
    )


def assert_close(path: pathlib.Path, expected: State, **parts: Any) -> None:
    """To rounding, torch's and NumPy's sums of products not being the same."""
    tensors = open_checkpoint(path, **parts).checked().tensors
    for key, value in as_arrays(expected).items():
        np.testing.assert_allclose(tensors[key].read(), value, rtol=1e-6, atol=1e-6, err_msg=key)


def by_torch(state: State, factors: State, scale: float) -> State:
    """As PEFT merges: `weight += (B @ A) * scale`."""
    result = dict(state)
    for name, a in factors.items():
        if ".lora_A." in name:
            weight = name.replace("lora_A.", "")
            result[weight] = state[weight] + scale * (factors[name.replace("lora_A", "lora_B")] @ a)
    return result


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize(("rank", "rslora", "scale"), [(4, False, 4.0), (4, True, 8.0), (2, False, 8.0)])
def test_merge(
    kind: str, rank: int, rslora: bool, scale: float, base: Source, tmp_path: pathlib.Path
) -> None:
    factors = write_lora(tmp_path / "lora", base.state, base.path, rank=rank, kind=kind, use_rslora=rslora)
    expected = by_torch(base.state, factors, scale)
    assert abs(expected[f"{QUERY}.weight"] - base.state[f"{QUERY}.weight"]).max() > 0.1
    assert_close(tmp_path / "lora", expected)


def test_weights_trained_whole(base: Source, tmp_path: pathlib.Path) -> None:
    """PEFT's modules_to_save and LLaVA's projector take the place of the base's."""
    saved = {"lm_head.weight": 3 * base.state["lm_head.weight"]}
    mine = {name: -value for name, value in base.state.items() if "multi_modal_projector" in name}
    settings = {"modules_to_save": ["lm_head"]}
    factors = write_lora(tmp_path / "lora", base.state, base.path, saved=saved, trainables=mine, **settings)
    assert_close(tmp_path / "lora", by_torch(base.state, factors, 4.0) | saved | mine)


def test_a_vocabulary_trained_whole(tokenizer_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """On an HF LLaVA it has the format's added rows, which no other format may get to see."""
    state = state_of(peer(), torch.float32)
    source = write_hf(tmp_path / "hf", state, peer().config, tokenizer_file)
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    saved = {name: torch.cat([2 * state[name], torch.ones(ROWS - VOCAB, 48)]) for name in names}
    write_lora(tmp_path / "lora", state, source.path, layout="5", saved=saved)
    convert(open_checkpoint(tmp_path / "lora"), tmp_path / "out", layout="share4v")
    again = open_checkpoint(tmp_path / "out")
    for name in names:
        found = again.tensors[renamed(name, "A")].read()
        np.testing.assert_array_equal(found, 2 * state[name])


def test_tuned_tower_beside_the_adapter(base: Source, tmp_path: pathlib.Path) -> None:
    """share4v saves it there when it tunes the entire model; its config.json still names a repository."""
    factors = write_lora(tmp_path / "lora", base.state, base.path)
    tower = {name: 2 * value for name, value in base.state.items() if "vision_tower" in name}
    bare = {
        f"vision_model.{name.removeprefix('model.vision_tower.')}": value for name, value in tower.items()
    }
    write_weights(tmp_path / "lora/vision_tower", bare, "bin")
    shutil.copy(base.path.parent / "tower/config.json", tmp_path / "lora/vision_tower")
    fields = json.loads((base.path / "config.json").read_text())
    write_json(tmp_path / "lora/config.json", {**fields, "mm_vision_tower": "openai/clip-vit"})
    assert_close(tmp_path / "lora", by_torch(base.state, factors, 4.0) | tower)


@pytest.mark.parametrize("layout", ["A", "B", "5"])
def test_on_a_hugging_face_llava(layout: str, tokenizer_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """PEFT around transformers' own class; its adapters have no config.json."""
    state = state_of(peer(), torch.float32)
    source = write_hf(tmp_path / "hf", state, peer().config, tokenizer_file)
    factors = write_lora(tmp_path / "lora", state, source.path, layout=layout, kind="safetensors")
    assert not (tmp_path / "lora/config.json").exists()
    assert_close(tmp_path / "lora", by_torch(state, factors, 4.0))
    assert open_checkpoint(tmp_path / "lora").usage.chat_template, "how to prompt it comes from the base"


def test_on_vicuna(tokenizer_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """LLaVA's recipe: the projector is beside the adapter, the tower is given."""
    source = write_parts(
        tmp_path, state_of(peer(), torch.float32), peer().config, tokenizer_file, whole_clip=False
    )
    mine = {name: value for name, value in source.state.items() if "multi_modal_projector" in name}
    factors = write_lora(tmp_path / "lora", source.state, pathlib.Path("lmsys/vicuna"), trainables=mine)
    fields = json.loads((source.path / "config.json").read_text())
    mm = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip"}
    write_json(tmp_path / "lora/config.json", {**fields, **mm, "image_aspect_ratio": "pad"})
    # The name of the base is that of a directory beside the adapter's.
    expected = by_torch(source.state, factors, 4.0)
    assert_close(tmp_path / "lora", expected, vision_tower=tmp_path / "clip")
    (tmp_path / "vicuna").rename(tmp_path / "renamed")
    with pytest.raises(ConversionError, match=r"a LoRA on top of 'lmsys/vicuna': .* --base"):
        open_checkpoint(tmp_path / "lora")
    given = {"base": tmp_path / "renamed", "vision_tower": tmp_path / "clip"}
    assert_close(tmp_path / "lora", expected, **given)
    bundle = load_model(tmp_path / "lora", **given)
    assert bundle.tokenizer_file == tmp_path / "renamed/tokenizer.model"


def test_rounded_once(tokenizer_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A bfloat16 base stays bfloat16; asked for float32, the sum is not rounded in between."""
    state = state_of(peer(), torch.bfloat16)
    source = write_hf(tmp_path / "hf", state, peer().config, tokenizer_file)
    factors = write_lora(tmp_path / "lora", state, source.path)
    key = "language_model.model.layers.0.self_attn.q_proj.weight"
    expected = merged(state, factors, 4.0)[f"{QUERY}.weight"]
    found = open_checkpoint(tmp_path / "lora").tensors[key].read()
    assert found.dtype == "bfloat16"
    assert torch.equal(torch.from_numpy(found.astype(np.float32)), expected.float())


UNSUPPORTED = {
    "use_dora": True,
    "bias": "lora_only",
    "peft_type": "LOHA",
    "fan_in_fan_out": True,
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "init_lora_weights": "pissa",
}


def test_every_unsupported_kind_is_named(base: Source, tmp_path: pathlib.Path) -> None:
    write_lora(tmp_path / "lora", base.state, base.path, **UNSUPPORTED)
    with pytest.raises(ConversionError) as caught:
        open_checkpoint(tmp_path / "lora")
    for key, value in UNSUPPORTED.items():
        (line,) = [problem for problem in caught.value.problems if f"{key} is {value!r}" in problem]
        assert "supported: " in line


def test_every_misfit_is_named_in_one_error(base: Source, tmp_path: pathlib.Path) -> None:
    """With the settings that are wrong; and so is what the merged model would lack or have too much."""
    directory = tmp_path / "lora"
    factors = write_lora(directory, base.state, base.path, kind="safetensors", use_dora=True)
    layer = "model.language_model.layers."
    del factors[f"{QUERY}.lora_B.weight"]
    factors[f"{layer}0.self_attn.k_proj.lora_A.weight"] = torch.zeros(4, 47)
    factors[f"{layer}1.mlp.up_proj.lora_B.weight"] = torch.zeros(64, 3)
    for factor, shape in (("A", (4, 48)), ("B", (48, 4))):
        factors[f"{layer}7.self_attn.q_proj.lora_{factor}.weight"] = torch.zeros(shape)
    factors["lm_head.weight"] = torch.zeros(5, 48)
    factors[f"{QUERY}.lora_magnitude_vector"] = torch.zeros(48)
    write_weights(directory, {f"base_model.model.{name}": value for name, value in factors.items()})
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert(open_checkpoint(directory), tmp_path / "out", layout="hf")
    text = str(caught.value)
    for part in (
        "use_dora is True; supported: False",
        "layers.0.self_attn.q_proj.weight: lora_A without its counterpart",
        "layers.0.self_attn.k_proj.weight: expected [48, r] times [r, 48], found (48, 4) times (4, 47)",
        "layers.1.mlp.up_proj.weight: expected [64, r] times [r, 48], found (64, 3) times (4, 48)",
        "layers.7.self_attn.q_proj.weight: the base has no such weight",
        "lm_head.weight in",
        "expected shape (300, 48), found (5, 48)",
        "model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector in",
    ):
        assert part in text, part
    assert not (tmp_path / "out").exists()


def test_wrong_base(base: Source, tokenizer_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Another model's shapes; by config.json before any tensor is looked at, else by the factors."""
    other = write_hf(tmp_path / "gqa", state_of(peer(True), torch.float32), peer(True).config, tokenizer_file)
    write_lora(tmp_path / "lora", base.state, base.path)
    with pytest.raises(ConversionError, match=r"can't be merged with .*gqa") as caught:
        open_checkpoint(tmp_path / "lora", base=other.path)
    assert len(caught.value.problems) == 1 + 3 * 2, "its queries and outputs are wider, in three layers"
    shutil.copy(base.path / "config.json", tmp_path / "lora")
    with pytest.raises(ConversionError, match=r"num_heads"):
        open_checkpoint(tmp_path / "lora", base=other.path)


@pytest.mark.parametrize("lost", ["adapter_model.bin", "base"])
def test_missing_files(lost: str, base: Source, tmp_path: pathlib.Path) -> None:
    write_lora(tmp_path / "lora", base.state, base.path if lost != "base" else pathlib.Path("nowhere"))
    if lost != "base":
        (tmp_path / "lora" / lost).unlink()
    message = "has neither adapter_model.safetensors nor adapter_model.bin" if lost != "base" else "--base"
    with pytest.raises(ConversionError, match=message):
        open_checkpoint(tmp_path / "lora")
