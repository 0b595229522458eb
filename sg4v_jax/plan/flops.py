"""Model FLOPs of a whole step: what the mathematics takes, whatever a program computes again or pads."""

from ml_collections import ConfigDict

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.flops import model_flops
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.train import groups


def train_flops(config: ConfigDict, model: ModelConfig) -> float:
    """Model FLOPs of one train step of the global batch.

    Attention counts causal pairs inside samples, `image_slots` of equal length in a row. Empty image slots
    and padding count as if they were full.
    """
    rows, length, slots = config.data.batch_size, config.data.seq_len, config.data.image_slots
    shapes = abstract_model(model)[1]
    assigned = groups.assign(shapes, config.optim.groups)
    trained = [path for path, multiplier in assigned.items() if multiplier is not None]
    pairs = rows * length * (length / slots + 1) / 2
    return float(model_flops(model, shapes, trained).of(rows * slots, rows * length, int(pairs)))


def infer_flops(model: ModelConfig, rows: int, positions: int, context: float, images: int) -> float:
    """Model FLOPs of a forward pass with a cache.

    Args:
      model: its shapes.
      rows: prompts or slots.
      positions: new ones in each row; the last one's scores are computed.
      context: positions that each new one sees, on average.
      images: encoded in it.
    """
    pairs = int(rows * positions * context)
    whole = model_flops(model, abstract_model(model)[1], ()).of(images, rows * positions, pairs)
    unscored = rows * (positions - 1)
    return float(whole - 2 * unscored * model.text.hidden_size * model.text.vocab_size)
