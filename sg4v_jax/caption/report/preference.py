"""A page on which people say which of two captions of an image is better, without knowing whose it is."""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from sg4v_jax.caption.report.compare import common_rows
from sg4v_jax.caption.report.measure import CaptionSet
from sg4v_jax.caption.report.sample import fetch, ranked
from sg4v_jax.data.thumbnail import thumbnail
from sg4v_jax.page.html import data_uri, document

_SIDE = 640  # pixels
# What can be chosen, which keys choose it too, and what it is called: values are those of `votes.CHOICES`.
_CHOICES = (
    ("left", "ArrowLeft a 1", "Left is better<kbd>←</kbd>"),
    ("tie", "ArrowDown t 3", "Comparable<kbd>↓</kbd>"),
    ("right", "ArrowRight b 2", "Right is better<kbd>→</kbd>"),
)
_STYLE = """
main { max-width: 72rem; padding-top: 1.5rem; }
fieldset {
  display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem 2rem; margin: 1rem 0 0; padding: 0; border: 0;
  min-width: 0;
}
fieldset img {
  grid-column: 1 / 3; justify-self: center; max-width: 100%; max-height: 42vh; border-radius: 3px;
}
fieldset p {
  white-space: pre-line; overflow-wrap: anywhere; border-top: 1px solid var(--rule); padding-top: .7rem;
}
fieldset[hidden], #end[hidden] { display: none; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin-top: 1rem; }
.row .bar { flex: 1; margin: 0; }
button, label, input {
  font: inherit; color: inherit; background: none; border: 1px solid var(--rule); border-radius: 4px;
  padding: .35rem .8rem;
}
button, label { cursor: pointer; }
button:hover, label:hover, label:has(:checked) { border-color: var(--accent); color: var(--accent); }
label:has(:focus-visible) { outline: 2px solid var(--accent); }
kbd { font-size: .8em; color: var(--muted); margin-left: .4em; }
.choices { grid-column: 1 / 3; display: grid; grid-template-columns: 1fr auto 1fr; gap: 1rem; }
.choices label { padding: .7rem; text-align: center; }
.choices input { position: absolute; opacity: 0; }
@media (max-width: 46rem) {
  fieldset { grid-template-columns: 1fr; }
  fieldset img, .choices { grid-column: 1; }
}
"""
_HEAD = """<p class=kicker>sg4v report</p>
<h1>Which caption describes the image better?</h1>
<p class=lead>Look for what is wrong, what is missing and what is told well, in this order. Length is no merit
in itself. Which captioner wrote which is not on this page.</p>
<p id=warning class=bad hidden>This browser keeps nothing for this page: download your votes before you
close it.</p>
<div class=row>
<strong id=progress></strong><span class=bar><i id=filled></i></span><small id=count></small>
</div>
"""
_FOOT = """<div id=end hidden>
<h2>That was the last pair</h2><p>Download your votes and send the file back.</p>
</div>
<div class=row>
<button type=button id=back data-keys="Backspace u">Back<kbd>⌫</kbd></button>
<button type=button id=open>Next without a vote</button>
<input name=rater placeholder="your name" aria-label="your name" maxlength=60 autocomplete=off>
<button type=button id=download>Download votes</button>
</div>
"""


@dataclasses.dataclass(frozen=True)
class Page:
    """What was written.

    Attributes:
      page: the page to give to people.
      key: whose captions stood left; not for them.
      pairs: on the page.
      equal: pairs that were left out because both captions are the same.
    """

    page: pathlib.Path
    key: pathlib.Path
    pairs: int
    equal: int


def write_preference(
    first: CaptionSet,
    second: CaptionSet,
    image_root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    pairs: int = 100,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Page:
    """Writes a page with pairs of captions and, beside it, its key.

    Images and their order depend on the seed and their paths; each set stands left in half of the pairs.
    With the same arguments the same page comes out, so that more raters can be asked later.

    Args:
      first: a set.
      second: another set.
      image_root: where the images are.
      output: the page, an `.html`; its key is named like it, `.key.json`.
      pairs: how many, at most.
      seed: of the images, their order and the sides.
      progress: wraps the iteration over images.

    Raises:
      ValueError: there is no pair, or an image of one is bad.
      OSError: an image can't be read.
    """
    rows = common_rows(first, second)
    orders = [ranked(of.table, at, seed) for of, at in zip((first, second), rows, strict=True)]
    different = first.table["text"][orders[0]] != second.table["text"][orders[1]]
    chosen = [order[different][:pairs].tolist() for order in orders]
    if not chosen[0]:
        raise ValueError(f"{first.name} and {second.name}: no image with two different captions")
    captions = [fetch(of, at) for of, at in zip((first, second), chosen, strict=True)]
    count = len(chosen[0])
    left = [i % 2 for i in range(count)]
    random.Random(f"sides {seed}").shuffle(left)
    shown, images = [], []
    for index in progress(range(count)):
        both = [of[at[index]] for of, at in zip(captions, chosen, strict=True)]
        images.append(both[0].image)
        shown.append(
            {
                "image": data_uri(thumbnail(image_root, both[0].image, _SIDE)),
                "left": both[left[index]].text,
                "right": both[1 - left[index]].text,
            }
        )
    name = hashlib.sha256(json.dumps([shown, left]).encode()).hexdigest()[:16]
    page = pathlib.Path(output)
    key = page.with_suffix(".key.json")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_render(name, shown), encoding="utf-8")
    about = {"page": name, "names": [first.name, second.name], "seed": seed, "left": left, "images": images}
    key.write_text(json.dumps(about, indent=1) + "\n")
    return Page(page, key, count, int((~different).sum()))


def _render(name: str, shown: Sequence[dict[str, str]]) -> str:
    pairs = "".join(_pair(index, **pair) for index, pair in enumerate(shown))
    script = importlib.resources.files("sg4v_jax.caption.report").joinpath("preference.js").read_text("utf-8")
    body = f'{_HEAD}<form name=ballot data-page="{escape(name)}" autocomplete=off>{pairs}{_FOOT}</form>'
    return document("Which caption is better?", body, style=_STYLE, script=script)


def _pair(index: int, image: str, left: str, right: str) -> str:
    """A pair as the part of a form: what is checked in it is the vote, under the pair's number."""
    choices = "".join(
        f'<label><input type=radio name={index} value={value} data-keys="{keys}">{label}</label>'
        for value, keys, label in _CHOICES
    )
    return (
        f'<fieldset hidden><img src="{escape(image)}" alt="the image to describe">'
        f"<p>{escape(left)}</p><p>{escape(right)}</p><div class=choices>{choices}</div></fieldset>\n"
    )
