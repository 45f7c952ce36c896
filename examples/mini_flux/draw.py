"""Draws captioned pictures of coloured shapes, for the miniature Flux and whoever wants to teach it more.

    python examples/mini_flux/draw.py --out DIR --count N --seed S [--shapes star]

writes DIR/00001.png and DIR/00001.txt, DIR/00002.png ...: the same files for the same seed.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from math import cos, pi, sin
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

SIZE = 64
# The picture is drawn this many times larger and then averaged down: smooth edges.
OVERSAMPLING = 8

Colour = tuple[int, int, int]
Outline = list[tuple[float, float]]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "orange": (240, 140, 40),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "cyan": (120, 220, 230),
}


def _ring(corners: int, inner: float = 1.0) -> Outline:
    """Corners on the unit circle, the first one on top, every second one at the radius `inner`."""
    radii = [1.0 if corner % 2 == 0 else inner for corner in range(corners)]
    angles = [2 * pi * corner / corners for corner in range(corners)]
    return [(radius * sin(angle), -radius * cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


# Corners of each shape around (0, 0), x to the right and y downward, at radius 1.
SHAPES: dict[str, Callable[[], Outline]] = {
    "circle": lambda: _ring(120),
    "square": lambda: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": lambda: [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": lambda: _ring(10, inner=0.42),
}
# What the miniature Flux is taught. A star it has to learn from an adapter.
TAUGHT_SHAPES = ("circle", "square", "triangle")


def draw(shape: str, colour: str, background: str, random: Random) -> Image.Image:
    """A picture of 64x64 pixels; `random` gives the size and the place of the shape."""
    scale = OVERSAMPLING
    radius = random.uniform(15, 22) * scale
    x, y = (random.uniform(27, 37) * scale for _ in range(2))
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[background])
    outline = [(x + radius * dx, y + radius * dy) for dx, dy in SHAPES[shape]()]
    ImageDraw.Draw(canvas).polygon(outline, fill=COLOURS[colour])
    return canvas.reduce(scale)


def caption(shape: str, colour: str, background: str) -> str:
    """The words for a picture: "a red circle on a white background"."""
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape} on a {background} background"


def captioned_pictures(
    count: int, seed: int, shapes: Sequence[str] = TAUGHT_SHAPES
) -> Iterator[tuple[Image.Image, str]]:
    """`count` pictures with captions; the first n of a seed are the same whatever the count."""
    random = Random(seed)
    for _ in range(count):
        words = random.choice(shapes), random.choice(list(COLOURS)), random.choice(list(BACKGROUNDS))
        yield draw(*words, random), caption(*words)


def main() -> None:
    parser = ArgumentParser(description="Draws captioned pictures of coloured shapes.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if it is missing")
    parser.add_argument("--count", type=int, required=True, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=TAUGHT_SHAPES,
        metavar="SHAPE",
        help=f"which of {', '.join(SHAPES)}; default: {', '.join(TAUGHT_SHAPES)}",
    )
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    pictures = captioned_pictures(options.count, options.seed, options.shapes)
    for number, (picture, words) in enumerate(pictures, start=1):
        picture.save(options.out / f"{number:05d}.png")
        (options.out / f"{number:05d}.txt").write_text(words + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
