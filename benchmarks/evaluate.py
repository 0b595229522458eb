"""Times answering a benchmark's questions against transformers, one question after the other.

The published scripts ask one question at a time (`model_vqa_loader.py`: batch of 1, `generate`). Ours go
through the engine, journal included. Both get the same weights, pixels and ids, generate greedily, and take
turns; it is checked that they give the same answers.

  python benchmarks/evaluate.py --output=evaluate.json
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sg4v_jax.convert.load import load_model
from sg4v_jax.data.conversation import encode_prompt, get_template, place_images, training_texts
from sg4v_jax.data.image import load_image, normalize_reference, preprocess
from sg4v_jax.data.sample import expand_images
from sg4v_jax.data.tokenizer import Tokenizer, train_tokenizer
from sg4v_jax.evaluate.answering import answer_samples, prompt_of, read_answers, read_image
from sg4v_jax.evaluate.benchmark import Loaded, Sample
from sg4v_jax.evaluate.registry import BENCHMARKS
from sg4v_jax.evaluate.settings import Choices, Settings
from sg4v_jax.infer.engine import Engine
from sg4v_jax.parallel.mesh import make_mesh
from sg4v_jax.world import write_world

IMAGE_SIZE, PATCH = 112, 14
SIZES = {
    "demo": ({"hidden_size": 96, "layers": 4}, {"hidden_size": 192, "layers": 4}),
    "larger": ({"hidden_size": 256, "layers": 6}, {"hidden_size": 512, "layers": 8}),
}
# HF adds rows to the vocabulary, for the image and for padding.
EXTRA_ROWS = 64


def build(directory: pathlib.Path, size: str) -> LlavaForConditionalGeneration:
    """A model with random weights, written as HF LLaVA with a tokenizer beside it."""
    vision, text = SIZES[size]
    tokenizer = Tokenizer(directory / "tokenizer.model")
    vocab = tokenizer.vocab_size
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=4 * vision["hidden_size"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["hidden_size"] // 32,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=-(-(vocab + 2) // EXTRA_ROWS) * EXTRA_ROWS,
            hidden_size=text["hidden_size"],
            intermediate_size=8 * text["hidden_size"] // 3,
            num_hidden_layers=text["layers"],
            num_attention_heads=text["hidden_size"] // 64,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
        ),
        image_token_index=vocab,
        pad_token_id=vocab + 1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # HF's initial weights are so small that all prompts get the same answer.
    model.save_pretrained(directory)
    return model


def one_by_one(
    model: LlavaForConditionalGeneration, tokenizer: Tokenizer, loaded: Loaded, settings: Settings
) -> list[list[int]]:
    """What the published scripts do, without their tokenizer and image processor: ours give the same."""
    template, rows = get_template(settings.template), model.config.text_config.vocab_size
    answers = []
    for sample in loaded.samples:
        (data,) = read_image(loaded.root, sample.image)
        turns = place_images(prompt_of(sample, settings, (data,)).turns, as_asked=True)
        ids = encode_prompt(template, turns, tokenizer)
        tokens, _, is_image = expand_images(ids, None, (IMAGE_SIZE // PATCH) ** 2)
        pixels = preprocess(load_image(data, name=sample.id), size=IMAGE_SIZE, aspect=settings.aspect)
        inputs = torch.from_numpy(np.where(is_image, model.config.image_token_index, tokens)[None])
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                pixel_values=torch.from_numpy(normalize_reference(pixels[None]).transpose(0, 3, 1, 2).copy()),
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_id,
                suppress_tokens=list(range(tokenizer.vocab_size, rows)),
            )
        answers.append(output[0, inputs.shape[1] :].tolist())
    return answers


def through_the_engine(engine: Engine, loaded: Loaded, settings: Settings) -> dict[str, str]:
    """Answers by sample id, from a journal that was empty."""
    with tempfile.TemporaryDirectory() as folder:
        answer_samples(engine, loaded, loaded.samples, settings, pathlib.Path(folder))
        return {id_: entry["text"] for id_, entry in read_answers(pathlib.Path(folder)).items()}


def prepare(directory: pathlib.Path, scenes: int) -> tuple[Loaded, tuple[Sample, ...]]:
    """The embedded world's questions and a tokenizer of its texts."""
    files = write_world(directory / "data/world", train_scenes=60, heldout_scenes=scenes, seed=0)
    texts = training_texts([files.cap_dense, files.sft_mix])
    train_tokenizer(texts, directory / "tokenizer.model", 640, hard_vocab_limit=False)
    loaded = BENCHMARKS["world"].load(directory / "data")
    return loaded, loaded.samples


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="demo,larger")
    parser.add_argument("--scenes", type=int, default=16, help="images; each has seven or eight questions")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; JAX takes all cores")
    parser.add_argument("--output", help="JSON of the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = {}
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory() as name:
            figures[size] = measure(pathlib.Path(name), size, arguments)
    print(
        f"{'model':<10}{'questions':>10}{'one by one/s':>14}{'engine/s':>10}{'ratio':>8}  (lowest to highest)"
    )
    for size, found in figures.items():
        ratios = found["ratios"]
        print(
            f"{size:<10}{found['questions']:>10}{found['one_by_one']:>14.1f}{found['engine']:>10.1f}"
            f"{statistics.median(ratios):>8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if arguments.output:
        machine = {"machine": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()}
        pathlib.Path(arguments.output).write_text(json.dumps({**machine, "figures": figures}, indent=1))


def measure(directory: pathlib.Path, size: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Questions per second of both, in turns, after a warm-up that checks that they agree."""
    loaded, samples = prepare(directory, arguments.scenes)
    model = build(directory, size)
    engine = Engine(load_model(directory), make_mesh(), "float32", slots=arguments.slots, capacity=512)
    settings = Choices(max_new_tokens=arguments.new_tokens).settings(BENCHMARKS["world"], size, samples)
    theirs, ours = (
        one_by_one(model, engine.tokenizer, loaded, settings),
        through_the_engine(engine, loaded, settings),
    )
    eos = engine.tokenizer.eos_id
    texts = [engine.tokenizer.decode([t for t in tokens if t != eos]).strip() for tokens in theirs]
    same = sum(ours[sample.id] == text for sample, text in zip(samples, texts, strict=True))
    if same < 0.99 * len(samples):
        raise SystemExit(f"{size}: only {same} of {len(samples)} answers are the same; no figure")
    times: dict[str, list[float]] = {"one_by_one": [], "engine": []}
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        one_by_one(model, engine.tokenizer, loaded, settings)
        middle = time.perf_counter()
        through_the_engine(engine, loaded, settings)
        times["one_by_one"].append(middle - start)
        times["engine"].append(time.perf_counter() - middle)
    return {
        "questions": len(samples),
        "same_answers": same,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: len(samples) / statistics.median(found) for name, found in times.items()},
        "ratios": [a / b for a, b in zip(times["one_by_one"], times["engine"], strict=True)],
    }


if __name__ == "__main__":
    main()
