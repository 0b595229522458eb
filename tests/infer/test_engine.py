"""The engine: token for token what `transformers` generates, whatever else it does; stops, limits, errors."""

import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.data.conversation import encode_prompt, get_template, place_images
from sg4v_jax.data.image import load_image, normalize_reference, preprocess
from sg4v_jax.data.records import Turn
from sg4v_jax.data.sample import expand_images
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.infer.engine import Engine, _Run
from sg4v_jax.infer.request import Completion, Prompt, Request, ScoreRequest
from sg4v_jax.infer.sampling import SamplingOptions
from sg4v_jax.parallel.mesh import make_mesh
from tests.conftest import TinyWorld
from tests.convert.models import load
from tests.torch_llava import llava_config, llava_model

# Rows of the model that the tokenizer has no piece for, before those that HF's format adds.
UNKNOWN_ROWS = 10
NEW_TOKENS = 24
MAX_POSITIONS = 1024


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights twice.

    Attributes:
      theirs: the model of `transformers`.
      bundle: what our loader read from its files.
      engine: ours, in float32.
    """

    theirs: Any
    bundle: ModelBundle
    engine: Engine


@pytest.fixture(scope="module")
def pair(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    vocab = Tokenizer(tiny_world.tokenizer).vocab_size + UNKNOWN_ROWS
    text = {
        "vocab_size": -(-(vocab + 2) // 64) * 64,
        "max_position_embeddings": MAX_POSITIONS,
        "num_key_value_heads": 2,
    }
    config = llava_config(text=text, image_token_index=vocab, pad_token_id=vocab + 1)
    theirs = llava_model(config)
    # What neither the tokenizer nor our model has: no probability goes there.
    known = Tokenizer(tiny_world.tokenizer).vocab_size
    theirs.lm_head.register_forward_hook(
        lambda _, __, logits: torch.cat([logits[..., :known], torch.full_like(logits[..., known:], -1e9)], -1)
    )
    # Threads that wait for each other cost more than such a small model.
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("llava")
    theirs.save_pretrained(directory)
    model_config, params = load(directory)
    assert model_config.text.vocab_size == vocab
    bundle = ModelBundle(model_config, params, tiny_world.tokenizer)
    return Pair(theirs, bundle, engine(bundle))


def engine(bundle: ModelBundle, **settings: Any) -> Engine:
    return Engine(
        bundle, make_mesh(), "float32", **{"slots": 3, "capacity": 256, "prefill_rows": 2, **settings}
    )


def answers(
    engine: Engine, prompts: Sequence[Prompt], options: SamplingOptions | Sequence[SamplingOptions]
) -> list[Completion]:
    """Completions in the order of the prompts."""
    rows = [options] * len(prompts) if isinstance(options, SamplingOptions) else options
    requests = [Request(i, *both) for i, both in enumerate(zip(prompts, rows, strict=True))]
    results = {result.key: result for result in engine.complete(iter(requests))}
    assert not any(result.error for result in results.values()), results
    return [results[i].completion for i in range(len(prompts))]


def picture(seed: int, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def human(text: str) -> Turn:
    return Turn("human", text)


PROMPTS = {
    "no image": Prompt((human("How many sides does a triangle have?"),)),
    "one image": Prompt((human("<image>\nWhat is in this image?"),), (picture(0),)),
    "three images": Prompt(
        (human("<image>\n<image>\nWhat differs here <image>?"),), tuple(picture(i, 30 + i) for i in (1, 2, 3))
    ),
    "three turns": Prompt(
        (human("<image>\nWhich color?"), Turn("gpt", "Red."), human("And the other?")), (picture(4, 20, 50),)
    ),
}


def their_inputs(pair: Pair, prompt: Prompt) -> dict[str, Any]:
    """The same ids and pixels for transformers."""
    config, tokenizer = pair.bundle.config, pair.engine.tokenizer
    template, has_images = get_template(pair.bundle.template), bool(prompt.images)
    turns = place_images(prompt.turns) if has_images else prompt.turns
    ids = encode_prompt(template, turns, tokenizer, has_images=has_images)
    tokens, _, is_image = expand_images(ids, None, config.vision.num_image_tokens)
    inputs = {"input_ids": np.where(is_image, pair.theirs.config.image_token_index, tokens)[None]}
    if has_images:
        size = config.vision.image_size
        pixels = [
            preprocess(load_image(data, name=""), size=size, aspect=pair.bundle.aspect)
            for data in prompt.images
        ]
        inputs["pixel_values"] = normalize_reference(np.stack(pixels)).transpose(0, 3, 1, 2).copy()
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def their_generate(pair: Pair, prompt: Prompt, **options: Any) -> Any:
    """What `generate` of transformers gives."""
    inputs = their_inputs(pair, prompt)
    return pair.theirs.generate(
        **inputs,
        attention_mask=torch.ones(inputs["input_ids"].shape, dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=pair.engine.tokenizer.eos_id,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def their_tokens(pair: Pair, prompt: Prompt, **options: Any) -> list[int]:
    output = their_generate(pair, prompt, **options)
    return output.sequences[0, their_inputs(pair, prompt)["input_ids"].shape[1] :].tolist()


GREEDY = (
    ({}, {}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"no_repeat_ngram": 2, "min_new_tokens": 9}, {"no_repeat_ngram_size": 2, "min_new_tokens": 9}),
    ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "others"), GREEDY, ids=str)
def test_greedy_tokens_are_those_of_transformers(
    pair: Pair, ours: dict[str, Any], others: dict[str, Any]
) -> None:
    """For every prompt by itself there, and all together here."""
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, **ours)
    completions = answers(pair.engine, list(PROMPTS.values()), options)
    lengths = []
    for (name, prompt), completion in zip(PROMPTS.items(), completions, strict=True):
        expected = their_tokens(pair, prompt, **others)
        assert list(completion.tokens) == expected, name
        lengths.append(len(expected))
    assert max(lengths) == NEW_TOKENS and sum(lengths) > 2 * NEW_TOKENS, "too short to show an error"
    assert len({completion.tokens for completion in completions}) == len(PROMPTS)


BEAMS = (
    {"num_beams": 3},
    {"num_beams": 2, "length_penalty": 0.0, "min_new_tokens": 4},
    {"num_beams": 3, "length_penalty": 2.0, "repetition_penalty": 1.3},
    {"num_beams": 2, "length_penalty": -1.0, "no_repeat_ngram": 2},
    {},
)


@pytest.mark.slow
def test_beams_are_those_of_transformers(pair: Pair) -> None:
    """Tokens and scores, in searches that end early and late, beside requests without a search."""
    prompts = list(PROMPTS.values())
    requests, searches = [], engine(pair.bundle, num_beams=3, slots=6)
    for number, fields in enumerate(BEAMS):
        options = SamplingOptions(max_new_tokens=NEW_TOKENS, **fields)
        requests += [Request((i, number), prompt, options) for i, prompt in enumerate(prompts)]
    results = {result.key: result for result in searches.complete(requests)}
    ended = 0
    for (i, number), result in results.items():
        names = {"no_repeat_ngram": "no_repeat_ngram_size"}
        fields = {names.get(name, name): value for name, value in BEAMS[number].items()}
        theirs = their_generate(pair, prompts[i], **fields)
        start = their_inputs(pair, prompts[i])["input_ids"].shape[1]
        assert list(result.completion.tokens) == theirs.sequences[0, start:].tolist(), (i, BEAMS[number])
        if fields:
            score = float(theirs.sequences_scores[0])
            assert result.completion.log_probability == pytest.approx(score, abs=1e-4, rel=1e-6)
        ended += result.completion.finished
    assert 0 < ended < len(results)
    wide = Request(0, prompts[0], SamplingOptions(num_beams=4))
    assert "started with: 3" in next(searches.complete([wide])).error


def test_an_answer_depends_on_nothing_but_its_request(pair: Pair) -> None:
    """To the bit, in any order and company: other slots, other rows of prefilling, other waits."""
    drawn = SamplingOptions(temperature=0.9, top_p=0.95, top_k=80)
    prompts = list(PROMPTS.values())
    requests = [
        Request(
            i,
            prompts[i % len(prompts)],
            dataclasses.replace(
                drawn if i % 3 else SamplingOptions(), seed=i, max_new_tokens=2 + 5 * (i % 4)
            ),
        )
        for i in range(12)
    ]
    alone = {r.key: r for request in requests for r in pair.engine.complete([request])}
    assert len({result.completion.log_probability for result in alone.values()}) == len(requests)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(requests))
        found = list(pair.engine.complete(requests[i] for i in order))
        assert {result.key: result for result in found} == alone, "log-probabilities are equal to the bit"
    # The seed decides.
    again = dataclasses.replace(requests[4], options=dataclasses.replace(requests[4].options, seed=99))
    assert next(pair.engine.complete([again])).completion != alone[4].completion


def test_requests_are_pulled_as_they_are_needed(pair: Pair) -> None:
    """No more than the slots and three batches of prefilling ahead, and results come meanwhile."""
    pulled = 0

    def endless() -> Iterator[Request]:
        nonlocal pulled
        while True:
            yield Request(pulled, PROMPTS["no image"], SamplingOptions(max_new_tokens=1 + pulled % 5))
            pulled += 1

    running = pair.engine.complete(endless())
    for count, _ in enumerate(itertools.islice(running, 30), start=1):
        assert pulled - count <= 3 + 2 + 3 * 2
    with pytest.raises(RuntimeError, match="in the midst of another call"):
        next(pair.engine.complete([]))
    running.close()
    assert list(pair.engine.complete([])) == []


def test_the_device_is_ahead_and_changes_its_slots_in_place(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next steps are on the device before the last ones' tokens are read; the cache is donated to them."""
    started, read, ahead = 0, 0, []
    device, decode, look = pair.engine._device, pair.engine._device.decode, _Run._read

    def counting() -> Any:
        nonlocal started
        started += 1
        cache = device._state.cache.key
        place = cache.unsafe_buffer_pointer()
        found = decode()
        assert cache.is_deleted() and device._state.cache.key.unsafe_buffer_pointer() == place
        return found

    def looking(run: _Run, steps: Any) -> Any:
        nonlocal read
        ahead.append(started - read)
        read += 1
        return look(run, steps)

    monkeypatch.setattr(device, "decode", counting)
    monkeypatch.setattr(_Run, "_read", looking)
    prompts = [PROMPTS["no image"], PROMPTS["one image"]] * 3
    answers(pair.engine, prompts, SamplingOptions(max_new_tokens=20, min_new_tokens=20))
    # Only at the end there is nothing left to start.
    assert ahead[:-1] == [2] * (len(ahead) - 1) and ahead[-1] == 1 and len(ahead) > 10


