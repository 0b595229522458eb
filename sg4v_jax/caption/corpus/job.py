"""What a captioning job is: its settings, and the file that keeps a restart with other ones out."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sg4v_jax.caption.corpus.claims import WORK, new_file, put_new
from sg4v_jax.caption.corpus.guards import Guards
from sg4v_jax.caption.corpus.inputs import MAX_IMAGE_BYTES, Corpus
from sg4v_jax.convert.bundle import ModelBundle
from sg4v_jax.data.defects import allowed_bad
from sg4v_jax.infer.options import SamplingOptions

JOB = "job.json"
# What the original's captioner was trained and asked with (spec 2.2); also in configs/captioner.py.
DEFAULT_PROMPT = "Analyze the image in a comprehensive and detailed manner."
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to caption.

    Attributes:
      options: how to generate. Each image's own seed follows from `options.seed` and its number.
      prompt: what to ask; "" is what the captioner was trained with.
      shard_size: images in a shard.
      guards: which captions are flagged, and what to do about them.
      max_image_bytes: larger files are bad images.
      max_failed: images that may fail, a number or a percentage of the corpus; more stop the run.
      drop_flagged: leaves flagged captions out of what is trained on.
      parquet: also writes all lines as one Parquet file.
      retry_failed: tries images again that failed in earlier runs.
      retry_changed: captions images again whose bytes are others than in earlier runs; reads them all.
      lease_seconds: silence after which other machines take this process for dead.
      read_ahead: images read before the engine asks for them.
    """

    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    prompt: str = ""
    shard_size: int = 512
    guards: Guards = dataclasses.field(default_factory=Guards)
    max_image_bytes: int = MAX_IMAGE_BYTES
    max_failed: str = "5%"
    drop_flagged: bool = False
    parquet: bool = False
    retry_failed: bool = False
    retry_changed: bool = False
    lease_seconds: float = 120.0
    read_ahead: int = 32

    def __post_init__(self) -> None:
        allowed_bad(self.max_failed, 0)
        for name in ("shard_size", "max_image_bytes", "read_ahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if self.lease_seconds < 0:
            raise ValueError(f"lease_seconds={self.lease_seconds}: can't be negative")


def prompt_for(settings: Settings, trained: str) -> tuple[str, str]:
    """(the prompt, where it is from and what that means)."""
    if not settings.prompt:
        if trained:
            return trained, "the one the captioner was trained with"
        return DEFAULT_PROMPT, "the default; the model records none that it was trained with"
    if settings.prompt == trained or not trained:
        return settings.prompt, "as given" + ("; the captioner was trained with it" if trained else "")
    return settings.prompt, f"as given; NOT the one the captioner was trained with, {trained!r}"


def describe(corpus: Corpus, settings: Settings, prompt: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the captions, as the job's file has it."""
    return {
        "format": _FORMAT,
        "images": len(corpus),
        "corpus": corpus.sha256,
        "shard_size": settings.shard_size,
        "max_image_bytes": settings.max_image_bytes,
        "prompt": prompt,
        "options": dataclasses.asdict(settings.options),
        "guards": settings.guards.deciding(),
        "model": dict(model),
    }


def begin(output: str | os.PathLike[str], job: Mapping[str, Any]) -> pathlib.Path:
    """Makes a job's directory, or makes sure that the one there is of the same job.

    Raises:
      ValueError: it is of another job; the message names what differs.
    """
    if "://" in os.fspath(output):
        raise ValueError(
            f"{os.fspath(output)}: captions are written to a file system that all processes share; mount one"
        )
    directory = pathlib.Path(output)
    (directory / WORK).mkdir(parents=True, exist_ok=True)
    file = directory / JOB
    text = json.dumps(job, ensure_ascii=False, indent=1)
    if not file.exists():
        with new_file(directory) as new:
            new.write(text + "\n")
        put_new(new.name, file)
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); use another output directory") from error
    # As JSON has it: no tuples.
    differing = list(_differences(found, json.loads(text)))
    if differing:
        raise ValueError(
            f"{directory} was begun with other settings: {'; '.join(differing)}. Give the same to go on, "
            "or another output directory"
        )
    return directory


def describe_model(bundle: ModelBundle, **computed: object) -> dict[str, object]:
    """What tells a captioner from others, whatever files it came from.

    Args:
      bundle: the model.
      computed: how it computes, such as `dtype`.
    """
    return {
        "sha256": _params_sha256(bundle.params),
        "tokenizer": hashlib.sha256(bundle.tokenizer_file.read_bytes()).hexdigest()
        if bundle.tokenizer_file
        else "",
        "template": bundle.template,
        "aspect": bundle.aspect,
        "computed": computed,
    }


def _params_sha256(params: Any) -> str:
    def digest(item: tuple[str, Any]) -> bytes:
        path, leaf = item
        array = np.ascontiguousarray(leaf)
        own = hashlib.sha256(f"{path} {array.dtype} {array.shape} ".encode())
        own.update(array.reshape(-1).view(np.uint8).data)
        return own.digest()

    whole = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for part in pool.map(digest, sorted(_leaves(params, ""), key=lambda item: item[0])):
            whole.update(part)
    return whole.hexdigest()


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{path}{key}.")
        elif was != now:
            yield f"{path}{key} was {_short(was)}, now {_short(now)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
