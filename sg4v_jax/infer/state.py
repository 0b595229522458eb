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

from sg4v_jax.infer.sampling import RowOptions, SamplingOptions, penalize, sample
from sg4v_jax.models.cache import CACHE_AXES, KVCache
from sg4v_jax.models.config import TextConfig
from sg4v_jax.models.sharegpt4v import ShareGPT4V
from sg4v_jax.parallel import rules

# In the place of a token: a slot that has nothing to say.
NOTHING = -1


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
    """

    cache: KVCache
    hidden: Float[Array, "slots d"]
    history: Int[Array, "slots capacity"]
    seen: Bool[Array, "slots vocab"]
    step: Int[Array, " slots"]
    active: Int[Array, " slots"]
    options: RowOptions

    @classmethod
    def empty(
        cls, config: TextConfig, slots: int, capacity: int, dtype: jnp.dtype, kv_dtype: jnp.dtype
    ) -> "State":
        """Slots with nothing in them."""
        zeros = jnp.zeros(slots, jnp.int32)
        return cls(
            cache=KVCache.empty(config, slots, capacity, kv_dtype),
            hidden=jnp.zeros((slots, config.hidden_size), dtype),
            history=jnp.full((slots, capacity), NOTHING, jnp.int32),
            seen=jnp.zeros((slots, config.vocab_size), bool),
            step=zeros,
            active=zeros,
            options=jax.tree.map(jnp.asarray, RowOptions.of([SamplingOptions()] * slots)),
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

    def of_cache(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = CACHE_AXES[: leaf.ndim] if leaf.ndim > 1 else ("batch",)
        return rules.sharding(axes, leaf.shape, mesh)

    cache = jax.tree.map(of_cache, state.cache)
    return dataclasses.replace(jax.tree.map(of_slots, state), cache=cache)


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


def insert(state: State, prefix: Prefix, slots: Int[Array, " rows"]) -> State:
    """Gives prompts to slots. A slot number that doesn't exist leaves its row out."""
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
        active=put(state.active, 1),
        options=jax.tree.map(put, state.options, prefix.options),
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
        scores = penalize(
            logits, state.seen, state.history, state.cache.lengths, state.step, state.options, stop_ids
        )
        token = sample(scores, state.step, state.options)
        found = log_probability(logits, token)
        tokens = tokens.at[i].set(jnp.where(state.active > 0, token, NOTHING))
        return i + 1, advance(model, state, token, stop_ids), tokens, log_probabilities.at[i].set(found)

    slots = state.step.size
    tokens = jnp.full((steps, slots), NOTHING, jnp.int32)
    start = (jnp.int32(0), state, tokens, jnp.zeros((steps, slots)))
    _, state, tokens, log_probabilities = jax.lax.while_loop(more, body, start)
    return state, tokens, log_probabilities


def advance(model: ShareGPT4V, state: State, token: Int[Array, " slots"], stop_ids: tuple[int, ...]) -> State:
    """Runs the chosen tokens, where more are to come."""
    step = state.step + state.active
    ended = jnp.isin(token, jnp.array(stop_ids)) | (step >= state.options.max_new_tokens)
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
        step=step,
        active=active,
    )


def known_logits(model: ShareGPT4V, hidden: Float[Array, "rows d"], vocab: int) -> Float[Array, "rows all"]:
    """Scores, without the rows of the table that the tokenizer has no piece for."""
    logits = model.text.logits(hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)


def log_probability(logits: Float[Array, "*rows vocab"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Of tokens, in nats."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
