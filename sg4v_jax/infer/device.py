"""The engine's part on the device: parameters, slots, and the programs compiled for them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.infer import state as programs
from sg4v_jax.infer.memory import MemoryPlan, bytes_per_device, device_limit
from sg4v_jax.infer.prepare import Prepared
from sg4v_jax.infer.quantize import abstract_quantized, quantize_params
from sg4v_jax.infer.request import ScoreRequest
from sg4v_jax.infer.sampling import RowOptions, SamplingOptions
from sg4v_jax.infer.state import NOTHING, Prefix, State
from sg4v_jax.models.cache import KVCache
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.placement import param_shardings, place


class Device:
    """Parameters and slots on a mesh.

    Attributes:
      groups: how many groups of slots there are: of one slot each, without beams.
      rows: prompts that are prefilled together.
      memory: what all this takes.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype,
        *,
        weights: str,
        kv: str,
        memory_limit: int | None,
        groups: int,
        num_beams: int,
        capacity: int,
        rows: int,
        steps: int,
        vocab: int,
        stop_ids: tuple[int, ...],
    ):
        self.groups, self.rows = groups, rows
        self._mesh, self._config = mesh, bundle.config
        # A scale is float32 in any case, and an int8 kernel int8.
        cast = lambda leaf: np.asarray(leaf).astype(dtype)  # noqa: E731
        if weights == "int8":
            graphdef, shapes, axes = abstract_quantized(bundle.config)
            params = quantize_params(bundle.config, bundle.params, cast)
        else:
            graphdef, shapes, axes = abstract_model(bundle.config)
            params = jax.tree.map(cast, bundle.params)

        def prefill(params: Any, *arrays: Any) -> Prefix:
            return programs.prefill(nnx.merge(graphdef, params), *arrays)

        def decode(params: Any, state: State) -> tuple[State, jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            return programs.decode(model, state, steps=steps, vocab=vocab, stop_ids=stop_ids)

        def score(params: Any, prefix: Prefix, choices: jax.Array) -> jax.Array:
            return programs.score(nnx.merge(graphdef, params), prefix, choices, vocab=vocab)

        kv_dtype = jnp.dtype("int8") if kv == "int8" else dtype
        empty = functools.partial(
            State.empty, bundle.config.text, groups * num_beams, capacity, num_beams, dtype, kv_dtype
        )
        waiting = functools.partial(KVCache.empty, bundle.config.text, rows, capacity, dtype)
        with jax.set_mesh(mesh):
            state, prefix = jax.eval_shape(empty), jax.eval_shape(waiting)
            places, params_places = programs.shardings(state, mesh), param_shardings(shapes, axes, mesh)
            self.memory = MemoryPlan(
                parameters=bytes_per_device(params, params_places),
                slots=bytes_per_device(state, places) * (2 if num_beams > 1 else 1),
                prefill=bytes_per_device(prefix, programs.cache_shardings(prefix, mesh)),
                limit=device_limit(mesh) if memory_limit is None else memory_limit,
            )
            self.memory.check(groups * num_beams, capacity)
            # Decoding says how parameters are to lie in memory: it would bring half of them into another
            # order whenever it is called, as much to read and write as a step takes.
            layouts = jax.tree.map(lambda place: Format(Layout.AUTO, place), params_places)
            program = jax.jit(
                decode, donate_argnums=1, in_shardings=(layouts, places), out_shardings=(places, None, None)
            )
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
            self._decode = program.lower(abstract, state).compile()
            layouts = self._decode.input_formats[0][0]
            self._params = jax.tree.map(jax.device_put, place(params, params_places), layouts)
            self._state = jax.jit(empty, out_shardings=places)()
        self._prefill, self._score = jax.jit(prefill), jax.jit(score)
        self._best_beam = jax.jit(programs.best_beam)
        self._insert = jax.jit(programs.insert, donate_argnums=0, out_shardings=places)

    def prefill(self, batch: Sequence[Prepared]) -> Prefix:
        """Starts prefilling at most `rows` prompts of one bucket. The program has all rows in any case."""
        bucket = batch[0].bucket
        tokens = np.full((self.rows, bucket.length), NOTHING, np.int32)
        image_index = np.full((self.rows, bucket.length), -1, np.int32)
        # A row without a prompt has one position, so that there is a last one.
        lengths = np.ones(self.rows, np.int32)
        size = self._config.vision.image_size
        pixels = np.zeros((self.rows, bucket.images, size, size, 3), np.uint8)
        options = [SamplingOptions()] * self.rows
        for i, prepared in enumerate(batch):
            length = lengths[i] = len(prepared.tokens)
            tokens[i, :length] = prepared.tokens
            is_image = prepared.tokens < 0
            image_index[i, :length] = np.where(is_image, np.cumsum(is_image) - 1, -1)
            pixels[i, : len(prepared.pixels)] = prepared.pixels
            options[i] = getattr(prepared.request, "options", options[i])
        images = pixels if bucket.images else None
        arrays = (tokens, lengths, image_index, images, RowOptions.of(options))
        with jax.set_mesh(self._mesh):
            return self._prefill(self._params, *arrays)

    def insert(self, prefix: Prefix, groups: Sequence[int]) -> None:
        """Gives prefilled prompts to groups; a row that stays out has the number `self.groups`."""
        with jax.set_mesh(self._mesh):
            self._state = self._insert(self._state, prefix, np.array(groups, np.int32))

    def decode(self) -> tuple[jax.Array, jax.Array]:
        """Starts the next steps. Returns tokens and log-probabilities, on their way to the host."""
        with jax.set_mesh(self._mesh):
            self._state, tokens, log_probabilities = self._decode(self._params, self._state)
        tokens.copy_to_host_async()
        log_probabilities.copy_to_host_async()
        return tokens, log_probabilities

    def best_beam(self, group: int) -> tuple[list[int], float]:
        """What a search has found, with its score. Waits for the device."""
        with jax.set_mesh(self._mesh):
            tokens, length, score = jax.device_get(self._best_beam(self._state, np.int32(group)))
        return tokens[:length].tolist(), float(score)

    def score(self, batch: Sequence[Prepared[ScoreRequest]]) -> jax.Array:
        """Starts scoring at most `rows` requests of one bucket. Returns log-probabilities [rows, choices]."""
        bucket = batch[0].bucket
        choices = np.full((self.rows, bucket.choices, bucket.choice_length), NOTHING, np.int32)
        for row, prepared in enumerate(batch):
            for number, tokens in enumerate(prepared.choices):
                choices[row, number, : len(tokens)] = tokens
        prefix = self.prefill(batch)
        with jax.set_mesh(self._mesh):
            scores: jax.Array = self._score(self._params, prefix, choices)
        scores.copy_to_host_async()
        return scores
