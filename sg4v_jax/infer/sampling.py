"""From scores to the next token, each row by its own options."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to generate.

    Attributes:
      max_new_tokens: most tokens generated.
      temperature: 0 is greedy.
      top_p: sample from the smallest set of tokens with this probability; 1 is off.
      top_k: sample from this many best tokens; 0 is off.
      repetition_penalty: divides positive scores of tokens seen before, multiplies negative ones;
        1 is off (Keskar et al. 2019).
      seed: decides what is drawn, whatever else is in the batch.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens > 0,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, valid in checks.items():
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; see SamplingOptions")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOptions:
    """`SamplingOptions` of a batch, as arrays with a leading batch axis."""

    temperature: Float[Array, " batch"]
    top_p: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    repetition_penalty: Float[Array, " batch"]
    seed: UInt[Array, " batch"]

    @classmethod
    def of(cls, rows: list[SamplingOptions]) -> "RowOptions":
        """Stacks the options of several rows."""
        column = lambda name, dtype: jnp.array([getattr(row, name) for row in rows], dtype)  # noqa: E731
        return cls(
            temperature=column("temperature", jnp.float32),
            top_p=column("top_p", jnp.float32),
            top_k=column("top_k", jnp.int32),
            repetition_penalty=column("repetition_penalty", jnp.float32),
            seed=column("seed", jnp.uint32),
        )


def sample(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch vocab"],
    step: Int[Array, " batch"],
    options: RowOptions,
) -> Int[Array, " batch"]:
    """Chooses the next token of each row.

    The order of the filters is that of `transformers`: repetition penalty, temperature, top-k, top-p.

    Args:
      logits: scores.
      seen: tokens of the prompt or generated so far.
      step: tokens generated so far; with the row's seed it determines the draw.
      options: the rows' options.
    """
    penalty = options.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalized, logits)
    greedy = logits.argmax(-1)
    draw = jax.vmap(_draw)(logits, step, options)
    return jnp.where(options.temperature > 0, draw, greedy).astype(jnp.int32)


def _draw(logits: Float[Array, " vocab"], step: Int[Array, ""], options: RowOptions) -> Int[Array, ""]:
    logits = logits / jnp.maximum(options.temperature, 1e-6)
    ranked = jnp.sort(logits, descending=True)
    kept = jnp.where(options.top_k > 0, options.top_k, logits.size)
    logits = jnp.where(logits < ranked[kept - 1], -jnp.inf, logits)
    # A token stays if the probability of the better ones has not reached top_p yet.
    ranked = jnp.where(jnp.arange(logits.size) < kept, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities) - probabilities
    threshold = jnp.where(before < options.top_p, ranked, jnp.inf).min()
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
    key = jax.random.fold_in(jax.random.key(options.seed), step)
    return jax.random.categorical(key, logits)
