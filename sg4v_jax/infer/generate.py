"""Batched generation with a KV cache: prompts with images in, text out.

Prompts of different lengths are padded on the right; a row never sees its padding, so that a batch
gives each row what it would get alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.data.conversation import encode_prompt, get_template, place_images, stop_string
from sg4v_jax.data.image import load_image, preprocess
from sg4v_jax.data.records import Turn
from sg4v_jax.data.sample import expand_images
from sg4v_jax.data.tokenizer import Tokenizer
from sg4v_jax.infer.sampling import RowOptions, SamplingOptions, sample
from sg4v_jax.models.llama import KVCache
from sg4v_jax.models.sharegpt4v import ShareGPT4V, abstract_model
from sg4v_jax.parallel.placement import param_shardings, place

# Prompt lengths are padded up to a multiple, so that few shapes are compiled.
PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to answer.

    Attributes:
      turns: the conversation, ending with a human turn; `<image>` marks where images go.
      images: encoded image files, one for each `<image>`.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: the answer, without stop string or special tokens, stripped.
      tokens: the generated ids.
      finished: False if `max_new_tokens` cut it off.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch in the midst of decoding.

    Attributes:
      cache: what the rows have seen.
      token: int32[batch], the last token chosen, not yet in the cache.
      step: int32[batch], tokens chosen so far.
      done: bool[batch], rows that chose the end token.
      seen: bool[batch, vocab], for the repetition penalty.
    """

    cache: KVCache
    token: Int[Array, " batch"]
    step: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"]