def test_log_probabilities_are_those_of_torch(pair: Pair) -> None:
    """Of generated answers, drawn and penalised or not, and of given ones."""
    options = SamplingOptions(max_new_tokens=8, temperature=1.0, repetition_penalty=1.2)
    prompts = list(PROMPTS.values())
    for prompt, completion in zip(prompts, answers(pair.engine, prompts, options), strict=True):
        expected = their_log_probability(pair, prompt, list(completion.tokens))
        assert completion.log_probability == pytest.approx(expected, abs=1e-4)

    choices = ("Yes.", "No, it is a red square on a table.", "A")
    requests = [ScoreRequest(i, prompt, choices[: 1 + i % 3]) for i, prompt in enumerate(prompts)]
    bad = ScoreRequest("bad", prompts[0], ("Yes.", ""))
    results = {result.key: result for result in pair.engine.score([*requests, bad])}
    assert "none that is empty" in results.pop("bad").error
    for i, request in enumerate(requests):
        tokens = [pair.engine.tokenizer.encode(choice) for choice in request.choices]
        assert results[i].num_tokens == tuple(map(len, tokens)) and not results[i].error
        expected = [their_log_probability(pair, request.prompt, ids) for ids in tokens]
        np.testing.assert_allclose(results[i].log_probabilities, expected, atol=1e-4)
        assert next(pair.engine.score([request])) == results[i], "to the bit, in other company"


