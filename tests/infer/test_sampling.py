"""Choosing a token: the scores that `transformers` would sample from, and the draws from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sg4v_jax.infer.sampling import RowOptions, SamplingOptions, penalize, sample

VOCAB, DRAWS = 50, 400
OPTIONS = [
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.4),
    SamplingOptions(temperature=2.5, seed=3),
    SamplingOptions(temperature=1.0, top_k=1),
    SamplingOptions(temperature=1.0, top_k=7),
    SamplingOptions(temperature=1.0, top_k=2 * VOCAB),
    SamplingOptions(temperature=1.0, top_p=0.5),
    SamplingOptions(temperature=1.0, top_p=0.05),
    SamplingOptions(temperature=1.0, repetition_penalty=1.7),
    SamplingOptions(temperature=1.0, repetition_penalty=0.6, seed=2**31),
    SamplingOptions(temperature=1.3, top_k=20, top_p=0.8, repetition_penalty=1.2, seed=11),
]


def their_scores(logits: np.ndarray, seen: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """What is left of the scores of one row, in their order of filters; -inf: can't be drawn."""
    filters = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    if options.temperature:
        filters.append(TemperatureLogitsWarper(options.temperature))
        filters.append(TopKLogitsWarper(options.top_k or len(logits)))
        filters.append(TopPLogitsWarper(options.top_p))
    ids = torch.from_numpy(np.flatnonzero(seen))[None]
    return filters(ids, torch.from_numpy(logits)[None].clone())[0].numpy()


def inputs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=2, size=(len(OPTIONS), VOCAB)).astype(np.float32)
    return logits, generator.random((len(OPTIONS), VOCAB)) < 0.3


def penalized(logits: np.ndarray, seen: np.ndarray, options: RowOptions) -> jax.Array:
    """Scores after the repetition penalty, with nothing in the history."""
    zeros = jnp.zeros(len(logits), jnp.int32)
    return penalize(jnp.array(logits), jnp.array(seen), zeros[:, None], zeros, zeros, options, (2,))


def test_draws_are_from_the_scores_of_transformers() -> None:
    """The same noise picks the same token, every time: support and distribution are equal."""
    logits, seen = inputs()
    options = RowOptions.of(OPTIONS)
    scores = penalized(logits, seen, options)
    draw = jax.jit(jax.vmap(lambda step: sample(scores, jnp.full(len(OPTIONS), step), options)))
    found = np.asarray(draw(jnp.arange(DRAWS)))
    supports = []
    for row, row_options in enumerate(OPTIONS):
        scores = their_scores(logits[row], seen[row], row_options)
        key = jax.random.key(np.uint32(row_options.seed))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(DRAWS))
        expected = jax.vmap(jax.random.categorical, (0, None))(keys, jnp.array(scores))
        np.testing.assert_array_equal(found[:, row], expected, err_msg=str(row_options))
        supports.append(int(np.isfinite(scores).sum()))
        assert np.isfinite(scores[found[:, row]]).all()
    assert supports[3] == 1 and supports[4] == 7 and supports[0] == supports[5] == VOCAB
    assert 1 <= supports[7] < supports[6] < VOCAB


def test_frequencies_follow_the_probabilities() -> None:
    """Steps and seeds give independent draws: what is drawn often is what is likely."""
    logits = np.random.default_rng(1).normal(size=(1, 6)).astype(np.float32)
    draws = 4000
    for vary_seed in (False, True):
        rows = [SamplingOptions(temperature=1.0, seed=i if vary_seed else 0) for i in range(draws)]
        steps = jnp.zeros(draws, jnp.int32) if vary_seed else jnp.arange(draws)
        many = np.repeat(logits, draws, axis=0)
        found = np.asarray(jax.jit(sample)(many, steps, RowOptions.of(rows)))
        expected = np.asarray(jax.nn.softmax(logits[0]))
        frequencies = np.bincount(found, minlength=6) / draws
        # Four standard deviations.
        assert (np.abs(frequencies - expected) < 4 * np.sqrt(expected / draws)).all()


def test_greedy_is_the_best_after_the_penalty() -> None:
    logits, seen = inputs()
    for penalty in (1.0, 1.5, 3.0):
        greedy = SamplingOptions(repetition_penalty=penalty, top_k=3, top_p=0.1)
        options = RowOptions.of([greedy] * len(logits))
        found = sample(penalized(logits, seen, options), jnp.zeros(len(logits), jnp.int32), options)
        expected = [their_scores(row, mask, greedy).argmax() for row, mask in zip(logits, seen, strict=True)]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.* is out of range"):
        SamplingOptions(**options)
