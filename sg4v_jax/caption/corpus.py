"""Captions a corpus of images: restartable, and one bad image costs one image.

Results are appended to `captions.jsonl` as they come, keyed by path; a second run goes on where the
first stopped. At the end they become a LLaVA-format JSON that `sg4v data build` takes.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sg4v_jax.data.folder import find_images
from sg4v_jax.data.image import ImageError, load_image
from sg4v_jax.data.records import IMAGE_PLACEHOLDER, RecordError, Turn, resolve_image
from sg4v_jax.infer.generate import Generator, Prompt
from sg4v_jax.infer.sampling import SamplingOptions

RESULTS, ERRORS, RECORDS = "captions.jsonl", "errors.jsonl", "captions.json"
DEFAULT_PROMPT = "Analyze the image in a comprehensive and detailed manner."


@dataclasses.dataclass(frozen=True)
class CaptionReport:
    """What a run did.

    Attributes:
      captioned: images with a caption, those of earlier runs included.
      failed: images that could not be read.
      cut_off: captions that reached `max_new_tokens`.
      records: the LLaVA-format JSON.
    """

    captioned: int
    failed: int
    cut_off: int
    records: pathlib.Path


def list_images(
    source: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None
) -> list[str]:
    """Paths to caption, relative to the image root.

    Args:
      source: a JSON list of paths (the original tool's input), or a folder to search.
      image_root: what the paths of a JSON list are relative to; its own folder by default.

    Raises:
      ValueError: if a JSON file holds anything but a list of strings.
    """
    source = pathlib.Path(source)
    if source.is_dir():
        return find_images(source)
    paths = json.loads(source.read_text())
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{source}: expected a JSON list of image paths")
    return paths


def caption_corpus(
    generator: Generator,
    images: Sequence[str],
    image_root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: SamplingOptions,
    batch_size: int,
    prompt: str = "",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> CaptionReport:
    """Captions `images` and writes the results below `output`.

    Args:
      generator: the captioner.
      images: paths relative to `image_root`.
      image_root: where they are; paths that leave it are errors.
      output: directory of the results; what is there already is not done again.
      options: how to generate. Each image's own seed follows from `options.seed` and its index.
      batch_size: images at a time.
      prompt: what to ask; the prompt that the captioner was trained with, by default.
      progress: wraps the iteration over batches.

    Returns:
      What was done.
    """
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    prompt = prompt or generator.bundle.prompt or DEFAULT_PROMPT
    turns = (Turn("human", f"{IMAGE_PLACEHOLDER}\n{prompt}"),)
    done = _finished(output / RESULTS) | _finished(output / ERRORS)
    todo = [(index, path) for index, path in enumerate(images) if path not in done]
    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    with (output / RESULTS).open("a") as results, (output / ERRORS).open("a") as errors:
        for batch in progress(batches):
            readable = []
            for index, path in batch:
                try:
                    readable.append((index, path, _read(image_root, path)))
                except (ImageError, RecordError) as error:
                    _append(errors, [{"image": path, "error": str(error)}])
            # A short last batch would compile anew: fill it up and drop the surplus.
            filled = (readable * batch_size)[:batch_size] if readable else []
            prompts = [Prompt(turns, (data,)) for _, _, data in filled]
            seeds = [dataclasses.replace(options, seed=options.seed + index) for index, _, _ in filled]
            completions = generator.generate(prompts, seeds)
            lines = [
                {"image": path, "caption": completion.text, "finished": completion.finished}
                for (_, path, _), completion in zip(readable, completions, strict=False)
            ]
            _append(results, lines)
    return _write_records(output, images, prompt)


def _read(root: str | os.PathLike[str], path: str) -> bytes:
    try:
        data = resolve_image(root, path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: can't be read below {root}: {error.strerror}") from error
    load_image(data, name=path)
    return data


def _append(file: Any, lines: list[dict[str, Any]]) -> None:
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Whole lines; one cut off by a kill is cut away, so that the next append starts a new line."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    # Not `str.splitlines`: captions may hold what Unicode calls a line break.
    for line in whole.split(b"\n")[:-1]:
        yield json.loads(line)


def _finished(path: pathlib.Path) -> set[str]:
    return {line["image"] for line in _lines(path)}


def _write_records(output: pathlib.Path, images: Sequence[str], prompt: str) -> CaptionReport:
    """Results to LLaVA-format JSON, in the order of the corpus."""
    by_path = {line["image"]: line for line in _lines(output / RESULTS)}
    records = [
        {
            "id": pathlib.PurePath(path).stem,
            "image": path,
            "conversations": [
                {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
                {"from": "gpt", "value": by_path[path]["caption"]},
            ],
        }
        for path in images
        if by_path.get(path, {}).get("caption")
    ]
    temporary = output / (RECORDS + ".tmp")
    temporary.write_text(json.dumps(records, ensure_ascii=False, indent=1))
    os.replace(temporary, output / RECORDS)
    return CaptionReport(
        captioned=len(records),
        failed=len(_finished(output / ERRORS)),
        cut_off=sum(not line["finished"] for line in by_path.values()),
        records=output / RECORDS,
    )
