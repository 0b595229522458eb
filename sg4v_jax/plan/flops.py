"""Model FLOPs: what the mathematics of a step takes, whatever a program computes again or pads."""

from ml_collections import ConfigDict

from sg4v_jax.models.config import ModelConfig
from sg4v_jax.models.projector import projector_depth
from sg4v_jax.models.sharegpt4v import abstract_model
from sg4v_jax.train import groups


def train_flops(config: ConfigDict, model: ModelConfig) -> float:
    """Model FLOPs of one train step of the global batch.

    A product costs two operations per multiply-add. Forward is counted for all that is computed; the
    gradient of an input for all that lies above a trained parameter, the gradient of a weight for those
    that train. Attention counts causal pairs inside samples, `image_slots` of equal length in a row.
    Empty image slots and padding count as if they were full.
    """
    rows, length, slots = config.data.batch_size, config.data.seq_len, config.data.image_slots
    images = rows * slots
    trained = {
        path: multiplier is not None
        for path, multiplier in groups.assign(abstract_model(model)[1], config.optim.groups).items()
    }
    tower, text = model.vision, model.text
    blocks = tower.num_used_layers - tower.tuned_from
    positions = images * (tower.num_patches + 1)
    tunes_tower = any(use for path, use in trained.items() if path.startswith("vision/"))
    tunes_projector = trained["projector/layer_0/kernel"]
    tunes_text = trained["text/head/kernel"]
    total: float = 2 * images * tower.num_patches * (3 * tower.patch_size**2) * tower.hidden_size
    per_block = 2 * positions * _tower_block(model) + images * _tower_attention(model)
    total += (tower.tuned_from + (3 if tunes_tower else 1) * blocks) * per_block
    # Forward, gradient of the weights if they train, of the input if something below trains.
    features = 2 * images * tower.num_image_tokens * _projector(model)
    total += (1 + tunes_projector + tunes_tower) * features
    through = tunes_projector or tunes_tower or tunes_text
    matrices = 2 * rows * length * (text.num_layers * _text_block(model) + text.hidden_size * text.vocab_size)
    pairs = rows * slots * (length / slots) ** 2 / 2
    total += (1 + through + tunes_text) * matrices + (3 if through else 1) * _text_attention(model, pairs)
    return float(total)


def infer_flops(model: ModelConfig, rows: int, positions: int, context: float, images: int) -> float:
    """Model FLOPs of a forward pass with a cache.

    Args:
      model: its shapes.
      rows: prompts or slots.
      positions: new ones in each row.
      context: positions that each new one sees, on average.
      images: encoded in it.
    """
    tower, text = model.vision, model.text
    tokens = images * (tower.num_patches + 1)
    total: float = tower.num_used_layers * (
        2 * tokens * _tower_block(model) + images * _tower_attention(model)
    )
    total += 2 * images * tower.num_image_tokens * _projector(model)
    total += 2 * rows * positions * text.num_layers * _text_block(model)
    total += _text_attention(model, rows * positions * context)
    return float(total + 2 * rows * text.hidden_size * text.vocab_size)


def _tower_block(model: ModelConfig) -> int:
    tower = model.vision
    return 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size


def _text_block(model: ModelConfig) -> int:
    text = model.text
    heads = 2 * text.num_heads + 2 * text.num_kv_heads
    return text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)


def _projector(model: ModelConfig) -> int:
    into, out = model.vision.hidden_size, model.text.hidden_size
    return into * out + (projector_depth(model.projector) - 1) * out**2


def _tower_attention(model: ModelConfig) -> int:
    """Of one image in one block."""
    return 4 * (model.vision.num_patches + 1) ** 2 * model.vision.hidden_size


def _text_attention(model: ModelConfig, pairs: float) -> float:
    """Of so many pairs of query and key, in all blocks."""
    return 4 * pairs * model.text.num_layers * model.text.num_heads * model.text.head_dim
