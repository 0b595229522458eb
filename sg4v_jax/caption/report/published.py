"""What the paper reports of its captions, to put beside ours (ShareGPT4V, arXiv:2311.12793)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A row of the paper's comparison of caption datasets.

    Attributes:
      name: of the dataset.
      images: where its images are from.
      captioner: who wrote the captions.
      sees: whether the captioner saw the image.
      captions: how many, as printed.
      characters: mean length, as printed.
      words: mean length, from a later paper's count (COCONut-PanCap); None where it has none.
    """

    name: str
    images: str
    captioner: str
    sees: bool
    captions: str
    characters: int
    words: int | None


DATASETS = (
    Dataset("COCO-Caption", "COCO", "people", True, "118K", 52, 11),
    Dataset("BLIP-LCS", "LCS", "BLIP", True, "558K", 54, None),
    Dataset("LLaVA-23K", "COCO", "GPT-4 (text)", False, "23K", 609, 105),
    Dataset("ShareGPT4V", "LCS, COCO, ...", "GPT4-Vision", True, "100K", 942, 162),
    Dataset("ShareGPT4V-PT", "LCS, COCO, ...", "Share-Captioner", True, "1,246K", 826, 144),
)

# Which caption people prefer, in shares of votes.
PREFERENCE = {"GPT4-Vision": 0.382, "Share-Captioner": 0.353, "comparable": 0.265}
