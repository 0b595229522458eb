"""The engine's part on the device: parameters, slots, and the programs compiled for them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.infer import state as programs
from sg4v_jax.infer.prepare import Prepared
from sg4v_jax.infer.sampling import RowOptions, SamplingOptions
from sg4v_jax.infer.state import NOTHING, Prefix, State
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.parallel.placement import param_shardings, place


class Device:
    """Parameters and slots on a mesh.

    Attributes:
      slots: how many slots there are.
      rows: prompts that are prefilled together.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype,
        *,
        slots: int,
        capacity: int,
        rows: int,
        steps: int,
        vocab: int,
        stop_ids: tuple[int, ...],
    ):
        self.slots, self.rows = slots, rows
        self._mesh, self._config = mesh, bundle.config
        graphdef, shapes, axes = abstract_model(bundle.config)
        cast = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), bundle.params)
        self._params = place(cast, param_shardings(shapes, axes, mesh))

        def prefill(params: Any, *arrays: Any) -> Prefix:
            return programs.prefill(nnx.merge(graphdef, params), *arrays)

        def decode(params: Any, state: State) -> tuple[State, jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            return programs.decode(model, state, steps=steps, vocab=vocab, stop_ids=stop_ids)

        empty = functools.partial(State.empty, bundle.config.text, slots, capacity, dtype, dtype)
        with jax.set_mesh(mesh):
            places = programs.shardings(jax.eval_shape(empty), mesh)
            self._state = jax.jit(empty, out_shardings=places)()
        self._prefill = jax.jit(prefill)
        self._insert = jax.jit(programs.insert, donate_argnums=0, out_shardings=places)
        self._decode = jax.jit(decode, donate_argnums=1, out_shardings=(places, None, None))

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

    def insert(self, prefix: Prefix, slots: Sequence[int]) -> None:
        """Gives prefilled prompts to slots; a row that stays out has the number `self.slots`."""
        with jax.set_mesh(self._mesh):
            self._state = self._insert(self._state, prefix, np.array(slots, np.int32))

    def decode(self) -> tuple[jax.Array, jax.Array]:
        """Starts the next steps. Returns tokens and log-probabilities, on their way to the host."""
        with jax.set_mesh(self._mesh):
            self._state, tokens, log_probabilities = self._decode(self._params, self._state)
        tokens.copy_to_host_async()
        log_probabilities.copy_to_host_async()
        return tokens, log_probabilities
