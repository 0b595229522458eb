"""Every source to every target: each tensor to the bit, and the same words in transformers."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open

from sg4v_jax.convert.checkpoint import Checkpoint
from sg4v_jax.convert.companions import chat_template
from sg4v_jax.convert.load import convert, load_model, open_checkpoint
from sg4v_jax.convert.params import from_params
from sg4v_jax.data.conversation import get_template
from tests.convert.sources import SOURCES
from tests.convert.writers import (
    CHAT_TEMPLATE,
    GENERATION,
    VOCAB,
    Source,
    as_arrays,
    original,
    renamed,
    write_original,
)

SHARD = 300_000
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 83, 3), dtype=np.uint8))


def assert_same(tensors: Any, source: Source) -> None:
    """Bit by bit, dtypes included: what checkpoints or parameters hold, and what a source does."""
    expected = as_arrays(source.state)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        if not key.startswith(renamed(source.drawn, "A") or "-"):
            found = tensor.read()
            assert (found.dtype, found.shape) == (expected[key].dtype, expected[key].shape), key
            assert found.tobytes() == expected[key].tobytes(), key


def with_drawn(source: Source, opened: Checkpoint) -> Source:
    """The source with what `random` made for it."""
    for name, value in source.state.items():
        if source.drawn and name.startswith(source.drawn):
            made = opened.tensors[renamed(name, "A")].read().astype(np.float32)
            assert abs(made).max() > 0 or name.endswith("bias")
            source.state[name] = torch.from_numpy(made).to(value.dtype)
    return source


def answers(model: Any, inputs: Any, settings: Any = None) -> list[int]:
    """Greedy tokens; `settings` keep the rows from being sampled that no tokenizer knows."""
    torch.manual_seed(0)
    arguments = {"generation_config": settings} if settings else {}
    return model.generate(**inputs, **arguments, max_new_tokens=6, do_sample=False)[0].tolist()


def check_hf(directory: pathlib.Path, source: Source) -> None:
    """transformers loads the directory whole, and says what it says with the source's weights."""
    arguments: Any = {"dtype": torch.float32, "output_loading_info": True}
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(directory, **arguments)
    assert not any(info.values()), info
    peer = source.torch_model()
    for name, value in peer.state_dict().items():
        rows = VOCAB if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(value)
        assert torch.equal(model.state_dict()[name][:rows], value[:rows]), name
    processor = transformers.AutoProcessor.from_pretrained(directory)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=IMAGE, return_tensors="pt")
    assert (inputs["input_ids"] == VOCAB).sum() == 4
    assert answers(model, inputs) == answers(peer.eval(), inputs, model.generation_config)


def check_share4v(directory: pathlib.Path, source: Source) -> None:
    """Spec 5.1: the decoder's shards have its names and no tower, which transformers loads as CLIP."""
    rest, tower = original(source.state)
    assert names(directory) == rest.keys() - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert names(directory / "vision_tower") == tower.keys() - {"vision_model.embeddings.position_ids"}
    loaded = transformers.CLIPVisionModel.from_pretrained(directory / "vision_tower", dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, source.state[f"model.vision_tower.{name}"].float()), name
    fields = json.loads((directory / "config.json").read_text())
    assert (fields["model_type"], fields["image_aspect_ratio"]) == ("share4v", source.aspect)


def check_run(directory: pathlib.Path, source: Source) -> None:
    """Loaded whole, by Orbax's own reader."""
    bundle = load_model(directory)
    assert_same(from_params(bundle.config, bundle.params), source)
    assert bundle.tokenizer_file == directory / "tokenizer.model"


def names(directory: pathlib.Path) -> set[str]:
    found: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


CHECKS: dict[str, Callable[[pathlib.Path, Source], None]] = {
    "hf": check_hf,
    "share4v": check_share4v,
    "run": check_run,
}


@pytest.mark.parametrize("target", CHECKS)
@pytest.mark.parametrize("name", SOURCES)
def test_matrix(name: str, target: str, source: Any, tmp_path: pathlib.Path) -> None:
    given = source(name)
    opened = open_checkpoint(given.path, **given.parts)
    with_drawn(given, opened)
    convert(opened, tmp_path / "out", layout=target, max_shard_bytes=SHARD)
    again = open_checkpoint(tmp_path / "out")
    assert again.config == opened.config
    assert_same(again.tensors, given)
    assert again.usage.aspect == given.aspect
    assert again.tokenizer_file is not None
    assert again.tokenizer_file.read_bytes() == opened.tokenizer_file.read_bytes()
    CHECKS[target](tmp_path / "out", given)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- What goes along with the weights ------------------------------------------------------------


def through(path: pathlib.Path, tmp_path: pathlib.Path, *targets: str) -> list[pathlib.Path]:
    """Converts from format to format."""
    made = []
    for i, target in enumerate(targets):
        made.append(tmp_path / f"{i}-{target}")
        convert(open_checkpoint(path), made[-1], layout=target)
        path = made[-1]
    return made


@pytest.mark.parametrize("name", ["HF, names of the Hub", "share4v, tower inside the directory"])
def test_usage_survives(name: str, source: Any, tmp_path: pathlib.Path) -> None:
    """Through every format and back to HF's, files and all."""
    given = source(name)
    usage = open_checkpoint(given.path).usage
    assert usage.generation == GENERATION
    assert usage.chat_template == (CHAT_TEMPLATE if "HF" in name else "")
    made = through(given.path, tmp_path, "hf", "run", "hf", "share4v", "hf", "share4v")
    for directory in made:
        assert open_checkpoint(directory).usage == usage, directory.name
    expected = CHAT_TEMPLATE if "HF" in name else chat_template(get_template("v1"))
    # HF's directories before and after a run, and after share4v's; and share4v's after HF's.
    for first, later in ((made[0], made[2]), (made[2], made[4]), (made[3], made[5])):
        files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(later) for path in later.rglob("*") if path.is_file())
        for file in files:
            assert (first / file).read_bytes() == (later / file).read_bytes(), file
    assert (made[4] / "chat_template.jinja").read_text() == expected
    settings = transformers.GenerationConfig.from_pretrained(made[4])
    assert {key: getattr(settings, key) for key in GENERATION} == GENERATION
    crops = transformers.AutoProcessor.from_pretrained(made[4]).image_processor
    assert bool(getattr(crops, "do_pad", False)) == (usage.aspect == "pad")


