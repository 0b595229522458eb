"""The Share-Captioner: the whole model learns dense captions from one fixed prompt (spec 2).

The original's captioner is an InternLM-XComposer; its training code was never released. This is the
same job on this architecture, starting from a pre-trained model.
"""

from ml_collections import ConfigDict
from sg4v_jax.configs import common, pods

PROMPT = "Analyze the image in a comprehensive and detailed manner."


def get_config(arg: str = "7b") -> ConfigDict:
    """`7b`, `13b` or `tiny`; for a TPU slice `7b,v5e-64` and so on, see `pods`."""
    size, pod = pods.split(arg)
    config = common.base(size)
    config.stage = "captioner"
    common.add_source(config, "cap_dense")
    config.data.prompt = PROMPT
    if size == "tiny":
        # From scratch, so the embeddings below the blocks learn as well.
        config.optim.groups = ((common.ABOVE_BLOCKS, None), (".*", 1.0))
        # Without system text and prompt, which would be half of every sample.
        config.data.template = "plain"
        config.data.prompt = ""
    else:
        config.data.seq_len = 3456
        config.data.max_tokens = 1728
        config.model.vision.tuned_from = 12
        config.optim.groups = ((common.BELOW_BLOCKS, None), (common.ABOVE_BLOCKS, None), (".*", 1.0))
    return pods.place(config, size, pod)
