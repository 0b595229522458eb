"""What the device holds while it generates, and the programs that change it.

A prompt is prefilled by itself, waits, and is inserted into a free slot; a step chooses one token for
every slot and runs it. Each slot's numbers come from its own row alone, and every program has one shape
for all requests of a bucket: what a request gets depends on nothing but itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt8

from sg4v_jax.infer.beam import Beams, choose
from sg4v_jax.infer.sampling import RowOptions, SamplingOptions, penalize, sample
from sg4v_jax.kernels.decoding import CACHE_AXES
from sg4v_jax.models.cache import KVCache
from sg4v_jax.models.config import TextConfig
from sg4v_jax.models.sharegpt4v import ShareGPT4V
from sg4v_jax.parallel import rules

# In the place of a token: a slot that has nothing to say.
NOTHING = -1
# In the place of the first slot's token: its group searches on, or has ended its search.
SEARCHING, FOUND = -2, -3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All slots.

    Attributes:
      cache: what the slots have seen.
      hidden: [slots, d], the decoder's output at the last position: the next token comes from it.
      history: int32[slots, capacity], the tokens in the cache; -1 for an image feature.
      seen: bool[slots, vocab], which tokens these are.
      step: int32[slots], tokens generated.
      active: int32[slots], 1 where there is more to generate.
      options: the slots' options.
      beams: where beam searches are; None without them.
    """

    cache: KVCache
    hidden: Float[Array, "slots d"]
    history: Int[Array, "slots capacity"]
    seen: Bool[Array, "slots vocab"]
    step: Int[Array, " slots"]
    active: Int[Array, " slots"]
    options: RowOptions
    beams: Beams | None

    @classmethod
    def empty(
        cls,
        config: TextConfig,
        slots: int,
        capacity: int,
        num_beams: int,
        dtype: jnp.dtype,
        kv_dtype: jnp.dtype,
    ) -> "State":
        """Slots with nothing in them, in groups of `num_beams`."""
        zeros = jnp.zeros(slots, jnp.int32)
        return cls(
            cache=KVCache.empty(config, slots, capacity, kv_dtype),
            hidden=jnp.zeros((slots, config.hidden_size), dtype),
            history=jnp.full((slots, capacity), NOTHING, jnp.int32),
            seen=jnp.zeros((slots, config.vocab_size), bool),
            step=zeros,
            active=zeros,
            options=jax.tree.map(jnp.asarray, RowOptions.of([SamplingOptions()] * slots)),
            beams=Beams.empty(slots // num_beams, num_beams, capacity) if num_beams > 1 else None,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prefilled prompts that wait for slots.

    Attributes:
      key, value: [layers, rows, length, kv_heads, head_dim].
      hidden: [rows, d], the decoder's output at each prompt's last position.
      tokens: int32[rows, length], -1 for an image feature or padding.
      lengths: int32[rows].
      options: the rows' options.
    """

    key: Float[Array, "layers rows length kv_heads head_dim"]
    value: Float[Array, "layers rows length kv_heads head_dim"]
    hidden: Float[Array, "rows d"]
    tokens: Int[Array, "rows length"]
    lengths: Int[Array, " rows"]
    options: RowOptions


def shardings(state: State, mesh: Mesh) -> State:
    """NamedShardings of a state (of arrays or ShapeDtypeStructs): slots over the batch axes."""

    def of_slots(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return rules.sharding(("batch", *[None] * (leaf.ndim - 1)), leaf.shape, mesh)

    return dataclasses.replace(jax.tree.map(of_slots, state), cache=cache_shardings(state.cache, mesh))


def cache_shardings(cache: KVCache, mesh: Mesh) -> KVCache:
    """NamedShardings of a cache: slots over the batch axes, heads over the tensor axis."""

    def of_leaf(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = CACHE_AXES[: leaf.ndim] if leaf.ndim > 1 else ("batch",)
        return rules.sharding(axes, leaf.shape, mesh)

    return jax.tree.map(of_leaf, cache)


def prefill(
    model: ShareGPT4V,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    image_index: Int[Array, "rows length"],
    images: UInt8[Array, "rows slots height width 3"] | None,
    options: RowOptions,
) -> Prefix:
    """Runs prompts, padded on the right."""
    features = None if images is None else model.encode_images(images)
    x = model.embed(jnp.maximum(tokens, 0), image_index, features)
    hidden, key, value = model.text.prefill(x)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return Prefix(key, value, last, tokens, lengths, options)


def insert(state: State, prefix: Prefix, groups: Int[Array, " rows"]) -> State:
    """Gives prompts to groups of slots (of one, without beams). One that doesn't exist leaves its row out."""
    if state.beams is None:
        return _insert(state, prefix, groups, active=jnp.int32(1))
    width = state.beams.score.shape[1]
    for beam in range(width):
        active = (prefix.options.num_beams > beam).astype(jnp.int32)
        state = _insert(state, prefix, groups * width + beam, active)
    assert state.beams is not None
    return dataclasses.replace(state, beams=state.beams.restart(groups))


def _insert(state: State, prefix: Prefix, slots: Int[Array, " rows"], active: Int[Array, "..."]) -> State:
    rows, length = prefix.tokens.shape
    put = lambda old, new: old.at[slots].set(new, mode="drop")  # noqa: E731
    vocab = state.seen.shape[1]
    seen = jnp.zeros((rows, vocab), bool)
    named = jnp.where(prefix.tokens >= 0, prefix.tokens, vocab)
    seen = seen.at[jnp.arange(rows)[:, None], named].set(True, mode="drop")
    return State(
        cache=state.cache.insert(prefix.key, prefix.value, slots, prefix.lengths),
        hidden=put(state.hidden, prefix.hidden),
        history=state.history.at[slots, :length].set(prefix.tokens, mode="drop"),
        seen=put(state.seen, seen),
        step=put(state.step, 0),
        active=put(state.active, active),
        options=jax.tree.map(put, state.options, prefix.options),
        beams=state.beams,
    )


def decode(
    model: ShareGPT4V, state: State, *, steps: int, vocab: int, stop_ids: tuple[int, ...]
) -> tuple[State, Int[Array, "steps slots"], Float[Array, "steps slots"]]:
    """Generates up to `steps` tokens for every slot.

    Args:
      model: the model.
      state: the slots.
      steps: how many tokens.
      vocab: tokens that the tokenizer knows; rows of the table behind them must never come out.
      stop_ids: tokens that end an answer.

    Returns:
      (state, tokens, their log-probabilities), NOTHING where a slot is not in use.
    """

    def more(carry):  # type: ignore[no-untyped-def]
        i, state, _, _ = carry
        return (i < steps) & state.active.any()

    def body(carry):  # type: ignore[no-untyped-def]
        i, state, tokens, log_probabilities = carry
        logits = known_logits(model, state.hidden, vocab)
        token = sample(_penalized(logits, state, stop_ids), state.step, state.options)
        ended = jnp.isin(token, jnp.array(stop_ids)) | (state.step + 1 >= state.options.max_new_tokens)
        found = log_probability(logits, token)
        shown = token
        if state.beams is not None:
            state, token, ended, shown = _search(logits, state, token, ended, stop_ids)
        tokens = tokens.at[i].set(jnp.where(state.active > 0, shown, NOTHING))
        return i + 1, _advance(model, state, token, ended), tokens, log_probabilities.at[i].set(found)

    slots = state.step.size
    tokens = jnp.full((steps, slots), NOTHING, jnp.int32)
    start = (jnp.int32(0), state, tokens, jnp.zeros((steps, slots)))
    _, state, tokens, log_probabilities = jax.lax.while_loop(more, body, start)
    return state, tokens, log_probabilities


def _penalized(scores: Array, state: State, stop_ids: tuple[int, ...]) -> Array:
    lengths = state.cache.lengths
    return penalize(scores, state.seen, state.history, lengths, state.step, state.options, stop_ids)


def _search(
    logits: Array, state: State, token: Array, ended: Array, stop_ids: tuple[int, ...]
) -> tuple[State, Array, Array, Array]:
    """Takes beam searches a token further; the other groups keep what was chosen.

    Returns:
      (state with the beams in their new order, tokens, whether they are the last, what to show of them).
    """
    assert state.beams is not None
    log_probabilities = _penalized(jax.nn.log_softmax(logits), state, stop_ids)
    beams, chosen, source, over = choose(state.beams, log_probabilities, state.step, state.options, stop_ids)
    searching = state.options.num_beams > 1
    slots = jnp.arange(token.size)
    source = jnp.where(searching, source, slots)
    first = slots % beams.score.shape[1] == 0
    shown = jnp.where(first, jnp.where(over, FOUND, SEARCHING), NOTHING)
    state = dataclasses.replace(
        state,
        cache=state.cache.take(source),
        history=state.history[source],
        seen=state.seen[source],
        beams=beams,
    )
    pick = lambda searched, other: jnp.where(searching, searched, other)  # noqa: E731
    return state, pick(chosen, token), pick(over, ended), pick(shown, token)


def best_beam(state: State, group: Int[Array, ""]) -> tuple[Array, Array, Array]:
    """(tokens int32[capacity], how many, score) of the best answer that a group's search has found."""
    assert state.beams is not None
    beams = state.beams
    return beams.ended_tokens[group, 0], beams.ended_length[group, 0], beams.ended_score[group, 0]


def _advance(
    model: ShareGPT4V, state: State, token: Int[Array, " slots"], ended: Bool[Array, " slots"]
) -> State:
    """Runs the chosen tokens, where more are to come."""
    active = state.active * ~ended
    rows = jnp.arange(token.size)
    at = jnp.where(active > 0, state.cache.lengths, state.history.shape[1])
    hidden, cache = model.text.decode(model.text.embed(token[:, None]), state.cache, active)
    return dataclasses.replace(
        state,
        cache=cache,
        hidden=hidden[:, 0],
        history=state.history.at[rows, at].set(token, mode="drop"),
        seen=state.seen.at[rows, token].max(active > 0),
        step=state.step + state.active,
        active=active,
    )


def score(
    model: ShareGPT4V, prefix: Prefix, choices: Int[Array, "rows choices length"], *, vocab: int
) -> Float[Array, "rows choices"]:
    """Log-probabilities of answers to prefilled prompts, in nats.

    Args:
      model: the model.
      prefix: the prompts.
      choices: the answers' tokens, NOTHING behind the last.
      vocab: tokens that the tokenizer knows.
    """
    rows, branches, length = choices.shape
    tokens = jnp.maximum(choices, 0)
    x = model.text.embed(tokens.reshape(rows * branches, length))
    hidden = model.text.branch(
        x.reshape(*choices.shape, x.shape[-1]), prefix.key, prefix.value, prefix.lengths
    )
    # The first token comes from the prompt's last position, the others from the token before.
    first = jnp.broadcast_to(prefix.hidden[:, None, None], (rows, branches, 1, hidden.shape[-1]))
    before = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)

    def of_choice(inputs: tuple[Array, Array, Array]) -> Array:
        before, tokens, choice = inputs
        found = log_probability(known_logits(model, before, vocab), tokens)
        return jnp.where(choice >= 0, found, 0).sum(-1)

    # One choice after the other: scores over the vocabulary are large.
    columns = [x.swapaxes(0, 1) for x in (before, tokens, choices)]
    return jax.lax.map(of_choice, tuple(columns)).swapaxes(0, 1)


def known_logits(model: ShareGPT4V, hidden: Float[Array, "*rows d"], vocab: int) -> Float[Array, "*rows all"]:
    """Scores, without the rows of the table that the tokenizer has no piece for."""
    logits = model.text.logits(hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)


def log_probability(logits: Float[Array, "*rows vocab"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Of tokens, in nats."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
