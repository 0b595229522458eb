"""Stage 1: projector, decoder and the vision tower from block 12 learn from dense captions (spec 4.1)."""

from ml_collections import ConfigDict
from sg4v_jax.configs import common, pods


def get_config(arg: str = "7b") -> ConfigDict:
    """`7b`, `13b` or `tiny`; for a TPU slice `7b,v5e-64` and so on, see `pods`."""
    size, pod = pods.split(arg)
    config = common.base(size)
    config.stage = "pretrain"
    common.add_source(config, "share_captioner")
    config.data.template = "plain"
    config.data.aspect = "square"
    if size == "tiny":
        config.optim.learning_rate = 5e-4
    else:
        # 576 + 144 words, four times; so a batch has the paper's 256 samples.
        config.data.seq_len = 3072
        # Captions end well below; so two fill half a row, which `pods` makes use of.
        config.data.max_tokens = 1536
        config.data.batch_size = 64
    # Half of the tower's blocks, as in the paper's ablation.
    config.model.vision.tuned_from = config.model.vision.num_layers // 2
    config.optim.groups = (
        (common.BELOW_BLOCKS, None),
        (common.ABOVE_BLOCKS, None),
        (".*", 1.0),
    )
    return pods.place(config, size, pod)
