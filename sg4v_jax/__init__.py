"""ShareGPT4V on JAX: caption, train, chat, evaluate and convert."""

from sg4v_jax.version import __version__

__all__ = ["__version__"]
