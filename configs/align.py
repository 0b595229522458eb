"""Stage 0: the projector learns from brief captions, so that stage 1 starts from it (spec 4.1, 4.4).

ShareGPT4V starts from LLaVA-1.5's projector, which was made this way. `tiny` has no pre-trained
tower or decoder to align, so there everything learns.
"""

from ml_collections import ConfigDict
from sg4v_jax.configs import common, pods


def get_config(arg: str = "7b") -> ConfigDict:
    """`7b`, `13b` or `tiny`; for a TPU slice `7b,v5e-64` and so on, see `pods`."""
    size, pod = pods.split(arg)
    config = common.base(size)
    config.stage = "align"
    common.add_source(config, "brief_captions")
    config.data.template = "plain"
    config.data.aspect = "square"
    if size == "tiny":
        config.optim.groups = ((common.ABOVE_BLOCKS, None), (".*", 1.0))
    else:
        # Brief captions: four samples of 593 tokens.
        config.data.seq_len = 2432
        config.data.max_tokens = 1216
        config.data.batch_size = 64
        config.optim.learning_rate = 1e-3
        config.model.vision.tuned_from = config.model.vision.num_layers - 1
        config.optim.groups = (("projector/.*", 1.0), (".*", None))
    return pods.place(config, size, pod)
