"""The released data files and the image folders their records name (ShareGPT4V docs/Data.md)."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

TEXT_ONLY, NO_FOLDER, OUTSIDE = "(text only)", "(no folder)", "(outside)"


@dataclasses.dataclass(frozen=True)
class Source:
    """Images of one origin, all below one first folder of the image root.

    Attributes:
      folders: where its images are, relative to the image root.
      origin: what to download.
    """

    folders: tuple[str, ...]
    origin: str


@dataclasses.dataclass(frozen=True)
class Release:
    """A published data file.

    Attributes:
      records: how many it has.
      counts: records by source, as far as they are known.
      source: of all its images, where their paths don't start with it.
    """

    records: int
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    source: str = ""


SOURCES: Mapping[str, Source] = {
    "coco": Source(("coco/train2017",), "COCO train2017"),
    "llava": Source(("llava/llava_pretrain/images",), "images.zip of liuhaotian/LLaVA-Pretrain (LCS-558K)"),
    "sam": Source(
        ("sam/images",),
        "SA-1B, tars 000000 to 000050; fine-tuning needs only the separate zip of 9K images, the 100K "
        "captions about 11K more, from the first tars",
    ),
    "gqa": Source(("gqa/images",), "GQA images"),
    "ocr_vqa": Source(
        ("ocr_vqa/images",), "OCR-VQA, saved as .jpg; some links are dead and some files are GIFs"
    ),
    "textvqa": Source(("textvqa/train_images",), "TextVQA train_val_images"),
    "vg": Source(("vg/VG_100K", "vg/VG_100K_2"), "Visual Genome, part 1 and part 2"),
    "share_textvqa": Source(("share_textvqa/images",), "ShareGPT4V's WebData zip"),
    "web-celebrity": Source(("web-celebrity/images",), "ShareGPT4V's WebData zip"),
    "web-landmark": Source(("web-landmark/images",), "ShareGPT4V's WebData zip"),
    "wikiart": Source(("wikiart/images",), "ShareGPT4V's WebData zip"),
}

RELEASES: Mapping[str, Release] = {
    "sharegpt4v_instruct_gpt4-vision_cap100k.json": Release(
        102_025,
        {
            "sam": 19_982,
            "share_textvqa": 500,
            "wikiart": 500,
            "web-landmark": 500,
            "web-celebrity": 498,
        },
    ),
    "share-captioner_coco_lcs_sam_1246k_1107.json": Release(
        1_246_901, {"coco": 118_287, "llava": 558_128, "sam": 570_486}
    ),
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": Release(665_058),
    "llava_v1_5_mix665k.json": Release(
        665_298,
        {
            "coco": 364_100,
            "vg": 86_417,
            "gqa": 72_140,
            "ocr_vqa": 80_000,
            "textvqa": 21_953,
            TEXT_ONLY: 40_688,
        },
    ),
    # Its paths start below llava/llava_pretrain/images, in numbered folders.
    "blip_laion_cc_sbu_558k.json": Release(558_128, {"llava": 558_128}, source="llava"),
}


def release_of(path: str | os.PathLike[str]) -> Release | None:
    """The release that a file is, by its name."""
    return RELEASES.get(pathlib.PurePosixPath(os.fspath(path)).name)


def source_of(image: str, release: Release | None = None) -> str:
    """Where an image is from: the first folder of its path."""
    if release and release.source:
        return release.source
    first, slash, _ = image.replace("\\", "/").removeprefix("./").partition("/")
    if slash and first in ("", ".."):
        return OUTSIDE
    return first if slash else NO_FOLDER
