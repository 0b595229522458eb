"""The train step: accumulation, reductions, the chunked loss, packing, freezing, remat, precision."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sg4v_jax.data.batch import Batch
from sg4v_jax.kernels.cross_entropy import chunked_cross_entropy
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.train import groups
from sg4v_jax.train.step import make_loss, make_train_step, normalize_weights
from tests.tiny import (
    GROUPS,
    jit,
    model_config,
    packed,
    random_batch,
    random_params,
    random_sample,
    relative_errors,
)

FLOAT32 = jnp.dtype("float32")
# Relative: of the loss and of all gradients together, and of every single parameter's gradient.
TOLERANCE, WORST_TOLERANCE = 1e-6, 1e-5
CONFIG = model_config(tuned_from=3, frozen_layers=6)
PARAMS = random_params(CONFIG, std=0.1)


def check_gradients(ours: Any, theirs: Any) -> tuple[float, float]:
    """Asserts that two gradients are equal but for rounding; returns the errors (all, worst)."""
    difference = jax.tree.map(lambda a, b: np.float64(a) - b, ours, theirs)
    total = float(optax.tree.norm(difference) / optax.tree.norm(theirs))
    errors = relative_errors(ours, theirs)
    # The true gradient of a key bias is 0 (softmax does not see a shift): only rounding is left.
    worst = max(error for path, error in errors.items() if not path.endswith("key/bias"))
    assert total <= TOLERANCE
    assert worst <= WORST_TOLERANCE, errors
    return total, worst


@functools.cache
def compiled_step(**options: Any) -> Any:
    # Hands the gradients out as the new state (the old one only has their shapes): a difference of weights
    # would round them.
    optimizer = optax.GradientTransformation(lambda params: (), lambda grads, state, params: (grads, grads))
    options = {"compute_dtype": FLOAT32, "loss_chunk": 16, "kinds": 4, **options}
    return jit(make_train_step(abstract_model(CONFIG)[0], optimizer, **options))


def gradients_of(batch: Batch, **options: Any) -> Any:
    """(gradients, metrics) of one step."""
    trainable, frozen = groups.split(PARAMS, GROUPS)
    _, gradients, metrics = compiled_step(**options)(trainable, trainable, frozen, batch)
    return jax.device_get((gradients, metrics))


@jit
def _token_losses(params: Any, batch: Batch) -> jax.Array:
    model = nnx.merge(abstract_model(CONFIG)[0], params)
    hidden = model(batch.tokens, batch.positions, batch.segment_ids, batch.images, batch.image_index)
    log_probs = jax.nn.log_softmax(model.text.logits(hidden))
    chosen = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    return -chosen * batch.loss_weights


def token_losses(batch: Batch) -> np.ndarray:
    """float[rows, length], the plain way: all logits at once. 0 where nothing is supervised."""
    return np.asarray(_token_losses(PARAMS, batch), np.float64)


# --- Accumulation and reduction ------------------------------------------------------------------


@pytest.mark.slow
def test_accumulation_changes_nothing(record_property: Any) -> None:
    batch = random_batch(CONFIG, 4)
    per_row = batch.loss_weights.sum(1)
    assert len(set(per_row.tolist())) > 2, "supervision must be uneven"
    expected, metrics = gradients_of(batch)
    by_hand = token_losses(batch).sum() / per_row.sum()
    np.testing.assert_allclose(metrics["loss"], by_hand, rtol=1e-6)
    assert metrics["supervised_tokens"] == per_row.sum()
    assert metrics["tokens"] == (batch.segment_ids > 0).sum()
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected), rtol=1e-6)
    # Two at a time are in tests/parallel/test_sharding.py.
    gradients, found = gradients_of(batch, accumulate=4)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)
    record_property("accumulate_4", check_gradients(gradients, expected))


def test_microbatch_reduction_is_the_mean_of_means() -> None:
    """What the original computes: each microbatch counts alike, however little it supervises."""
    batch = random_batch(CONFIG, 4)
    losses, weights = token_losses(batch), np.asarray(batch.loss_weights)
    # Microbatch i takes every n-th row.
    means = [losses[i::2].sum() / weights[i::2].sum() for i in range(2)]
    gradients, metrics = gradients_of(batch, accumulate=2, reduction="microbatch")
    np.testing.assert_allclose(metrics["loss"], np.mean(means), rtol=1e-6)
    assert abs(np.mean(means) - losses.sum() / weights.sum()) > 1e-4, "the two reductions must differ here"
    # The same, said by weights that add up to 1.
    shares = np.stack([weights[i] / weights[i % 2 :: 2].sum() / 2 for i in range(4)])
    expected, _ = gradients_of(dataclasses.replace(batch, loss_weights=shares))
    check_gradients(gradients, expected)


def test_rows_without_supervision_are_no_division_by_zero() -> None:
    weights = jnp.zeros((2, 1, 3))
    for reduction in ("token", "microbatch"):
        assert not np.isnan(normalize_weights(weights, reduction)).any()
    with pytest.raises(ValueError, match="'mean' is not one of"):
        normalize_weights(weights, "mean")


def test_rows_must_divide_by_accumulate() -> None:
    with pytest.raises(ValueError, match=r"4 rows do not divide by config\.train\.accumulate=3"):
        gradients_of(random_batch(CONFIG, 4), accumulate=3)


# --- The chunked loss ----------------------------------------------------------------------------

LENGTH, WIDTH, VOCAB = 16, 8, 11


def chunk_inputs() -> tuple[jax.Array, np.ndarray, np.ndarray, jax.Array]:
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(3, LENGTH, WIDTH)).astype(np.float32)
    targets = generator.integers(0, VOCAB, (3, LENGTH)).astype(np.int32)
    weights = (generator.random((3, LENGTH)) * (generator.random((3, LENGTH)) < 0.6)).astype(np.float32)
    head = generator.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    return jnp.array(hidden), targets, weights, jnp.array(head)


def plain_loss(hidden: jax.Array, head: jax.Array, targets: np.ndarray, weights: np.ndarray) -> jax.Array:
    log_probs = jax.nn.log_softmax(hidden @ head)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -(chosen * weights).sum()


@pytest.mark.parametrize("chunk", [1, 5, 8, 15, 16, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    hidden, targets, weights, head = chunk_inputs()

    def chunked(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, correct = chunked_cross_entropy(hidden, targets, weights > 0, head, chunk)
        return (losses * weights).sum(), correct

    gradient = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
    (value, correct), found = gradient(hidden, head)
    plain = jax.value_and_grad(plain_loss, argnums=(0, 1))
    expected_value, expected = jax.jit(plain)(hidden, head, targets, weights)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    right = (np.asarray(hidden @ head).argmax(-1) == targets) & (weights > 0)
    np.testing.assert_array_equal(correct, right)


@pytest.mark.parametrize("chunk", [3, 11])
def test_of_equal_scores_the_first_is_the_prediction(chunk: int) -> None:
    """As for an argmax over all pieces, also where a later chunk has the same score."""
    hidden = jnp.ones((1, VOCAB, 2))
    head = jnp.array([[0.0, 3, 1, 3, 3, 0, 2, 3, 1, 0, 3]] * 2)
    targets = np.arange(VOCAB)[None]
    _, correct = chunked_cross_entropy(hidden, targets, targets >= 0, head, chunk)
    np.testing.assert_array_equal(correct, targets == 1)


@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_what_padding_holds_does_not_matter(poison: float) -> None:
    """Neither to the loss nor to any gradient."""
    hidden, targets, weights, head = chunk_inputs()
    spoilt = jnp.where(weights[..., None] > 0, hidden, poison)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        losses, _ = chunked_cross_entropy(hidden, targets, weights > 0, head, 5)
        return (losses * weights).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected, found = gradient(hidden, head), gradient(spoilt, head)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- Packing -------------------------------------------------------------------------------------


def test_packed_samples_are_blind_to_each_other(record_property: Any) -> None:
    """The loss of each token, and the gradients, are those of one sample in a row."""
    generator = np.random.default_rng(1)
    counts = ((1, 7), (0, 9), (2, 8), (1, 6))
    samples = [random_sample(CONFIG, generator, images, text) for images, text in counts]
    alone = packed(samples, length=40, slots=2, packing=False)
    together = packed(samples, length=40, slots=2)
    assert together.segment_ids.max(axis=1).tolist() == [3, 1]
    # Empty rows, so that one program serves both.
    together = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), together)
    together.image_index[2:] = -1
    expected = {}
    losses = token_losses(alone)
    for row in range(len(alone.tokens)):
        inside = alone.segment_ids[row] == 1
        expected[alone.tokens[row, inside].tobytes()] = losses[row, inside]
    losses, seen, error = token_losses(together), 0, 0.0
    for row in range(len(together.tokens)):
        for segment in range(1, together.segment_ids[row].max() + 1):
            inside = together.segment_ids[row] == segment
            found = losses[row, inside]
            wanted = expected[together.tokens[row, inside].tobytes()]
            error = max(error, float(np.abs(found - wanted).max()))
            np.testing.assert_allclose(found.sum(), wanted.sum(), rtol=1e-5)
            seen += 1
    assert seen == len(samples)
    assert error <= 2e-5
    record_property("loss_error", error)
    gradients = [gradients_of(batch)[0] for batch in (together, alone)]
    record_property("gradient_errors", check_gradients(*gradients))
    # Also of each sample on its own: the others' losses are switched off, their tokens are still there.
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1)):
        inside = together.segment_ids == segment
        inside[:row], inside[row + 1 :] = False, False
        (same,) = [r for r in range(len(alone.tokens)) if np.array_equal(
            alone.tokens[r, alone.segment_ids[r] == 1], together.tokens[inside])]  # fmt: skip
        one = only(together, inside), only(alone, np.arange(len(alone.tokens))[:, None] == same)
        check_gradients(*(gradients_of(batch)[0] for batch in one))


def only(batch: Batch, where: np.ndarray) -> Batch:
    """The batch with its losses outside of `where` switched off."""
    return dataclasses.replace(batch, loss_weights=np.where(where, batch.loss_weights, 0).astype(np.float32))


# --- What is measured ----------------------------------------------------------------------------


def test_losses_by_kind() -> None:
    """Of samples packed into rows and spread over microbatches, as if each had been alone."""
    generator = np.random.default_rng(2)
    counts = ((1, 7), (0, 9), (2, 8), (1, 6), (0, 8), (1, 10))
    samples = [random_sample(CONFIG, generator, images, text) for images, text in counts]
    losses = token_losses(packed(samples, length=40, slots=2, packing=False))
    expected = {kind: [0.0, 0] for kind in range(4)}
    for (images, text), sample, row in zip(counts, samples, losses, strict=True):
        found = expected[2 * (text % 2) + (images > 0)]
        found[0] += row.sum()
        found[1] += sample["loss_weights"].sum()
    batch = packed(samples, length=40, slots=2)
    rows = len(batch.tokens)
    assert rows < 4 < len(samples), "several samples must share a row"
    # The shape that other tests have compiled the step for.
    batch = jax.tree.map(lambda x: np.concatenate([x, np.zeros((4 - rows, *x.shape[1:]), x.dtype)]), batch)
    batch.image_index[rows:] = -1
    _, metrics = gradients_of(batch, accumulate=2)
    np.testing.assert_allclose(metrics["kind_losses"], [loss for loss, _ in expected.values()], rtol=1e-5)
    assert metrics["kind_tokens"].tolist() == [tokens for _, tokens in expected.values()]
    assert min(metrics["kind_tokens"]) > 0
    whole = metrics["kind_losses"].sum() / metrics["supervised_tokens"]
    np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-6)


def test_what_a_batch_holds_and_norms_by_tower() -> None:
    batch = random_batch(CONFIG, 4)
    gradients, metrics = gradients_of(batch)
    samples = [(row == n).sum() for row in batch.segment_ids for n in range(1, row.max() + 1)]
    assert metrics["samples"] == len(samples) and metrics["tokens"] == sum(samples)
    assert metrics["pairs"] == sum(n * (n + 1) // 2 for n in samples)
    features = CONFIG.vision.num_image_tokens
    assert metrics["image_features"] == features * (batch.images.reshape(8, -1).max(1) > 0).sum()
    for tower in ("vision", "projector", "text"):
        norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(gradients[tower])))
        np.testing.assert_allclose(metrics[f"grad_norm/{tower}"], norm, rtol=1e-6)


# --- Freezing, remat, precision ------------------------------------------------------------------


def test_frozen_parameters_have_no_gradient_no_state_and_no_activations() -> None:
    trainable, frozen = groups.split(PARAMS, GROUPS)
    held = {path for path, _ in groups.flatten(frozen)}
    assert any(path.startswith("vision/frozen/") for path in held)
    batch = random_batch(CONFIG, 4)
    graphdef = abstract_model(CONFIG)[0]
    loss = make_loss(graphdef, compute_dtype=FLOAT32, remat="none", loss_chunk=16)
    # What the backward pass keeps: nothing with the frozen stack's layers and the images in front.
    keeps = jax.eval_shape(
        lambda trainable, frozen, batch: jax.vjp(lambda t: loss(t, frozen, batch)[0], trainable)[1],
        *(trainable, frozen, batch),
    )
    images = batch.images.shape[0] * batch.images.shape[1]
    kept = [leaf.shape[:2] for leaf in jax.tree.leaves(keeps)]
    assert (CONFIG.vision.num_used_layers - 3, images) in kept, "the tuned blocks' activations are kept"
    assert (3, images) not in kept, "the frozen blocks' are not"

    optimizer = optax.adam(1e-2)
    state = jax.jit(optimizer.init)(trainable)
    assert {path for path, _ in groups.flatten(optax.tree.get(state, "mu"))}.isdisjoint(held)
    step = jit(make_train_step(graphdef, optimizer, compute_dtype=FLOAT32))
    for _ in range(2):
        trainable, state, _ = step(trainable, state, frozen, batch)
    after = dict(groups.flatten(jax.device_get(groups.merge(trainable, frozen))))
    for path, leaf in groups.flatten(jax.device_get(PARAMS)):
        unchanged = np.array_equal(leaf, after[path])
        assert unchanged == (path in held), path


@pytest.mark.slow
def test_remat_policies_give_equal_gradients() -> None:
    batch = random_batch(CONFIG, 4)
    expected, metrics = gradients_of(batch)
    for remat in ("full", "dots"):
        gradients, found = gradients_of(batch, remat=remat)
        check_gradients(gradients, expected)
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)
    with pytest.raises(ValueError, match="'some' is not one of"):
        gradients_of(batch, remat="some")


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_masters() -> None:
    batch = random_batch(CONFIG, 4)
    trainable, frozen = groups.split(PARAMS, GROUPS)
    # As the loop does: what doesn't train is stored in the compute dtype.
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    optimizer = optax.adam(1e-5)
    step = make_train_step(abstract_model(CONFIG)[0], optimizer, compute_dtype=jnp.dtype("bfloat16"))
    new, state, metrics = jit(step)(trainable, jax.jit(optimizer.init)(trainable), frozen, batch)
    for leaf in jax.tree.leaves((new, optax.tree.get(state, "mu"), optax.tree.get(state, "nu"))):
        assert leaf.dtype == jnp.float32
    assert metrics["loss"].dtype == jnp.float32
    reference = gradients_of(batch)[1]["loss"]
    np.testing.assert_allclose(metrics["loss"], reference, rtol=0.03)
    # A step of 1e-5 on norm scales about 1: bfloat16, with 8 bits, would swallow it.
    scale, old = new["text"]["norm"]["scale"], PARAMS["text"]["norm"]["scale"]
    np.testing.assert_allclose(np.abs(scale - old), 1e-5, rtol=0.1)