class Generator:
    """A model ready to answer.

    Attributes:
      bundle: the model.
      tokenizer: its tokenizer.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype | str = "bfloat16",
        chunk: int = 16,
    ):
        """Places the parameters on `mesh`.

        Args:
          bundle: see `convert.load.load_model`.
          mesh: where to run.
          dtype: what to compute in.
          chunk: tokens decoded between looks at stop strings.

        Raises:
          ValueError: if the bundle has no tokenizer.
        """
        if bundle.tokenizer_file is None:
            raise ValueError("the model directory holds no tokenizer.model; put the model's own there")
        self.bundle, self.tokenizer = bundle, Tokenizer(bundle.tokenizer_file)
        self._template = get_template(bundle.template)
        self._mesh, self._chunk = mesh, chunk
        self._graphdef, shapes, axes = abstract_model(bundle.config)
        cast = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), bundle.params)
        self._params = place(cast, param_shardings(shapes, axes, mesh))
        self._prefill = jax.jit(self._prefill_fn, static_argnames=("capacity",))
        self._decode = jax.jit(self._decode_fn, donate_argnums=(1,))

    def generate(
        self, prompts: Sequence[Prompt], options: SamplingOptions | Sequence[SamplingOptions]
    ) -> list[Completion]:
        """Answers a batch of prompts.

        Args:
          prompts: any lengths, any numbers of images.
          options: one for all, or one for each.

        Raises:
          ValueError: if a prompt and its answer don't fit the model's positions.
          ImageError: if an image can't be read.
        """
        rows = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
        produced: list[list[int]] = [[] for _ in prompts]
        for new in self._chunks(prompts, rows):
            for row, tokens in zip(produced, new, strict=True):
                row.extend(tokens)
        return [
            self._complete(tokens, row.max_new_tokens) for tokens, row in zip(produced, rows, strict=True)
        ]

    def stream(self, prompt: Prompt, options: SamplingOptions) -> Iterator[str]:
        """Yields the answer to one prompt piece by piece, as it is decoded."""
        tokens: list[int] = []
        text = shown = ""
        for (new,) in self._chunks([prompt], [options]):
            tokens.extend(new)
            text = self._complete(tokens, options.max_new_tokens).text
            # A character can be spread over several tokens: wait for all of it.
            if text.startswith(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        if text != shown:  # It ends in the middle of a character: nothing more will come.
            yield text[len(shown) :]

    def _chunks(self, prompts: Sequence[Prompt], rows: list[SamplingOptions]) -> Iterator[list[list[int]]]:
        """New tokens of each row, a few at a time, until all rows have stopped."""
        if not prompts:
            return
        longest = max(row.max_new_tokens for row in rows)
        tokens, lengths, image_index, images = self._encode(prompts, longest)
        options = RowOptions.of(rows)
        capacity = tokens.shape[1] + longest
        stop = self._stop_ids()
        with jax.set_mesh(self._mesh):
            state = self._prefill(
                self._params, tokens, lengths, image_index, images, options, capacity=capacity
            )
            first = np.asarray(state.token)
            counts = [0] * len(rows)
            new = [[int(token)] for token in first]
            stopped = [False] * len(rows)
            while True:
                for i, row in enumerate(rows):
                    new[i] = [] if stopped[i] else new[i][: row.max_new_tokens - counts[i]]
                    counts[i] += len(new[i])
                    end = next((j for j, token in enumerate(new[i]) if token in stop), None)
                    if end is not None:
                        new[i] = new[i][: end + 1]
                    stopped[i] = stopped[i] or end is not None or counts[i] >= row.max_new_tokens
                yield new
                if all(stopped):
                    return
                state = dataclasses.replace(state, done=jnp.asarray(stopped))
                steps = min(self._chunk, longest - max(counts))
                state, chunk = self._decode(self._params, state, options, jnp.int32(steps))
                new = [list(map(int, row[:steps])) for row in np.asarray(chunk)]

    def _encode(
        self, prompts: Sequence[Prompt], new_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Padded arrays: tokens, lengths, image_index, images (None if no prompt has one)."""
        config = self.bundle.config
        encoded = []
        for prompt in prompts:
            has_images = bool(prompt.images)
            turns = place_images(prompt.turns) if has_images else prompt.turns
            ids = encode_prompt(self._template, turns, self.tokenizer, has_images=has_images)
            encoded.append(expand_images(ids, None, config.vision.num_image_tokens))
        lengths = np.array([len(tokens) for tokens, _, _ in encoded], np.int32)
        if lengths.max() + new_tokens > config.text.max_positions:
            raise ValueError(
                f"a prompt of {lengths.max()} tokens and {new_tokens} new ones exceed the model's "
                f"{config.text.max_positions} positions; shorten it or lower max_new_tokens"
            )
        length = -(-int(lengths.max()) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        tokens = np.zeros((len(prompts), length), np.int32)
        image_index = np.full((len(prompts), length), -1, np.int32)
        for i, (row, _, is_image) in enumerate(encoded):
            tokens[i, : len(row)] = row
            image_index[i, : len(row)] = np.where(is_image, np.cumsum(is_image) - 1, -1)
        return tokens, lengths, image_index, self._pixels(prompts)

    def _pixels(self, prompts: Sequence[Prompt]) -> np.ndarray | None:
        slots = max(len(prompt.images) for prompt in prompts)
        if not slots:
            return None
        size = self.bundle.config.vision.image_size
        pixels = np.zeros((len(prompts), slots, size, size, 3), np.uint8)
        for i, prompt in enumerate(prompts):
            for j, data in enumerate(prompt.images):
                image = load_image(data, name=f"image {j} of prompt {i}")
                pixels[i, j] = preprocess(image, size=size, aspect=self.bundle.aspect)
        return pixels

    def _stop_ids(self) -> set[int]:
        """Tokens that end an answer: </s>, and the newline that ends a plain caption."""
        stop = {self.tokenizer.eos_id}
        if stop_string(self._template) == "\n":
            stop.add(self.tokenizer.encode("\n")[-1])
        return stop

    def _complete(self, tokens: list[int], limit: int) -> Completion:
        finished = bool(tokens) and tokens[-1] in self._stop_ids()
        text = self.tokenizer.decode(tokens[:-1] if finished else tokens)
        return Completion(text=text.strip(), tokens=tuple(tokens), finished=finished or len(tokens) < limit)

    def _choose(self, model: ShareGPT4V, hidden: Array, state: State, options: RowOptions) -> State:
        """The next token of every row, from the hidden state at its last position."""
        logits = model.text.logits(hidden)
        # Rows of the table that the tokenizer has no piece for must never come out.
        known = jnp.arange(logits.shape[-1]) < self.tokenizer.vocab_size
        token = sample(jnp.where(known, logits, -jnp.inf), state.seen, state.step, options)
        token = jnp.where(state.done, self.tokenizer.eos_id, token)
        return dataclasses.replace(
            state,
            token=token,
            step=state.step + 1,
            done=state.done | (token == self.tokenizer.eos_id),
            seen=state.seen.at[jnp.arange(token.size), token].set(True),
        )

    def _prefill_fn(self, params, tokens, lengths, image_index, images, options, *, capacity):  # type: ignore[no-untyped-def]
        model = nnx.merge(self._graphdef, params)
        batch, length = tokens.shape
        features = None if images is None else model.encode_images(images)
        x = model.embed(tokens, image_index, features)
        cache = KVCache.empty(self.bundle.config.text, batch, capacity, x.dtype)
        hidden, cache = model.text.prefill(x, lengths, cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        in_prompt = (jnp.arange(length) < lengths[:, None]) & (image_index < 0)
        seen = jnp.zeros((batch, self.bundle.config.text.vocab_size), bool)
        seen = seen.at[jnp.arange(batch)[:, None], tokens].max(in_prompt)
        zeros = jnp.zeros(batch, jnp.int32)
        state = State(cache=cache, token=zeros, step=zeros, done=zeros > 0, seen=seen)
        return self._choose(model, last, state, options)

    def _decode_fn(self, params, state, options, steps):  # type: ignore[no-untyped-def]
        model = nnx.merge(self._graphdef, params)

        def more(carry):  # type: ignore[no-untyped-def]
            i, state, _ = carry
            return (i < steps) & ~state.done.all()

        def body(carry):  # type: ignore[no-untyped-def]
            i, state, chunk = carry
            hidden, cache = model.text.decode(model.text.embed(state.token[:, None]), state.cache)
            state = self._choose(model, hidden[:, 0], dataclasses.replace(state, cache=cache), options)
            return i + 1, state, chunk.at[:, i].set(state.token)

        chunk = jnp.full((state.token.size, self._chunk), self.tokenizer.eos_id, jnp.int32)
        _, state, chunk = jax.lax.while_loop(more, body, (jnp.int32(0), state, chunk))
        return state, chunk
