"""The small world: pictures of coloured shapes in six places, three or so objects a picture.

A picture is 48 x 48 pixels, nine cells of 16, at most one object a cell. A *place* (kitchen, beach, …) shows only as
the two bands of the background. Every place has a *habit*. In four of them it is an object that is often there, as a
kitchen has a stove; in the other two it is what colour a shape is thought to have. A model that is taught careless
captions learns the habit instead of the picture: it names the object where it is not, or the colour that is
not: the over-generalisation that RLHF-V measures (arXiv 2312.00849, section 4.3), in the small.

Everything follows from a seed, and a scene can be drawn at any scale. Not covered: overlap, perspective, counting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 48  # pixels a side
GRID = 3  # cells a side
CELL = SIZE // GRID
OVERSAMPLE = 4  # drawn this much larger, then averaged down

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 48, 44),
    "green": (38, 146, 62),
    "blue": (42, 82, 200),
    "yellow": (240, 208, 48),
    "white": (250, 250, 248),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
# (upper band, lower band), muted so that every object stands out.
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "kitchen": ((206, 188, 166), (150, 124, 102)),
    "beach": ((154, 194, 216), (216, 200, 158)),
    "forest": ((120, 152, 126), (82, 104, 74)),
    "street": ((176, 178, 186), (108, 110, 118)),
    "bedroom": ((192, 174, 198), (140, 118, 142)),
    "field": ((172, 202, 222), (138, 170, 104)),
}


@dataclass(frozen=True, order=True)
class Kind:
    """What a caption can name: a colour and a shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


KINDS: tuple[Kind, ...] = tuple(Kind(colour, shape) for colour in COLOURS for shape in SHAPES)
HABITS: dict[str, Kind] = {
    "kitchen": Kind("red", "circle"),
    "beach": Kind("yellow", "triangle"),
    "forest": Kind("white", "cross"),
    "street": Kind("blue", "square"),
}
COLOUR_HABITS: dict[str, Kind] = {
    "bedroom": Kind("white", "square"),  # any square in a bedroom is called white
    "field": Kind("yellow", "cross"),
}
HABIT_PRESENT = 0.30  # how often the habit is truly there, in its own place
OBJECT_COUNTS = (1, 2, 2, 3, 3, 4)  # drawn evenly


@dataclass(frozen=True)
class Thing:
    """One object: its kind, its cell (0 … 8, in reading order), and where and how large it is, in pixels."""

    kind: Kind
    cell: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `things` are in reading order, no kind twice."""

    place: str
    things: tuple[Thing, ...]
    horizon: float  # share of the height that the upper band takes
    tint: tuple[int, int, int]  # added to both bands

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(thing.kind for thing in self.things)

    @property
    def temptation(self) -> Kind | None:
        """The kind that a careless model names although it is not in this picture, if the place tempts it to."""
        habit = HABITS.get(self.place) or COLOUR_HABITS[self.place]
        if habit in self.kinds:
            return None
        if self.place in COLOUR_HABITS and habit.shape not in [kind.shape for kind in self.kinds]:
            return None
        return habit


def make_scenes(count: int, *, seed: int) -> list[Scene]:
    """`count` scenes; the first n of a seed are the same whatever `count` is."""
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    rng = np.random.default_rng(seed)
    return [_make_scene(rng) for _ in range(count)]


def _make_scene(rng: np.random.Generator) -> Scene:
    place = list(PLACES)[rng.integers(len(PLACES))]
    habit = HABITS.get(place)
    count = OBJECT_COUNTS[rng.integers(len(OBJECT_COUNTS))]
    others = [kind for kind in KINDS if kind != habit]
    kinds = [others[i] for i in rng.choice(len(others), size=count, replace=False)]
    if habit is not None and rng.random() < HABIT_PRESENT:
        kinds[rng.integers(count)] = habit
    cells = sorted(rng.choice(GRID * GRID, size=count, replace=False).tolist())
    things = []
    for kind, cell in zip(kinds, cells, strict=True):
        dx, dy = rng.uniform(-1.5, 1.5, size=2)
        x = (cell % GRID + 0.5) * CELL + dx
        y = (cell // GRID + 0.5) * CELL + dy
        things.append(Thing(kind, cell, float(x), float(y), float(rng.uniform(5.0, 6.6))))
    tint = rng.integers(-8, 9, size=3)
    return Scene(place, tuple(things), float(rng.uniform(0.50, 0.65)), (int(tint[0]), int(tint[1]), int(tint[2])))


def draw(scene: Scene, *, scale: int = 1) -> Image:
    """The picture, RGB, 48·scale pixels a side. The model sees scale 1; a page for people looks better at 4."""
    from PIL import Image, ImageDraw

    zoom = OVERSAMPLE * scale
    side = SIZE * zoom
    upper, lower = PLACES[scene.place]
    image = Image.new("RGB", (side, side), _tinted(lower, scene.tint))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, side, round(scene.horizon * side) - 1), fill=_tinted(upper, scene.tint))
    for thing in scene.things:
        colour = COLOURS[thing.kind.colour]
        if thing.kind.shape == "circle":
            x, y, r = (zoom * v for v in (thing.x, thing.y, thing.radius))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        else:
            pen.polygon([(x * zoom, y * zoom) for x, y in _outline(thing)], fill=colour)
    return image.resize((SIZE * scale, SIZE * scale), Image.Resampling.BOX)


def pixels(scenes: list[Scene]) -> np.ndarray:
    """The pictures of many scenes as bytes, [count, 3, 48, 48] uint8."""
    if not scenes:
        return np.empty((0, 3, SIZE, SIZE), dtype=np.uint8)
    return np.stack([np.asarray(draw(scene)).transpose(2, 0, 1) for scene in scenes])


def _tinted(colour: tuple[int, int, int], tint: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(min(255, max(0, c + t)) for c, t in zip(colour, tint, strict=True))  # type: ignore[return-value]


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a shape in pixels. The shapes differ in area and edge, so that 16 pixels are enough to tell them."""
    x, y, r = thing.x, thing.y, thing.radius
    arm = r * 0.36
    corners = {
        "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
        "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
        "diamond": [(0.0, -1.05), (0.8, 0.0), (0.0, 1.05), (-0.8, 0.0)],
    }
    if thing.kind.shape == "cross":
        turn = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
        turn += [(arm, r), (-arm, r), (-arm, arm), (-r, arm), (-r, -arm), (-arm, -arm)]
        return [(x + dx, y + dy) for dx, dy in turn]
    return [(x + dx * r, y + dy * r) for dx, dy in corners[thing.kind.shape]]
