"""Draws scenes. Stickers and backgrounds are drawn once, so a scene costs a few pastes."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sg4v_jax.world.scene import GRID, Dice, Scene

RGB = tuple[int, int, int]

_COLORS: dict[str, RGB] = {
    "red": (226, 44, 44),
    "orange": (255, 134, 20),
    "yellow": (252, 208, 22),
    "green": (38, 166, 74),
    "blue": (38, 108, 236),
    "purple": (156, 52, 204),
}
_BACKGROUNDS: dict[str, RGB] = {
    "gray": (158, 163, 170),
    "beige": (230, 214, 182),
    "teal": (66, 124, 126),
    "navy": (40, 50, 92),
}
_DIAMETER = {"small": 0.72, "large": 0.98}  # of a cell, outline included
_JITTER = 0.03  # of a cell, at most; less where the thing leaves less room
_OUTLINE = 0.07  # of the thing
_PERIOD = {"small": 0.2, "large": 0.26}  # of a cell; at 64 px a small thing's is 6 pixels
_SUPERSAMPLE = 4
_DARKEN = 0.2
_TINT = 0.25


def render(scene: Scene, size: int = 224) -> Image.Image:
    """Draws a scene.

    Args:
      scene: What to draw.
      size: Side of the square picture in pixels, at least 64.

    Returns:
      A new RGB image; the same scene and size always give the same pixels.

    Raises:
      ValueError: The size is too small to draw in.
    """
    if size < 64:
        raise ValueError(f"size is {size}; a picture needs at least 64 pixels a side")
    picture = _background(scene.background, scene.pattern, size).copy()
    for thing, (left, top, _, _) in zip(scene.things, boxes(scene, size), strict=True):
        sticker = _sticker(thing.shape, thing.color, thing.size, thing.texture, size)
        picture.paste(sticker, (left, top), sticker)
    return picture


def boxes(scene: Scene, size: int = 224) -> list[tuple[int, int, int, int]]:
    """Returns where `render` puts each thing.

    Args:
      scene: The scene.
      size: Side of the picture in pixels.

    Returns:
      One (left, top, right, bottom) in pixels per thing, in the scene's order; each lies
      inside its own cell of the grid.
    """
    # The jitter is a function of the scene graph, so that equal scenes are equal pictures.
    dice = Dice(scene.fingerprint())
    cell = size / GRID
    placed = []
    for thing in scene.things:
        side = _side(thing.size, size)
        reach = max(0.0, min(_JITTER * cell, (cell - side) / 2) - 0.5)
        # The half pixel leaves room for the rounding below, which must not leave the cell.
        left, top = (
            round(cell * (index + 0.5) - side / 2 + reach * (dice.below(2001) / 1000 - 1))
            for index in (thing.column, thing.row)
        )
        placed.append((left, top, left + side, top + side))
    return placed


def _side(thing_size: str, size: int) -> int:
    return round(_DIAMETER[thing_size] * size / GRID)


@functools.lru_cache(maxsize=64)
def _background(color: str, pattern: str, size: int) -> Image.Image:
    """Draws a background; `pattern` changes its brightness by up to a third."""
    y, x = np.mgrid[0:size, 0:size] / size
    if pattern == "checkered":
        # Six squares a side: a third of a cell each, eleven pixels at 64.
        light = np.where((np.floor(6 * x) + np.floor(6 * y)) % 2, 1.11, 0.87)
    elif pattern == "shaded":
        light = 1.12 - 0.45 * y
    else:
        light = np.ones_like(y)
    pixels = np.asarray(_BACKGROUNDS[color]) * light[..., None]
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")


@functools.lru_cache(maxsize=1024)
def _sticker(shape: str, color: str, thing_size: str, texture: str, size: int) -> Image.Image:
    """Draws one thing on a transparent square, anti-aliased by supersampling."""
    cell = size / GRID * _SUPERSAMPLE
    side = _side(thing_size, size) * _SUPERSAMPLE
    outline = _OUTLINE * side
    mask = _mask(shape, side, margin=outline)
    body = np.asarray(mask) > 127
    # Cutting a blurred mask low grows it by about one outline, with rounded corners; cutting it
    # high shrinks it.
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(outline)))
    whole, core = blurred > 48, blurred > 216

    fill = np.asarray(_COLORS[color])
    dark = np.rint(fill * _DARKEN).astype(np.uint8)
    pixels = np.empty((side, side, 4), np.uint8)
    pixels[..., :3] = dark
    pixels[body, :3] = fill
    marks = _marks(texture, side, _PERIOD[thing_size] * cell)
    if texture == "striped":
        # Tinted, not white: stripes must not be stronger than the outline that shows the shape.
        pixels[body & marks, :3] = np.rint(255 - (255 - fill) * _TINT).astype(np.uint8)
    else:
        # Dark dots that ran into the dark outline would change the shape.
        pixels[core & marks, :3] = dark
    pixels[..., 3] = whole * np.uint8(255)
    return Image.fromarray(pixels, "RGBA").reduce(_SUPERSAMPLE)


def _marks(texture: str, side: int, period: float) -> np.ndarray:
    """Returns which pixels of a `side` x `side` square the texture marks, as bool[side, side]."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5 - side / 2) / period
    if texture == "striped":
        marked = np.mod((x + y) / math.sqrt(2) + 0.25, 1) < 0.5
    elif texture == "dotted":
        # Every other row is shifted by half a period, as on printed cloth.
        row = np.floor(y + 0.5)
        marked = np.hypot(np.mod(x + np.mod(row, 2) / 2 + 0.5, 1) - 0.5, y - row) < 0.29
    else:
        marked = np.zeros((side, side), bool)
    return np.asarray(marked)


def _mask(shape: str, side: int, margin: float) -> Image.Image:
    """Draws the body of a shape in white on black, `margin` away from the square's edge."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    middle, radius = side / 2, side / 2 - margin

    def circle(scale: float, fill: int) -> None:
        reach = radius * scale
        draw.ellipse((middle - reach, middle - reach, middle + reach, middle + reach), fill=fill)

    def polygon(*points: tuple[float, float]) -> None:
        draw.polygon([(middle + radius * x, middle + radius * y) for x, y in points], fill=255)

    if shape == "ring":
        circle(1.0, 255)
        circle(0.56, 0)
    elif shape == "square":
        polygon((-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92))
    elif shape == "bar":
        polygon((-1, -0.36), (1, -0.36), (1, 0.36), (-1, 0.36))
    elif shape == "pole":
        polygon((-0.36, -1), (0.36, -1), (0.36, 1), (-0.36, 1))
    elif shape == "triangle":
        polygon((0, -0.92), (1, 0.84), (-1, 0.84))
    else:  # cross
        polygon((-0.34, -1), (0.34, -1), (0.34, 1), (-0.34, 1))
        polygon((-1, -0.34), (1, -0.34), (1, 0.34), (-1, 0.34))
    return mask
