"""Scene graphs: what is in a picture of the world, before it is drawn or described."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

SHAPES = ("square", "bar", "triangle", "pole", "cross", "ring")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
# Disjoint from COLORS, so that a colour word says what it belongs to.
BACKGROUNDS = ("gray", "beige", "teal", "navy")
PATTERNS = ("plain", "checkered", "shaded")
# Row-major names of the cells of the grid. Four large cells, because a thing that fills a quarter of
# the picture is found within minutes by a model that starts from nothing; one in a 3x3 grid is not.
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
GRID = 2
MAX_THINGS = 3
# Drawn uniformly: two things in half of the scenes, one or three in a quarter each.
_COUNTS = (1, 2, 2, 3)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One coloured shape in one cell of the grid.

    Attributes:
      shape: One of `SHAPES`; also the name by which captions refer to the thing.
      color: One of `COLORS`.
      size: One of `SIZES`.
      texture: One of `TEXTURES`.
      column: 0 (left) or 1 (right).
      row: 0 (top) or 1 (bottom).

    Raises:
      ValueError: A value is outside the vocabulary or the grid.
    """

    shape: str
    color: str
    size: str
    texture: str
    column: int
    row: int

    def __post_init__(self) -> None:
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, SIZES)
        _check("texture", self.texture, TEXTURES)
        _check("column", self.column, range(GRID))
        _check("row", self.row, range(GRID))

    @property
    def position(self) -> str:
        """The name of the thing's cell, one of `POSITIONS`."""
        return POSITIONS[GRID * self.row + self.column]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background and one to three things; equal scenes look and read the same.

    Attributes:
      background: One of `BACKGROUNDS`.
      pattern: One of `PATTERNS`, drawn over the background.
      things: The things, always kept in reading order (top to bottom, left to right).

    Raises:
      ValueError: A word is unknown, the count is outside 1..3, or two things share a
        shape or a cell.
    """

    background: str
    pattern: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        _check("pattern", self.pattern, PATTERNS)
        ordered = tuple(sorted(self.things, key=lambda thing: (thing.row, thing.column)))
        object.__setattr__(self, "things", ordered)
        if not 1 <= len(ordered) <= MAX_THINGS:
            raise ValueError(f"a scene holds 1 to {MAX_THINGS} things, not {len(ordered)}")
        if len({thing.shape for thing in ordered}) < len(ordered):
            raise ValueError(f"two things share a shape: {[thing.shape for thing in ordered]}")
        if len({thing.position for thing in ordered}) < len(ordered):
            raise ValueError(f"two things share a cell: {[thing.position for thing in ordered]}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the scene as JSON-ready dictionaries; the inverse of `from_dict`."""
        return {
            "background": self.background,
            "pattern": self.pattern,
            "things": [dataclasses.asdict(thing) for thing in self.things],
        }

    def fingerprint(self) -> int:
        """Returns 32 bits that depend on the scene alone: a seed for what follows from it."""
        return zlib.crc32(json.dumps(self.to_dict(), sort_keys=True).encode())

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scene:
        """Builds a scene from what `to_dict` returned.

        Args:
          fields: The mapping, for example one entry of `heldout_scenes.json`.

        Returns:
          The scene, equal to the one that was written.

        Raises:
          KeyError, TypeError: A field is missing or unknown.
          ValueError: A value is outside the vocabulary.
        """
        things = tuple(Thing(**thing) for thing in fields["things"])
        return cls(fields["background"], fields["pattern"], things)


class Dice:
    """Reproducible draws from a seed.

    Built on the raw stream of Philox alone: NumPy promises to keep that stream for ever,
    which it does not for `Generator.choice` or `Generator.permutation`.
    """

    def __init__(self, *seed: int):
        """Seeds the dice with one or more non-negative integers of any size."""
        self._bits = np.random.Philox(np.random.SeedSequence(list(seed)))

    def below(self, bound: int) -> int:
        """Returns a uniform integer in [0, bound)."""
        return int(self._bits.random_raw()) % bound

    def flip(self) -> bool:
        """Returns True half of the time."""
        return self.below(2) == 1

    def pick(self, items: Sequence[T]) -> T:
        """Returns one item, uniformly."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Returns `count` distinct items in random order; all of them makes a shuffle."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def sample_scene(seed: int) -> Scene:
    """Draws a scene; the same seed gives the same scene on every platform.

    Args:
      seed: A non-negative integer of any size.

    Returns:
      A scene with one to three things of distinct shapes in distinct cells.
    """
    dice = Dice(seed)
    count = dice.pick(_COUNTS)
    shapes = dice.sample(SHAPES, count)
    cells = dice.sample(range(GRID * GRID), count)
    things = [
        Thing(
            shape=shape,
            color=dice.pick(COLORS),
            size=dice.pick(SIZES),
            texture=dice.pick(TEXTURES),
            column=cell % GRID,
            row=cell // GRID,
        )
        for shape, cell in zip(shapes, cells, strict=True)
    ]
    return Scene(dice.pick(BACKGROUNDS), dice.pick(PATTERNS), tuple(things))


def _check(field: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; expected one of {list(allowed)}")