def their_log_probability(pair: Pair, prompt: Prompt, tokens: list[int]) -> float:
    inputs = their_inputs(pair, prompt)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
    with torch.no_grad():
        scores = pair.theirs(**inputs).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
    return float(scores[range(len(tokens)), tokens].sum())


def test_stream_adds_up_to_the_answer(pair: Pair) -> None:
    for name, prompt in PROMPTS.items():
        for seed in range(3):
            options = SamplingOptions(max_new_tokens=40, temperature=1.0, seed=seed)
            pieces = list(pair.engine.stream(prompt, options))
            assert "".join(pieces) == answers(pair.engine, [prompt], options)[0].text, (name, seed)


def test_tokens_that_the_tokenizer_lacks_never_come_out(pair: Pair) -> None:
    """Not even where the model wants nothing else."""
    known = pair.engine.tokenizer.vocab_size
    params = jax.tree.map(np.copy, pair.bundle.params)
    params["text"]["head"]["kernel"][:, known:] *= 50
    wild = engine(dataclasses.replace(pair.bundle, params=params))
    hot = SamplingOptions(max_new_tokens=40, temperature=2.0)
    for options in (hot, dataclasses.replace(hot, temperature=0.0)):
        for completion in answers(wild, [PROMPTS["no image"], PROMPTS["one image"]], options):
            assert max(completion.tokens) < known