def test_edits_of_an_exported_directory_count(source: Any, tmp_path: pathlib.Path) -> None:
    """sg4v.json says what the format can't; what it can, its own files say."""
    (made,) = through(source("HF, names of the Hub").path, tmp_path, "hf")
    (made / "chat_template.jinja").write_text("edited")
    (made / "generation_config.json").write_text('{"temperature": 0.9}')
    (made / "preprocessor_config.json").write_text('{"do_pad": true}')
    usage = open_checkpoint(made).usage
    assert (usage.chat_template, usage.generation, usage.aspect) == ("edited", {"temperature": 0.9}, "pad")


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_saved_again_by_transformers(aspect: str, source: Any, tmp_path: pathlib.Path) -> None:
    """transformers 5 has the image processor in processor_config.json, and no tokenizer.model."""
    path = source("HF, names of the Hub" if aspect == "square" else "HF, grouped queries").path
    opened = open_checkpoint(path)
    usage = {"aspect": aspect, "chat_template": "", "generation": {"temperature": 0.3, "do_sample": False}}
    convert(_with_usage(opened, usage), tmp_path / "ours", layout="hf")
    theirs = tmp_path / "theirs"
    transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").save_pretrained(theirs)
    transformers.AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(theirs)
    assert not (theirs / "tokenizer.model").exists() and not (theirs / "sg4v.json").exists()
    again = open_checkpoint(theirs)
    assert (again.usage.aspect, again.usage.template, again.usage.chat_template) == (aspect, "v1", "")
    with pytest.raises(ValueError, match=r"tokenizer\.json but no tokenizer\.model"):
        convert(again, tmp_path / "out", layout="hf")
    shutil.copy(path / "tokenizer.model", theirs)
    convert(open_checkpoint(theirs), tmp_path / "out", layout="hf")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "ours" / weights).read_bytes()


def _with_usage(checkpoint: Checkpoint, fields: dict[str, Any]) -> Checkpoint:
    return dataclasses.replace(checkpoint, usage=dataclasses.replace(checkpoint.usage, **fields))


# --- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", CHECKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(dtype: str, target: str, source: Any, tmp_path: pathlib.Path) -> None:
    """Every tensor in the one asked for, rounded as torch rounds."""
    given = source("HF, a dtype for each part")
    state = {name: value.to(getattr(torch, dtype)) for name, value in given.state.items()}
    convert(open_checkpoint(given.path), tmp_path / "out", layout=target, dtype=dtype)
    again = open_checkpoint(tmp_path / "out")
    assert_same(again.tensors, Source(given.path, state, given.hf_config))
    if target != "run":
        assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("target", ["hf", "share4v"])
def test_shard_size(target: str, source: Any, tmp_path: pathlib.Path) -> None:
    convert(
        open_checkpoint(source("HF, names of the Hub").path),
        tmp_path / "out",
        layout=target,
        max_shard_bytes=SHARD,
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {tmp_path / "out" / file for file in index["weight_map"].values()}
    assert files == set((tmp_path / "out").glob("*.safetensors")) and len(files) > 1
    assert all(path.stat().st_size < SHARD + 10_000 for path in files)
    total = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "out").tensors.values())
    # HF's vocabulary has twenty rows more, in the embedding and in the head.
    inside = index["metadata"]["total_size"]
    assert inside == total + 2 * 20 * 48 * 4 if target == "hf" else inside < total


@pytest.mark.parametrize("part", ["vision_tower", "projector"])
def test_parts_from_whole_models(part: str, source: Any) -> None:
    """A tower or projector may come out of any model that has one."""
    vicuna, other = source("Vicuna + CLIP + mm_projector.bin"), source("LLaVA-1.5, tower in the shards")
    opened = open_checkpoint(vicuna.path, **{**vicuna.parts, part: other.path})
    name = part.removesuffix("_tower")
    for key, tensor in opened.checked().tensors.items():
        holder = other if name in key else vicuna
        assert tensor.read().tobytes() == as_arrays(holder.state)[key].tobytes(), key


def test_a_tower_of_another_size_is_refused(source: Any, tmp_path: pathlib.Path) -> None:
    """The projector does not fit it: one error names what it expected and found."""
    given = source("share4v, tower by config.json")
    small = {name: value[:64] if "position" in name else value for name, value in given.state.items()}
    other = write_original(
        tmp_path / "model",
        small,
        given.hf_config,
        given.path / "tokenizer.model",
        tower=tmp_path / "tower",
        named="x",
    )
    fields = json.loads((tmp_path / "tower/config.json").read_text())
    (tmp_path / "tower/config.json").write_text(json.dumps({**fields, "image_size": 42, "hidden_size": 64}))
    with pytest.raises(ValueError) as caught:
        convert(open_checkpoint(other.path, vision_tower=tmp_path / "tower"), tmp_path / "out", layout="hf")
    text = str(caught.value)
    assert "multi_modal_projector" in text or "mm_projector.0.weight" in text
    assert "expected shape (10, 64), found (5, 128)" in text
    assert not (tmp_path / "out").exists()
