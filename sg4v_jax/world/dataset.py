"""Writes the world to disk in the file formats of the ShareGPT4V release."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sg4v_jax import atomic
from sg4v_jax.world.describe import QA, SHORT_ANSWER, brief, dense, questions
from sg4v_jax.world.photos import Photo, load_photos
from sg4v_jax.world.render import render
from sg4v_jax.world.scene import Dice, Scene, sample_scene

Record = dict[str, Any]
Named = tuple[str, Scene]  # the image's path below the image root, and what it shows

# Short, generic and varied, as in the released captions; the first is the held-out question.
CAPTION_QUESTIONS = (
    "Describe this image in detail.",
    "What is in this image?",
    "What do you see in the picture?",
    "Can you describe the image?",
    "Please explain what this picture shows.",
    "Give a detailed description of the image.",
)
# How many of the questions about its scene a record of the instruction mix asks.
_TURNS = 4
# One in four captions of the captioner's set is also in the instruction mix.
_DENSE_EVERY = 4
# Seeds of the held-out scenes, of the training scenes and of the texts must not meet.
_HELDOUT, _TRAIN, _TEXTS = range(3)
_TEXT_ONLY = (
    ("What color do you get when you mix blue and yellow paint?", "green"),
    ("What color do you get when you mix red and yellow paint?", "orange"),
    ("What color do you get when you mix red and blue paint?", "purple"),
    ("How many sides does a triangle have?", "3"),
    ("How many sides does a square have?", "4"),
    ("Which shape has three sides?", "triangle"),
    ("Which shape has four equal sides?", "square"),
    ("Does a circle have corners?", "no"),
    ("Does a square have corners?", "yes"),
    ("Is a ring round?", "yes"),
    ("Is a triangle round?", "no"),
    ("Is navy a dark color?", "yes"),
    ("Is beige a dark color?", "no"),
    ("What is the opposite of large?", "small"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of top?", "bottom"),
)


@dataclasses.dataclass(frozen=True)
class WorldFiles:
    """Where `write_world` put everything.

    Attributes:
      image_root: The folder that image paths in all the files are relative to.
      cap_brief: Brief captions of all training scenes, in the format of LLaVA's
        `blip_laion_cc_sbu_558k.json`: for `configs/align.py`.
      cap_dense: Dense captions of the photos and of a part of the training scenes, in the
        format of `sharegpt4v_instruct_gpt4-vision_cap100k.json`: to train a captioner.
      images_to_caption: JSON list of the training images without a dense caption: what the
        captioner is run over.
      sft_mix: The instruction mix, in the format of the release's mix665k.
      heldout_captions: JSON lines of question_id, image, text: the captioning question.
      heldout_questions: JSON lines of question_id, image, text, category.
      heldout_answers: JSON lines of question_id, answer, category.
      heldout_scenes: JSON list of {"image", "scene"}, the scenes for `Scene.from_dict`.
    """

    image_root: Path
    cap_brief: Path
    cap_dense: Path
    images_to_caption: Path
    sft_mix: Path
    heldout_captions: Path
    heldout_questions: Path
    heldout_answers: Path
    heldout_scenes: Path

    @classmethod
    def below(cls, directory: str | os.PathLike[str]) -> WorldFiles:
        """Returns the paths that `write_world` uses in a directory, written or not."""
        root = Path(directory)
        return cls(
            image_root=root / "images",
            cap_brief=root / "cap_brief.json",
            cap_dense=root / "cap_dense.json",
            images_to_caption=root / "images_to_caption.json",
            sft_mix=root / "sft_mix.json",
            heldout_captions=root / "heldout_captions.jsonl",
            heldout_questions=root / "heldout_questions.jsonl",
            heldout_answers=root / "heldout_answers.jsonl",
            heldout_scenes=root / "heldout_scenes.json",
        )

    def read_heldout(self) -> list[Named]:
        """Reads the held-out scenes back.

        Returns:
          (image path, scene) pairs, in the order of the held-out files.

        Raises:
          FileNotFoundError: The world has not been written.
        """
        entries = json.loads(self.heldout_scenes.read_text(encoding="utf-8"))
        return [(entry["image"], Scene.from_dict(entry["scene"])) for entry in entries]


def write_world(
    directory: str | os.PathLike[str],
    *,
    train_scenes: int,
    heldout_scenes: int,
    seed: int,
    dense_share: float = 0.5,
    image_size: int = 224,
    progress: Callable[[Sequence[Named]], Iterable[Named]] = iter,
) -> WorldFiles:
    """Writes the world: pictures below `images/`, captions and questions beside it.

    The same arguments write the same bytes. Each file appears whole or not at all, and the
    JSON files appear after the pictures they name.

    Args:
      directory: Where to write; created if need be, files in it are replaced.
      train_scenes: How many scenes to train on, at least two.
      heldout_scenes: How many scenes to evaluate on, at least one. They differ from each other
        and from every training scene.
      seed: A non-negative integer that decides everything.
      dense_share: Part of the training scenes that have a dense caption.
      image_size: Side of the pictures in pixels.
      progress: Wraps the list of pictures while they are drawn, for example `tqdm`.

    Returns:
      The paths of what was written.

    Raises:
      ValueError: A number is too small, or `dense_share` out of range.
      OSError: The directory can't be written.
    """
    if not 0 <= dense_share <= 1:
        raise ValueError(f"dense_share {dense_share} must lie between 0 and 1")
    train, heldout = split_scenes(train_scenes, heldout_scenes, seed)
    photos = load_photos()
    files = WorldFiles.below(directory)
    for photo in photos:
        _write(files.image_root / f"photos/{photo.name}", photo.encoded)
    for name, scene in progress([*train, *heldout]):
        _write(files.image_root / name, _png(render(scene, image_size)))

    dice = Dice(seed, _TEXTS)
    described = round(len(train) * dense_share)
    captions = list(_captions(train[:described], photos, dice))
    mix = [*_instructions(train, photos, seed, dice), *captions[::_DENSE_EVERY]]
    mix.extend(_record(f"text_{i:03d}", None, [turn]) for i, turn in enumerate(_text_turns()))
    _write_json(files.cap_dense, dice.sample(captions, len(captions)))
    _write_json(files.cap_brief, list(_brief_captions(train, dice)))
    _write_json(files.images_to_caption, [name for name, _ in train[described:]])
    _write_json(files.sft_mix, dice.sample(mix, len(mix)))
    _write_heldout(files, heldout, seed)
    return files


def split_scenes(train: int, heldout: int, seed: int) -> tuple[list[Named], list[Named]]:
    """Draws training and held-out scenes that have no scene graph in common.

    Args:
      train: How many training scenes; the same scene may come up twice among them.
      heldout: How many held-out scenes, all different.
      seed: A non-negative integer.

    Returns:
      The training and the held-out scenes, each with its image's path.

    Raises:
      ValueError: There are fewer than two training scenes or one held-out scene.
    """
    if train < 2 or heldout < 1:
        raise ValueError(f"{train} training and {heldout} held-out scenes; need at least 2 and 1")
    kept: dict[Scene, None] = {}
    for scene in _stream(seed, _HELDOUT):
        kept[scene] = None
        if len(kept) == heldout:
            break
    fresh = (scene for scene in _stream(seed, _TRAIN) if scene not in kept)
    return (
        [(f"world/train/{i:06d}.png", next(fresh)) for i in range(train)],
        [(f"world/heldout/{i:06d}.png", scene) for i, scene in enumerate(kept)],
    )


def _stream(seed: int, part: int) -> Iterator[Scene]:
    dice = Dice(seed, part)
    while True:
        yield sample_scene(dice.below(2**63))


def _captions(scenes: Sequence[Named], photos: Sequence[Photo], dice: Dice) -> Iterator[Record]:
    described = [(f"photos/{photo.name}", photo.caption) for photo in photos]
    described += [(name, dense(scene)) for name, scene in scenes]
    for name, caption in described:
        question = dice.pick(CAPTION_QUESTIONS)
        yield _record(f"caption_{_stem(name)}", name, [(question, caption)], dice)


def _brief_captions(scenes: Sequence[Named], dice: Dice) -> Iterator[Record]:
    for name, scene in scenes:
        yield _record(f"brief_{_stem(name)}", name, [(dice.pick(CAPTION_QUESTIONS), brief(scene))], dice)


def _instructions(
    scenes: Sequence[Named], photos: Sequence[Photo], seed: int, dice: Dice
) -> Iterator[Record]:
    """One multi-turn record per picture."""
    asked: list[tuple[str, Sequence[QA]]] = [
        (name, questions(scene, _question_seed(seed, index))[:_TURNS])
        for index, (name, scene) in enumerate(scenes)
    ]
    asked += [(f"photos/{photo.name}", photo.questions) for photo in photos]
    for name, turns in asked:
        yield _record(f"qa_{_stem(name)}", name, [turn[:2] for turn in turns], dice)


def _text_turns() -> Iterator[tuple[str, str]]:
    for question, answer in _TEXT_ONLY:
        yield question + SHORT_ANSWER, answer


def _record(
    name: str, image: str | None, turns: Sequence[tuple[str, str]], dice: Dice | None = None
) -> Record:
    """One sample of the released format; without an image there is no "image" key at all."""
    conversations = [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    record: Record = {"id": name}
    if image is not None:
        record["image"] = image
        first = conversations[0]["value"]
        # The release puts <image> on its own line on either side. A question that ends with an
        # instruction on the answer's form keeps that instruction last.
        before = dice is None or first.endswith(SHORT_ANSWER) or dice.flip()
        conversations[0]["value"] = f"<image>\n{first}" if before else f"{first}\n<image>"
    return {**record, "conversations": conversations}


def _write_heldout(files: WorldFiles, heldout: Sequence[Named], seed: int) -> None:
    captions: list[Record] = []
    asked: list[Record] = []
    answers: list[Record] = []
    for index, (name, scene) in enumerate(heldout):
        captions.append({"question_id": index, "image": name, "text": CAPTION_QUESTIONS[0]})
        for question, answer, category in questions(scene, _question_seed(seed, index)):
            number, image = len(asked), {"image": name}
            asked.append({"question_id": number, **image, "text": question, "category": category})
            answers.append({"question_id": number, "answer": answer, "category": category})
    _write_json_lines(files.heldout_captions, captions)
    _write_json_lines(files.heldout_questions, asked)
    _write_json_lines(files.heldout_answers, answers)
    scenes = [{"image": name, "scene": scene.to_dict()} for name, scene in heldout]
    _write_json(files.heldout_scenes, scenes)


def _question_seed(seed: int, index: int) -> int:
    return (seed << 32) + index


def _stem(name: str) -> str:
    return "_".join(Path(name).with_suffix("").parts[-2:])


def _png(picture: Image.Image) -> bytes:
    # Flat colours: PNG is lossless, less than half of a JPEG at quality 95, and as quick.
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _write_json(path: Path, value: object) -> None:
    _write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _write_json_lines(path: Path, rows: Iterable[Record]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, content)