@pytest.mark.parametrize("limit", [1, 2, 16, 17, 33])
def test_limits_are_kept(pair: Pair, limit: int) -> None:
    """Each row's own, also where it falls in the middle of what is decoded at a time."""
    rows = [SamplingOptions(max_new_tokens=limit), SamplingOptions(max_new_tokens=33)]
    prompts = [PROMPTS["one image"], PROMPTS["no image"]]
    short, long = answers(pair.engine, prompts, rows)
    whole = answers(pair.engine, prompts, SamplingOptions(max_new_tokens=33))
    assert short.tokens == whole[0].tokens[:limit]
    assert long == whole[1]
    if len(whole[0].tokens) == 33:
        assert len(short.tokens) == limit and not short.finished


def swapped(bundle: ModelBundle, a: int, b: int, **fields: Any) -> ModelBundle:
    """The same model with two tokens' rows exchanged: where it said one, it says the other."""
    params = jax.tree.map(np.copy, bundle.params)
    table, head = params["text"]["embedding"], params["text"]["head"]["kernel"]
    table[[a, b]], head[:, [a, b]] = table[[b, a]], head[:, [b, a]]
    return dataclasses.replace(bundle, params=params, **fields)


@pytest.mark.parametrize(("template", "stop"), [("v1", "</s>"), ("plain", "\n")])
def test_generation_stops(pair: Pair, template: str, stop: str) -> None:
    """At the end token, and in a plain caption at the newline; the text ends before either."""
    prompt = Prompt((human("<image>"),), (picture(7),))
    bundle = dataclasses.replace(pair.bundle, template=template)
    tokenizer = pair.engine.tokenizer
    end = tokenizer.eos_id if stop == "</s>" else tokenizer.encode("\n")[-1]
    free = answers(engine(bundle), [prompt], SamplingOptions(max_new_tokens=30))[0].tokens
    used = set(encode_prompt(get_template(template), prompt.turns, tokenizer).tolist()) | {end}
    # The first late token that came up for the first time, and not in the prompt, becomes the end.
    at = next(i for i in range(4, len(free)) if free[i] not in used | set(free[:i]))
    assert end not in free[: at + 1]
    stopping = engine(swapped(bundle, free[at], end))
    (completion,) = answers(stopping, [prompt], SamplingOptions(max_new_tokens=30))
    assert completion.tokens == (*free[:at], end)
    assert completion.finished
    assert completion.text == tokenizer.decode(free[:at]).strip()
    assert "".join(stopping.stream(prompt, SamplingOptions(max_new_tokens=30))) == completion.text


def test_stop_strings_end_an_answer(pair: Pair) -> None:
    """Before the string, wherever its tokens begin; what is streamed never shows a part of it."""
    prompt = PROMPTS["one image"]
    free = answers(pair.engine, [prompt], SamplingOptions(max_new_tokens=30))[0]
    for start, end in ((3, 4), (6, 9), (11, 17)):
        stop = free.text[start:end]
        options = SamplingOptions(max_new_tokens=30, stop=("never", stop))
        (found,) = answers(pair.engine, [prompt], options)
        assert found.stop == "stop_string" and found.finished
        assert found.text == free.text[: free.text.index(stop)].strip()
        assert found.tokens == free.tokens[: len(found.tokens)]
        pieces = list(pair.engine.stream(prompt, options))
        assert "".join(pieces) == found.text
        # Slots of answers that ended here are given away like any others.
        mixed = answers(
            pair.engine, [prompt] * 5, [options, SamplingOptions(max_new_tokens=30)] * 2 + [options]
        )
        assert mixed == [found, free, found, free, found]


