"""A packed batch as a person wants to see it: images in their slots, text, supervision, boundaries."""

import base64
import dataclasses
import html
import io
import itertools
import unicodedata
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sg4v_jax.data.batch import Batch
from sg4v_jax.data.tokenizer import Tokenizer

_RESET, _DIM, _SUPERVISED = "\x1b[0m", "\x1b[2m", "\x1b[1;32m"
_RAMP = " .:-=+*#%@"
_THUMBNAIL = 160  # pixels, in HTML
_COLUMNS = 20  # of a thumbnail in a terminal


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of a sample: an image, or text that is supervised or isn't.

    Attributes:
      text: as decoded, with control tokens as `<s>` and `</s>`.
      supervised: whether the loss is on its tokens.
      slot: which slot of the row an image is in; None for text.
    """

    text: str = ""
    supervised: bool = False
    slot: int | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
    """A sample in a row, at `start` to `end` of its positions, `supervised` of them predicting."""

    spans: tuple[Span, ...]
    start: int
    end: int
    supervised: int


def segments(batch: Batch, row: int, tokenizer: Tokenizer, image_tokens: int) -> list[Segment]:
    """The samples of a row, as they are trained on; an image has `image_tokens` positions."""
    arrays = {name: np.asarray(value)[row] for name, value in vars(batch).items()}
    found = []
    for number in range(1, int(arrays["segment_ids"].max()) + 1):
        at = np.flatnonzero(arrays["segment_ids"] == number)
        weights = arrays["loss_weights"][at]
        # The weight of a position is on the token after it.
        supervised = np.append(False, weights[:-1] > 0)
        slots = np.where(arrays["image_index"][at] >= 0, arrays["image_index"][at] // image_tokens, -1)
        spans = tuple(_spans(arrays["tokens"][at].tolist(), supervised, slots, tokenizer))
        found.append(Segment(spans, int(at[0]), int(at[-1]) + 1, int((weights > 0).sum())))
    return found


def to_text(batch: Batch, tokenizer: Tokenizer, image_tokens: int, *, rows: int, colour: bool) -> str:
    """The first `rows` rows for a terminal; without `colour`, supervised text stands between « and »."""
    parts = []
    for row in range(min(rows, len(batch.tokens))):
        samples = segments(batch, row, tokenizer, image_tokens)
        parts.append(_headline(batch, row, samples) + "\n")
        images = np.asarray(batch.images)[row, : _images(samples)]
        parts.append(_side_by_side([_thumbnail_text(image, colour) for image in images]))
        for number, sample in enumerate(samples, start=1):
            parts.append(f"-- {_caption(number, sample)} --\n")
            parts += [_span_text(span, colour) for span in sample.spans]
            parts.append("\n\n")
    return "".join(parts)


def to_html(batch: Batch, tokenizer: Tokenizer, image_tokens: int, title: str) -> str:
    """All rows as a page that needs no other file."""
    sections = []
    for row in range(len(batch.tokens)):
        samples = segments(batch, row, tokenizer, image_tokens)
        slots, length = batch.images.shape[1], batch.tokens.shape[1]
        pictures = [
            _picture(np.asarray(batch.images)[row, slot], slot) if slot < _images(samples)
            else f'<div class="slot empty">slot {slot} empty</div>'
            for slot in range(slots)
        ]  # fmt: skip
        bar = [
            f'<div class="c{i % 4}" style="width:{100 * (s.end - s.start) / length:.3f}%" '
            f'title="{html.escape(_caption(i + 1, s))}"></div>'
            for i, s in enumerate(samples)
        ]
        texts = [
            f'<article class="b{i % 4}"><h3>{html.escape(_caption(i + 1, s))}</h3><p>'
            + "".join(map(_span_html, s.spans))
            + "</p></article>"
            for i, s in enumerate(samples)
        ]
        sections.append(
            f"<section><h2>{html.escape(_headline(batch, row, samples))}</h2>"
            f'<div class="bar">{"".join(bar)}</div><div class="slots">{"".join(pictures)}</div>'
            f"{''.join(texts)}</section>"
        )
    fill = (np.asarray(batch.segment_ids) > 0).mean()
    return _PAGE.format(
        title=html.escape(title), rows=len(batch.tokens), fill=100 * fill, body="\n".join(sections)
    )


def _spans(
    tokens: list[int], supervised: np.ndarray, slots: np.ndarray, tokenizer: Tokenizer
) -> Iterator[Span]:
    control = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>", tokenizer.unk_id: "<unk>"}
    # Text is decoded from the sample's start on: what a piece looks like depends on what is before it.
    before: list[int] = []
    keys = zip(slots.tolist(), supervised.tolist(), tokens, strict=True)
    grouped = itertools.groupby(keys, key=lambda key: (key[0], key[1], key[0] < 0 and key[2] in control))
    for (slot, is_supervised, is_control), group in grouped:
        ids = [token for _, _, token in group]
        if slot >= 0:
            yield Span(slot=slot)
        elif is_control:
            yield Span("".join(control[i] for i in ids), is_supervised)
        else:
            start = len(tokenizer.decode(before))
            before += ids
            yield Span(tokenizer.decode(before)[start:], is_supervised)


def _headline(batch: Batch, row: int, samples: list[Segment]) -> str:
    length, slots = batch.tokens.shape[1], batch.images.shape[1]
    used = sum(sample.end - sample.start for sample in samples)
    return (
        f"row {row}: {used:,} of {length:,} tokens ({100 * used / length:.1f} %), {_images(samples)} of "
        f"{slots} images, {len(samples)} samples, {sum(s.supervised for s in samples):,} tokens supervised"
    )


def _caption(number: int, sample: Segment) -> str:
    images = [str(span.slot) for span in sample.spans if span.slot is not None]
    where = f"slots {', '.join(images)}" if images else "no image"
    return (
        f"sample {number}: positions {sample.start:,} to {sample.end - 1:,}, {where}, "
        f"{sample.supervised:,} supervised"
    )


def _images(samples: list[Segment]) -> int:
    return sum(span.slot is not None for sample in samples for span in sample.spans)


# Terminal


def _span_text(span: Span, colour: bool) -> str:
    if span.slot is not None:
        return f"[image in slot {span.slot}]"
    text = _printable(span.text)
    if colour:
        return f"{_SUPERVISED if span.supervised else _DIM}{text}{_RESET}"
    return f"«{text}»" if span.supervised else text


def _printable(text: str) -> str:
    """Data never steers a terminal: control characters are spelled out."""
    kept = "\n\t"
    return "".join(
        c if c in kept or unicodedata.category(c) not in ("Cc", "Cf") else f"\\u{ord(c):04x}" for c in text
    )


def _thumbnail_text(image: np.ndarray, colour: bool) -> list[str]:
    """Lines of characters; a character is twice as high as wide."""
    small = np.asarray(Image.fromarray(image).resize((_COLUMNS, _COLUMNS), Image.Resampling.BOX))
    if not colour:
        grey = small[::2].mean(-1) / 256
        return ["".join(_RAMP[int(value * len(_RAMP))] for value in line) for line in grey]
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = (
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*up, *low)
            for up, low in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        lines.append("".join(cells) + _RESET)
    return lines


def _side_by_side(blocks: list[list[str]]) -> str:
    return "".join("  ".join(line) + "\n" for line in zip(*blocks, strict=True))


# HTML


def _span_html(span: Span) -> str:
    if span.slot is not None:
        return f"<b>[image in slot {span.slot}]</b>"
    text = html.escape(_printable(span.text))
    return f"<mark>{text}</mark>" if span.supervised else text


def _picture(image: np.ndarray, slot: int) -> str:
    file = io.BytesIO()
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    thumbnail.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<figure class="slot"><img src="data:image/jpeg;base64,{data}" alt="slot {slot}"></figure>'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1.05rem; margin-top: 2.5rem; }}
h3 {{ font-size: .8rem; font-weight: normal; margin: 0; opacity: .7; }}
p {{ margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
mark {{ background: #bfe8c6; color: #000; }}
article {{ border-left: 5px solid; margin: .8rem 0; padding-left: .7rem; }}
.bar {{ display: flex; height: .8rem;
  background: repeating-linear-gradient(45deg, #ddd 0 4px, #fff 4px 8px); }}
.slots {{ display: flex; flex-wrap: wrap; gap: .5rem; margin: .6rem 0; }}
.slot {{ width: 160px; height: 160px; margin: 0; }}
.slot img {{ width: 100%; }}
.empty {{ border: 1px dashed #999; box-sizing: border-box; display: grid; place-items: center; color: #777; }}
.c0 {{ background: #4477aa; }} .c1 {{ background: #ee8866; }}
.c2 {{ background: #44aa77; }} .c3 {{ background: #aa6699; }}
.b0 {{ border-color: #4477aa; }} .b1 {{ border-color: #ee8866; }}
.b2 {{ border-color: #44aa77; }} .b3 {{ border-color: #aa6699; }}
</style>
<h1>{title}</h1>
<p>{rows} rows, {fill:.1f} % of their positions filled. <mark>Marked</mark> text is what the loss is on; each
colour is a sample, hatched is padding.</p>
{body}
</html>
"""
