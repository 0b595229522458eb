"""A data file in the released schema, with every defect planted a known number of times."""

import collections
import dataclasses
import io
import json
import os
import pathlib
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

Record = dict[str, Any]

# Path patterns of the released files, and records of each kind per 1000 of the file.
SOURCES = {
    "coco": ("coco/train2017/{:012d}.jpg", 340),
    "llava": ("llava/llava_pretrain/images/00{:03d}/{:09d}.jpg", 120),
    "sam": ("sam/images/sa_{}.jpg", 140),
    "gqa": ("gqa/images/{}.jpg", 90),
    "ocr_vqa": ("ocr_vqa/images/{}.jpg", 90),
    "textvqa": ("textvqa/train_images/{:016x}.jpg", 40),
    "vg": ("vg/VG_100K_2/{}.jpg", 80),
    "share_textvqa": ("share_textvqa/images/{:016x}.jpg", 10),
    "web-celebrity": ("web-celebrity/images/Actor_{}.jpg", 10),
    "web-landmark": ("web-landmark/images/Place_{}.jpg", 10),
    "wikiart": ("wikiart/images/painter_{}.jpg", 10),
    "(text only)": ("", 60),
}


@dataclasses.dataclass
class Planted:
    """The file, its images, and all that is wrong with them.

    Attributes:
      file: a JSON array.
      image_root: what its image paths are relative to.
      total: entries in the file.
      defects: how often each kind was planted.
      sources: the same by source, with `records`, `images` and `bad`.
      good: the ids that a build keeps, in order.
    """

    file: pathlib.Path
    image_root: pathlib.Path
    total: int = 0
    defects: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sources: dict[str, collections.Counter[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    good: list[str] = dataclasses.field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.total - len(self.good)


@dataclasses.dataclass
class Site:
    """Where a defect is planted: a clean record, its image's bytes, and the image root."""

    record: Record
    data: bytes | None
    root: pathlib.Path
    earlier: Record
    dice: random.Random

    @property
    def turns(self) -> list[Any]:
        return self.record["conversations"]  # type: ignore[no-any-return]


def plant(directory: pathlib.Path, records: int, seed: int = 0) -> Planted:
    """Writes `records` entries below `directory`; the same arguments write the same files."""
    dice = random.Random(seed)
    result = Planted(directory / "planted.json", directory / "data", total=records)
    (result.image_root / "gqa/images/folder.jpg").mkdir(parents=True)
    (result.image_root / "sam/images").mkdir(parents=True)
    (directory / "outside.jpg").write_bytes(picture("JPEG", dice))
    os.symlink(directory / "outside.jpg", result.image_root / "sam/images/link.jpg")
    clean = [clean_record(number, dice) for number in range(records)]
    # Each defect a count of its own, so that no two can be mistaken for each other.
    planned = [kind for i, kind in enumerate(DEFECTS) for _ in range(3 + i)]
    dice.shuffle(planned)
    with_image = [i for i in range(10, records) if "image" in clean[i]]
    places = dict(zip(dice.sample(with_image, len(planned)), planned, strict=True))
    entries = []
    for index, record in enumerate(clean):
        data = picture("JPEG", dice) if "image" in record else None
        site = Site(record, data, result.image_root, clean[index % 10], dice)
        kind = places.get(index, "")
        returned = DEFECTS[kind](site) if kind else None
        entry = site.record if returned is None else returned
        entries.append(entry if isinstance(entry, str) else json.dumps(entry))
        if site.data is not None:
            file = result.image_root / site.record["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(site.data)
        _expect(result, entry, kind)
    result.file.write_bytes(("[" + ",\n".join(entries) + "]").encode("utf-8", "surrogateescape"))
    return result


def _expect(result: Planted, entry: Any, kind: str) -> None:
    """Counts what a check must find in an entry."""
    image = entry.get("image", "") if isinstance(entry, dict) else None
    known = {"": "(text only)", "/etc/hostname": "(outside)"}
    source = known.get(image, image.split("/")[0]) if isinstance(image, str) else "(unknown)"
    counts = result.sources["(outside)" if source == ".." else source]
    counts["records"] += 1
    counts["images"] += isinstance(image, str) and image != ""
    for found in (kind, *ALSO.get(kind, ())):
        if found:
            result.defects[found] += 1
            if not found.startswith("duplicate"):  # These are counted in the whole file.
                counts[found] += 1
    if kind in BAD:
        counts["bad"] += 1
    else:
        result.good.append(entry["id"])


def clean_record(number: int, dice: random.Random) -> Record:
    """A caption, several questions, or text only."""
    names = list(SOURCES)
    source = dice.choices(names, [share for _, share in SOURCES.values()])[0]
    pattern = SOURCES[source][0]
    turns = []
    for i in range(dice.choice([1, 1, 2, 5])):
        turns.append({"from": "human", "value": f"What about {dice.choice(WORDS)}?"})
        turns.append({"from": "gpt", "value": " ".join(dice.choices(WORDS, k=dice.randint(1, 150))) + "."})
        if i == 0 and pattern:
            question = turns[0]["value"]
            turns[0]["value"] = dice.choice([f"<image>\n{question}", f"{question}\n<image>"])
    record: Record = {"id": f"{number:012d}"}
    if pattern:
        record["image"] = pattern.format(number, number)
    elif number % 2:
        record["model"] = ""
    record["conversations"] = turns
    return record


WORDS = ["a", "the", "red", "<small>", "café", "&", "blue", "dog", "7", "on", "under", "table", "猫", '"so"']


def picture(form: str, dice: random.Random, **options: Any) -> bytes:
    image = Image.new("RGB", (dice.randint(40, 90), dice.randint(40, 90)), tuple(dice.randbytes(3)))
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 60_001))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


# --- Defects: each changes a site, or returns another entry, or the text of one -------------------

HUGE = (10_100, 20_000)  # above the library's limit, and above Pillow's own
BREAKAGES = ('{"id": tru}', '{id: "1"}', "", '{"id": "caf\udce9"}')


def _broken(site: Site) -> str:
    site.data = None
    return site.dice.choice(BREAKAGES)


def _malformed_record(site: Site) -> Any:
    record = site.record
    return site.dice.choice([["list"], 7, {**record, "id": None}, {**record, "image": 7}])


def _change_answer(text: str) -> Callable[[Site], None]:
    return lambda site: site.turns[1].update(value=text)


def _same_side_twice(site: Site) -> None:
    site.turns.insert(0, site.turns[0])


def _image_count(site: Site) -> None:
    site.turns.extend([dict(site.turns[0]), site.turns[1]])


def _outside(site: Site) -> None:
    name = f"../data/{site.record['image']}"
    site.record["image"] = site.dice.choice([name, "/etc/hostname", "sam/images/link.jpg"])
    site.data = None


def _unreadable(site: Site) -> None:
    site.record["image"], site.data = "gqa/images/folder.jpg", None


def _corrupt(site: Site) -> None:
    noise = Image.frombytes("RGB", (64, 64), site.dice.randbytes(64 * 64 * 3))
    data = io.BytesIO()
    noise.save(data, "JPEG")
    # The half of a photograph has a whole header.
    site.data = site.dice.choice([data.getvalue()[: data.tell() // 2], b"<html>not found</html>"])


def _animated(site: Site) -> None:
    frames = [Image.new("RGB", (32, 32), tuple(site.dice.randbytes(3))) for _ in range(3)]
    form = site.dice.choice(["GIF", "PNG"])
    site.data = picture(form, site.dice, save_all=True, append_images=frames)


def _no_placeholder(site: Site) -> None:
    site.turns[0]["value"] = site.turns[0]["value"].replace("<image>", "")


def _duplicate(site: Site) -> Record:
    return {**site.record, "id": site.earlier["id"]}


DEFECTS: dict[str, Callable[[Site], Any]] = {
    "malformed_json": _broken,
    "malformed_record": _malformed_record,
    "malformed_conversation": lambda site: site.turns[0].update({"from": "user"}),
    "broken_text": _change_answer("half \ud83d"),
    "wrong_alternation": _same_side_twice,
    "no_answer": lambda site: {**site.record, "conversations": site.turns[:-1]},
    "empty_answer": _change_answer(" \n"),
    "empty_question": lambda site: site.turns.extend([{"from": "human", "value": ""}, site.turns[1]]),
    "image_count": _image_count,
    "path_outside": _outside,
    "missing_image": lambda site: setattr(site, "data", None),
    "unreadable_image": _unreadable,
    "zero_byte_image": lambda site: setattr(site, "data", b""),
    "huge_image": lambda site: setattr(site, "data", huge_png(site.dice.choice(HUGE))),
    "corrupt_image": _corrupt,
    "mistyped_image": lambda site: setattr(site, "data", picture("PNG", site.dice)),
    "animated_image": _animated,
    "leading_answer": lambda site: site.turns.insert(0, {"from": "gpt", "value": "Hello."}),
    "placeholder_added": _no_placeholder,
    "placeholder_joined": lambda site: site.turns[0].update(value="<image>\nWhat is <image>?"),
    "placeholder_as_text": _change_answer("An <image> tag."),
    "duplicate_id": _duplicate,
    "duplicate_record": lambda site: dict(site.earlier),
    "too_long": _change_answer("word " * 3000),
}
BAD = set(DEFECTS) - {
    "mistyped_image",
    "animated_image",
    "leading_answer",
    "placeholder_added",
    "placeholder_joined",
    "placeholder_as_text",
    "duplicate_id",
    "duplicate_record",
    "too_long",
}
ALSO = {
    "animated_image": ("mistyped_image",),  # They are named .jpg, as those of OCR-VQA are.
    "duplicate_record": ("duplicate_id",),
}
