"""Stage 2: projector and decoder learn to follow instructions; the vision tower is frozen (spec 4.2)."""

from ml_collections import ConfigDict
from sg4v_jax.configs import common, pods


def get_config(arg: str = "7b") -> ConfigDict:
    """`7b`, `13b` or `tiny`; for a TPU slice `7b,v5e-64` and so on, see `pods`."""
    size, pod = pods.split(arg)
    config = common.base(size)
    config.stage = "finetune"
    common.add_source(config, "sft_mix")
    # All blocks that are computed, so none keeps activations or gradients.
    config.model.vision.tuned_from = config.model.vision.num_layers - 1
    config.optim.groups = (("vision/.*", None), (".*", 1.0))
    if size == "tiny":
        config.data.seq_len = 512
        config.data.image_slots = 3
        config.optim.learning_rate = 1e-3
    return pods.place(config, size, pod)