def test_bad_requests_cost_themselves(pair: Pair) -> None:
    """Their results say what was wrong; the others are answered as if they were alone."""
    long = Prompt((human("red " * MAX_POSITIONS),))
    options = SamplingOptions(max_new_tokens=4)
    bad = {
        "long": (long, options, "positions of a slot; shorten it"),
        "many": (
            PROMPTS["one image"],
            SamplingOptions(max_new_tokens=300),
            "and max_new_tokens=300 are more than",
        ),
        "broken": (
            Prompt((human("<image>\nWhat?"),), (b"no image",)),
            options,
            "image 0 of the prompt: can't be",
        ),
        "missing": (Prompt((human("<image>\nWhat?"),)), options, ""),
        "surplus": (Prompt((human("<image>\n<image>"),), (picture(0),)), options, "1 images for 2 <image>"),
        "wrong": (Prompt((human("<image>\nWhat?"),), ("a.png",)), options, "a bytes-like object is required"),  # type: ignore[arg-type]
        "empty": (Prompt(()), options, "at least one turn"),
    }
    requests = [Request(name, prompt, row) for name, (prompt, row, _) in bad.items()]
    good = [Request(name, prompt, options) for name, prompt in PROMPTS.items()]
    mixed = [request for both in zip(good + good[:3], requests, strict=True) for request in both]
    results = list(pair.engine.complete(mixed))
    assert len(results) == len(mixed)
    errors = {result.key: result.error for result in results if result.error}
    assert errors.keys() == bad.keys() - {"missing"}, "an <image> without images is text"
    for name, error in errors.items():
        assert bad[name][2] in error, (name, error)
        assert all(result.completion is None for result in results if result.key == name)
    alone = dict(zip(PROMPTS, answers(pair.engine, list(PROMPTS.values()), options), strict=True))
    for result in results:
        if result.key in PROMPTS:
            assert result.completion == alone[result.key]
    with pytest.raises(ValueError, match="1 images for 2"):
        list(pair.engine.stream(*bad["surplus"][:2]))


def test_nothing_to_do(pair: Pair) -> None:
    assert list(pair.engine.complete([])) == []


def test_a_model_needs_its_tokenizer(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer\.model"):
        engine(dataclasses.replace(pair.bundle, tokenizer_file=None))


def test_int8_halves_the_memory_and_keeps_the_probabilities(pair: Pair) -> None:
    """Of weights and of the cache; what it costs in accuracy is in docs/inference.md."""
    prompts = [PROMPTS["one image"], PROMPTS["three turns"]]
    options = SamplingOptions(max_new_tokens=6)
    exact = answers(pair.engine, prompts, options)
    for fields in ({"weights": "int8"}, {"kv": "int8"}):
        small = engine(pair.bundle, **fields)
        for prompt, found, expected in zip(prompts, answers(small, prompts, options), exact, strict=True):
            theirs = their_log_probability(pair, prompt, list(found.tokens))
            assert found.log_probability == pytest.approx(theirs, abs=0.2), fields
            # Not the same numbers: it was quantized.
            assert found.log_probability != expected.log_probability
        part = "parameters" if "weights" in fields else "slots"
        assert getattr(small.memory, part) < 0.7 * getattr(pair.engine.memory, part)


def test_slots_that_do_not_fit_are_refused(pair: Pair) -> None:
    memory = pair.engine.memory
    needed = memory.parameters + memory.slots + memory.prefill
    engine(pair.bundle, memory_limit=int(needed / 0.9) + 2)
    with pytest.raises(ValueError, match=r"slots=3 of capacity=256 don't fit.*at most slots=2 fit"):
        engine(pair.bundle, memory_limit=int(needed / 0.9) - 100)
    with pytest.raises(ValueError, match="not one slot fits"):
        engine(pair.bundle, memory_limit=1000)
    with pytest.raises(ValueError, match="kv='fp8' is neither"):
        engine(pair.bundle, kv="fp8")
