"""What all stages share: model sizes, and the fields every config has.

`arg` of a config file (`configs/pretrain.py:13b`) picks what fans out into several fields, the size.
Everything else is a plain field, overridden by `--config.section.field=value`.
"""

from ml_collections import ConfigDict, config_dict

# CLIP ViT-L/14-336, Vicuna-7B/13B-v1.5; `tiny` learns the embedded world on two CPU cores.
VISION = {
    "7b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_layers": 24,
        "num_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_layers": 4,
        "num_heads": 4,
        "image_size": 48,
        "patch_size": 12,
    },
}
VISION["13b"] = VISION["7b"]

TEXT = {
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
    },
    "13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_layers": 40,
        "num_heads": 40,
        "num_kv_heads": 40,
    },
    "tiny": {
        "vocab_size": 640,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
    },
}

SIZES = tuple(TEXT)

# The tower's parts below block k, and those above the selected layer, which are never computed.
BELOW_BLOCKS = "vision/(frozen|patch_embedding|class_embedding|position_embedding|pre_norm)(/.*)?"
ABOVE_BLOCKS = "vision/(unused|post_norm)/.*"


def base(size: str) -> ConfigDict:
    """The fields of every config, with the values that all recipes of the original share (spec 4)."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {SIZES}; use e.g. configs/pretrain.py:7b")
    config = ConfigDict()
    config.stage = config_dict.placeholder(str)
    config.seed = 42

    config.model = ConfigDict()
    config.model.vision = ConfigDict(VISION[size])
    config.model.vision.tuned_from = 0
    config.model.text = ConfigDict(TEXT[size])
    config.model.projector = "mlp2x_gelu"

    # Where the weights come from: a directory in any format that `sg4v convert` reads, for each
    # part; empty means random.
    config.init = ConfigDict({"vision": "", "projector": "", "text": ""})

    config.data = ConfigDict()
    config.data.sources = ConfigDict()
    config.data.tokenizer = config_dict.placeholder(str)
    config.data.template = "v1"
    config.data.prompt = ""
    config.data.aspect = "pad"
    # Counted after image expansion; the original cuts the text at 2048 before it.
    config.data.seq_len = 2048
    config.data.image_slots = 3
    config.data.batch_size = 128
    config.data.packing = True
    config.data.packing_bins = 64
    config.data.num_threads = 16

    config.optim = ConfigDict()
    config.optim.learning_rate = 2e-5
    config.optim.warmup_ratio = 0.03
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    # Off, as in effect in the original: its DeepSpeed files set no clipping.
    config.optim.clip_norm = 0.0
    # (regex over the whole parameter path, learning-rate multiplier or None = frozen); the first
    # match counts and every parameter must have one.
    config.optim.groups = ((".*", 1.0),)

    config.train = ConfigDict()
    config.train.num_steps = config_dict.placeholder(int)  # overrides num_epochs
    config.train.num_epochs = 1.0
    config.train.accumulate = 1
    config.train.loss_reduction = "token"
    config.train.compute_dtype = "bfloat16"
    config.train.remat = "full"
    config.train.loss_chunk = 512
    config.train.log_every = 10

    config.checkpoint = ConfigDict({"every": 500, "keep": 2})
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    if size == "tiny":
        _shrink(config)
    return config


def add_source(config: ConfigDict, name: str, weight: float = 0.0) -> None:
    """Adds a dataset to the mixture; weight 0 means its number of records."""
    source = ConfigDict({"directory": config_dict.placeholder(str), "weight": weight})
    config.data.sources[name] = source


def _shrink(config: ConfigDict) -> None:
    """What a model of a million parameters, trained from scratch on a CPU, wants instead."""
    # Four captioned images a row.
    config.data.seq_len = 256
    config.data.image_slots = 4
    config.data.batch_size = 4
    config.data.packing_bins = 16
    config.data.num_threads = 2
    config.optim.learning_rate = 2e-3
    config.optim.warmup_ratio = 0.05
    config.optim.b2 = 0.99
    config.optim.clip_norm = 1.0
    config.train.compute_dtype = "float32"
    config.train.remat = "none"
    config.train.loss_chunk = 512
    config.checkpoint.every = 1000
    config.checkpoint.keep = 1
