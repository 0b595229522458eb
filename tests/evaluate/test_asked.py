"""What a benchmark asks for is what reaches the model: ids of its template, pixels of its aspect."""

import pathlib

import numpy as np
import pytest

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.data.conversation import encode_prompt, get_template
from sg4v_jax.data.image import load_image, preprocess
from sg4v_jax.data.records import Turn
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.evaluate.answering import prompt_of
from sg4v_jax.evaluate.benchmark import Sample
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.settings import Choices
from sg4v_jax.infer.prepare import Preparer
from sg4v_jax.infer.request import Request
from sg4v_jax.infer.sampling import SamplingOptions
from tests.conftest import TinyWorld
from tests.evaluate.official import WRITERS, png
from tests.tiny import model_config


@pytest.mark.parametrize("name", ["qbench", "gqa"])
def test_template_and_aspect_reach_the_model(
    name: str, tiny_world: TinyWorld, tmp_path: pathlib.Path
) -> None:
    WRITERS[name](tmp_path)
    samples = BENCHMARKS[name].load(tmp_path).samples
    settings = Choices().settings(BENCHMARKS[name], "m", samples)
    tokenizer = Tokenizer(tiny_world.tokenizer)
    bundle = ModelBundle(model_config(), {}, tiny_world.tokenizer)
    prepare = Preparer(bundle, tokenizer, 256, 1)
    prompt = prompt_of(samples[0], settings, (png(),))
    found = prepare(Request(0, prompt, SamplingOptions(max_new_tokens=4)))
    assert not found.error
    # Nothing is stripped: Q-Bench's line break at the end is a token, as in model_vqa_qbench.py.
    assert samples[0].question.endswith("\n") == (name == "qbench")
    turns = (Turn("human", f"<image>\n{samples[0].question}"),)
    ids = encode_prompt(get_template({"qbench": "share4v_v1", "gqa": "v1"}[name]), turns, tokenizer)
    assert [i for i in found.tokens if i >= 0] == [i for i in ids if i >= 0]
    aspect = {"qbench": "square", "gqa": "pad"}[name]
    expected = preprocess(load_image(png(), name=""), size=28, aspect=aspect)
    np.testing.assert_array_equal(found.pixels[0], expected)


def test_a_template_that_ends_answers_otherwise_is_refused(tiny_world: TinyWorld) -> None:
    bundle = ModelBundle(model_config(), {}, tiny_world.tokenizer, template="plain")
    prepare = Preparer(bundle, Tokenizer(tiny_world.tokenizer), 256, 1)
    settings = Choices().settings(BENCHMARKS["gqa"], "m", ())
    prompt = prompt_of(Sample("0", "Why?", png()), settings, (png(),))
    found = prepare(Request(0, prompt, SamplingOptions(max_new_tokens=4)))
    assert "'v1' don't end like those of 'plain'" in found.error
