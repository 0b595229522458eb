"""From a run's config to its loader's: every field arrives, and what is missing is named."""

import pathlib
import re

import pytest
from ml_collections import ConfigDict

from sg4v_jax import config as configs
from sg4v_jax.data.mixture import Replacement, Source
from sg4v_jax.models.config import ModelConfig
from sg4v_jax.train.setup import loader_config

DOCS = pathlib.Path(__file__).parents[2] / "docs/input.md"
DIRECTORY = "data.sources.sft_mix.directory"


def load(**overrides: object) -> ConfigDict:
    return configs.load("configs/finetune.py:7b", **{DIRECTORY: "mix", **overrides})


def made(config: ConfigDict) -> object:
    return loader_config(config, ModelConfig.from_dict(config.model.to_dict()))


def test_every_field_arrives() -> None:
    found = loader_config(
        load(
            **{
                "data.sources.sft_mix.epochs": 2.0,
                "data.sources.sft_mix.aspect": "square",
                "data.max_tokens": 1000,
                "data.too_long": "drop",
                "data.num_workers": 3,
                "data.prefetch": 5,
                "data.packing_window": 7,
                "data.replace.source": "sft_mix",
                "data.replace.directory": "dense",
                "data.replace.share": 0.5,
                "data.replace.question": "x",
            }
        ),
        ModelConfig.from_dict(load().model.to_dict()),
    )
    assert found.sources == {"sft_mix": Source("mix", epochs=2.0, aspect="square")}
    assert found.replacement == Replacement("sft_mix", "dense", 0.5, "x")
    assert (found.num_workers, found.prefetch, found.packing_window) == (3, 5, 7)
    form = found.form
    assert (form.max_tokens, form.too_long, form.length, form.image_slots) == (1000, "drop", 3584, 4)
    assert (form.image_size, form.image_tokens, form.template, form.aspect) == (336, 576, "v1", "pad")
    assert loader_config(load(), ModelConfig.from_dict(load().model.to_dict())).replacement is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({DIRECTORY: None}, r"config\.data\.sources\.sft_mix\.directory is not set; give --config\.data"),
        ({"data.replace.share": 0.1}, r"config\.data\.replace\.directory is not set"),
        ({"data.seq_len": 1024}, r"data\.max_tokens=2048 must be positive and at most data\.seq_len=1024"),
        ({"data.aspect": "crop"}, r"data\.aspect='crop' is not one of"),
    ],
)
def test_what_is_missing_or_impossible_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(load(**overrides))


def test_the_mixture_of_the_docs(tmp_path: pathlib.Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "own.py").write_text(code)
    spec = f"{tmp_path / 'own.py'}:tiny"
    config = configs.load(spec, **{DIRECTORY: "a", "data.sources.our_captions.directory": "b"})
    assert loader_config(config, ModelConfig.from_dict(config.model.to_dict())).sources == {
        "sft_mix": Source("a"),
        "our_captions": Source("b", epochs=2.0, aspect="square"),
    }


@pytest.mark.parametrize(
    ("question", "caption"),
    [
        ("<image>\nDescribe the following image.", True),
        ("Can you describe the main features of this image for me?\n<image>", True),
        ("Provide a detailed description of the given image\n<image>", True),
        ("Write an exhaustive depiction of the given image", True),
        ("Share a comprehensive rundown of the presented image", True),
        ("Explain the various aspects of the image before you", True),
        ("Analyze the image in a comprehensive and detailed manner", True),
        ("What color is the cat?", False),
        ("What is the man doing?\nAnswer the question using a single word or phrase.", False),
    ],
)
def test_which_questions_ask_for_a_caption(question: str, caption: bool) -> None:
    assert bool(re.search(load().data.replace.question, question)) == caption
