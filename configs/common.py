"""What all stages share: model sizes, and the fields every config has.

`arg` of a config file (`configs/pretrain.py:13b`) picks what fans out into several fields, the size.
Everything else is a plain field, overridden by `--config.section.field=value`.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

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

# What LLaVA's instructions ask for when they want an image described (spec 1.6: the detail_23k part).
CAPTION_QUESTION = (
    r"(?i)\b(describe|descripti(on|ve)|depiction|portray|narrate|characterize|rundown|clarify|break down|"
    r"walk through|explain the various aspects|explanation of the image|in (a )?(detail|comprehensive)|"
    r"thorough analysis|share its details)"
)

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
    # Four samples a row fill it to 98 % (benchmarks/packing.py; docs/input.md says how to choose).
    config.data.seq_len = 3584
    config.data.image_slots = 4
    # The longest sample and what happens to longer ones: `cut` counts after images are expanded,
    # `cut_text` before, as the original does, `drop` leaves them out.
    config.data.max_tokens = _optional(int, 2048)
    config.data.too_long = "cut"
    config.data.batch_size = 32  # rows
    config.data.packing = True
    config.data.packing_window = 128
    config.data.num_threads = 16
    config.data.num_workers = 0
    # Seconds without a record after which worker processes are taken for stuck, and started again.
    config.data.worker_timeout = 600.0
    config.data.prefetch = 2
    # `share` of the caption records of `source` are replaced by those of `directory` with the same image.
    config.data.replace = ConfigDict(
        {"source": "", "directory": config_dict.placeholder(str), "share": 0.0, "question": CAPTION_QUESTION}
    )

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
    # Pieces of the vocabulary whose scores, and whose part of the head, are on a chip at a time.
    config.train.loss_chunk = 6400
    # For the TPU compiler, `name=value,name=value`, besides those of `parallel/compiler.py`; `name=` takes
    # away one of these.
    config.train.compiler_options = ""
    config.train.log_every = 10
    # A step whose loss or gradients are NaN or infinite changes nothing. `skip` goes on to the next, unless
    # so many come in a row; `stop` ends the run. Then the batch is in WORKDIR/nonfinite.
    config.train.nonfinite = "skip"
    config.train.nonfinite_in_a_row = 10

    # Every so many steps (0: never) and after the last, the loss on records of another dataset, which is as
    # in `data.sources`: the first `num_records` in an order of its own (0: all).
    config.validation = ConfigDict({"every": 0, "directory": "", "num_records": 512})
    for field in ("template", "prompt", "aspect"):
        config.validation[field] = config_dict.placeholder(str)

    # `metrics.jsonl` is always written. Peak FLOP/s of a device are for MFU; 0 looks them up.
    config.metrics = ConfigDict({"tensorboard": False, "wandb_project": "", "peak_flops": 0.0})
    config.profile = ConfigDict({"first_step": 0, "num_steps": 0})  # a trace of no steps
    # The newest `keep` are kept, and for good those of steps that divide by `keep_every` (0: none). A save
    # that would have to wait `max_wait` seconds for the one before it is left out.
    config.checkpoint = ConfigDict({"every": 500, "keep": 2, "keep_every": 0, "max_wait": 60.0})
    # slices=-1: as many TPU slices as there are (docs/pod.md).
    config.mesh = ConfigDict({"slices": -1, "data": 1, "fsdp": -1, "tensor": 1})
    if size == "tiny":
        _shrink(config)
    return config


def add_source(config: ConfigDict, name: str, weight: float = 0.0, epochs: float = 0.0) -> None:
    """Adds a dataset to the mixture: each record once per epoch, or by weight, or `epochs` times.

    Template, prompt and aspect are those of `config.data` unless set for the source.
    """
    source = ConfigDict({"directory": config_dict.placeholder(str), "weight": weight, "epochs": epochs})
    for field in ("template", "prompt", "aspect"):
        source[field] = config_dict.placeholder(str)
    config.data.sources[name] = source


def _optional(kind: type, value: object) -> object:
    """A field that has a value and may also be None."""
    return FieldReference(value, field_type=kind)


def _shrink(config: ConfigDict) -> None:
    """What a model of a million parameters, trained from scratch on a CPU, wants instead."""
    # Four captioned images a row.
    config.data.seq_len = 256
    config.data.max_tokens = None
    config.data.image_slots = 4
    config.data.batch_size = 4
    config.data.packing_window = 32
    config.data.num_threads = 2
    config.optim.learning_rate = 2e-3
    config.optim.warmup_ratio = 0.05
    config.optim.b2 = 0.99
    config.optim.clip_norm = 1.0
    config.train.compute_dtype = "float32"
    config.train.remat = "none"
    config.checkpoint.every = 1000
