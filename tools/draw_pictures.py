"""Draw assets/test_image.jpg and assets/cat_in_hat.png, which the original repository's examples begin with.

    python tools/draw_pictures.py

A bear with a balalaika, and a cat in a hat: the original's are photographs, and no part of this repository.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SIZE = (960, 640)
FINER = 3  # drawn so many times larger, for smooth edges

BROWN, DARK, LIGHT, BLACK = "#7a4a26", "#5c351a", "#c89b6c", "#1d1410"
WOOD, STRING, RED, ORANGE = "#b5651d", "#f2e3c2", "#b3202a", "#e08b32"


class Pen:
    """Draws in units of SIZE."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (SIZE[0] * FINER, SIZE[1] * FINER))
        self.draw = ImageDraw.Draw(self.image)

    def sky_and_meadow(self, top: tuple[int, int, int], meadow: str, horizon: int) -> None:
        for y in range(self.image.height):
            share = y / self.image.height
            colour = tuple(round(c + (255 - c) * share) for c in top)
            self.draw.line([(0, y), (self.image.width, y)], fill=colour)
        self.ellipse(480, horizon + 500, 1100, 500, meadow)
        self.ellipse(840, 90, 55, 55, "#fff3b0")

    def ellipse(self, x: float, y: float, across: float, down: float, colour: str) -> None:
        """By its centre and its two radii."""
        box = [v * FINER for v in (x - across, y - down, x + across, y + down)]
        self.draw.ellipse(box, fill=colour)

    def polygon(self, *points: tuple[float, float], colour: str) -> None:
        self.draw.polygon([(x * FINER, y * FINER) for x, y in points], fill=colour)

    def line(self, *points: tuple[float, float], colour: str, width: float) -> None:
        thick = round(width * FINER)
        self.draw.line([(x * FINER, y * FINER) for x, y in points], fill=colour, width=thick, joint="curve")
        for x, y in points:
            self.ellipse(x, y, width / 2, width / 2, colour)

    def finished(self) -> Image.Image:
        return self.image.resize(SIZE, Image.Resampling.LANCZOS)


def bear_with_balalaika() -> Image.Image:
    pen = Pen()
    pen.sky_and_meadow((120, 180, 235), "#6fa34a", 430)
    for side in (-1, 1):
        pen.ellipse(470 + 75 * side, 575, 65, 40, DARK)  # feet
        pen.ellipse(470 + 68 * side, 118, 36, 36, BROWN)  # ears
        pen.ellipse(470 + 68 * side, 120, 19, 19, LIGHT)
    pen.ellipse(470, 430, 150, 170, BROWN)
    pen.ellipse(470, 445, 100, 125, LIGHT)
    pen.ellipse(470, 200, 110, 100, BROWN)
    pen.ellipse(470, 235, 52, 42, LIGHT)
    pen.ellipse(470, 216, 17, 12, BLACK)
    pen.line((470, 228), (470, 250), colour=BLACK, width=4)
    for side in (-1, 1):
        pen.ellipse(470 + 40 * side, 180, 11, 13, BLACK)
        pen.ellipse(470 + 40 * side + 4, 175, 3, 3, "white")
    pen.polygon(
        (455, 400), (330, 520), (545, 545), colour=WOOD
    )  # the body of the balalaika, its neck and three strings
    pen.line((455, 440), (690, 265), colour=DARK, width=15)
    pen.line((690, 265), (725, 238), colour=DARK, width=26)
    pen.ellipse(448, 480, 17, 17, BLACK)
    for shift in (-4, 0, 4):
        pen.line((410 + shift, 505 + shift), (715 + shift, 245 + shift), colour=STRING, width=1.5)
    pen.line((345, 370), (355, 440), (435, 490), colour=BROWN, width=52)  # arms, over it
    pen.line((590, 370), (640, 370), (630, 312), colour=BROWN, width=50)
    return pen.finished()


def cat_in_hat() -> Image.Image:
    pen = Pen()
    pen.sky_and_meadow((250, 214, 190), "#c7b299", 470)
    pen.ellipse(480, 590, 190, 170, ORANGE)
    pen.ellipse(480, 620, 95, 120, "#f7e4cc")
    for side in (-1, 1):
        pen.polygon((480 + 150 * side, 200), (480 + 145 * side, 340), (480 + 50 * side, 260), colour=ORANGE)
    pen.ellipse(480, 360, 160, 130, ORANGE)
    for side in (-1, 1):
        pen.ellipse(480 + 62 * side, 345, 27, 31, "#d8e86b")
        pen.ellipse(480 + 62 * side, 347, 9, 26, BLACK)
        for lift in (-12, 4, 20):
            pen.line((480 + 45 * side, 415), (480 + 190 * side, 405 + lift), colour="white", width=3)
    pen.polygon((464, 390), (496, 390), (480, 408), colour="#d97a7a")
    pen.line((445, 430), (480, 418), (515, 430), colour=BLACK, width=4)
    pen.ellipse(480, 248, 175, 34, RED)  # the hat: brim, crown and ribbon
    pen.polygon((385, 245), (400, 90), (560, 90), (575, 245), colour=RED)
    pen.ellipse(480, 90, 80, 18, "#cf3a44")
    pen.polygon((387, 225), (391, 190), (569, 190), (573, 225), colour="#2b2b3a")
    return pen.finished()


def main() -> None:
    bear_with_balalaika().save(ASSETS / "test_image.jpg", quality=90)
    cat_in_hat().save(ASSETS / "cat_in_hat.png", optimize=True)


if __name__ == "__main__":
    main()
