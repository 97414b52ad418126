"""A procedural world of short captioned clips, and a measurement that reads the captions back from pixels.

One flat-coloured shape moves over one flat background: 4 shapes x 8 colours x 8 motions x 5 backgrounds = 1,280
combinations, a tenth of which is held out of training. Where the shape stands and how large it is varies a little and
is not in the caption. ``measure`` is written by hand and learns nothing, so a score it gives is a statement about the
pixels only. It assumes this world: one object, no rotation, a background that reaches the border of the frame.

The same world without motion gives pictures with captions (160 combinations, called looks) and edits of pictures: a
source, an instruction such as "make the circle blue" and a target in which only that has changed. Of both, a tenth is
held out as well.

Knows numpy and nothing else: no models, no tokenizers, no video files. Lengths are fractions of the frame's side and
times are fractions of the clip, so the same scene can be drawn at any size and frame count. y points down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 160, 50),
    "blue": (40, 80, 235),
    "yellow": (250, 225, 40),
    "orange": (250, 130, 20),
    "purple": (150, 50, 210),
    "cyan": (40, 210, 220),
    "pink": (250, 140, 200),
}
# motion -> (as a verb, as a participle): the two ways the grammar needs it
MOTIONS: dict[str, tuple[str, str]] = {
    "left": ("moves left", "moving left"),
    "right": ("moves right", "moving right"),
    "up": ("moves up", "moving up"),
    "down": ("moves down", "moving down"),
    "grow": ("grows", "growing"),
    "shrink": ("shrinks", "shrinking"),
    "still": ("stays still", "staying still"),
    "bounce": ("bounces up and down", "bouncing up and down"),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "navy": (24, 32, 96),
    "brown": (96, 64, 32),
}
# The first form is the canonical caption. {a} is the article of the colour.
CAPTION_FORMS = (
    "{a} {colour} {shape} {verb} on a {background} background",
    "{a} {colour} {shape} {participle} against a {background} background",
    "on a {background} background, {a} {colour} {shape} {verb}",
    "{a} {colour} {shape}, {participle}, {background} background",
)
PICTURE_CAPTION_FORMS = (
    "{a} {colour} {shape} on a {background} background",
    "{a} {colour} {shape} against a {background} background",
    "on a {background} background, {a} {colour} {shape}",
    "{a} {colour} {shape}, {background} background",
)
# What an edit changes -> how to say it. {object} is what it changes, "the circle" or "the red circle".
INSTRUCTION_FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("colour",): (
        "make {object} {colour}",
        "turn {object} {colour}",
        "paint {object} {colour}",
        "change the colour of {object} to {colour}",
    ),
    ("shape",): (
        "turn {object} into a {shape}",
        "make {object} a {shape}",
        "change {object} into a {shape}",
        "change the shape of {object} to a {shape}",
    ),
    ("background",): (
        "make the background {background}",
        "turn the background {background}",
        "change the background to {background}",
        "put {object} on a {background} background",
    ),
    ("shape", "colour"): (
        "turn {object} into {a} {colour} {shape}",
        "make {object} {a} {colour} {shape}",
        "replace {object} with {a} {colour} {shape}",
        "make {object} {colour} and turn it into a {shape}",
    ),
    ("colour", "background"): (
        "make {object} {colour} and the background {background}",
        "turn {object} {colour} and change the background to {background}",
        "make the background {background} and {object} {colour}",
        "paint {object} {colour} and put it on a {background} background",
    ),
    ("shape", "background"): (
        "turn {object} into a {shape} and make the background {background}",
        "make {object} a {shape} and the background {background}",
        "make the background {background} and turn {object} into a {shape}",
        "change {object} into a {shape} on a {background} background",
    ),
    ("shape", "colour", "background"): (
        "turn {object} into {a} {colour} {shape} and make the background {background}",
        "make {object} {a} {colour} {shape} and the background {background}",
        "make the background {background} and turn {object} into {a} {colour} {shape}",
        "replace {object} with {a} {colour} {shape} on a {background} background",
    ),
}
EDIT_KINDS = tuple(INSTRUCTION_FORMS)

TRAVEL = 0.31  # how far a moving object goes in a clip: 40 px of 128
BOUNCE = 0.28  # how high a bouncing one rises before it comes back: 36 px of 128
GROWTH = (0.6, 1.4)  # radius of a growing object at the first and the last frame, relative to Scene.radius
RADIUS_RANGE = (0.175, 0.22)  # 22 to 28 px of 128; at these sizes every path stays inside the frame
JITTER = 0.04  # the middle of the path lies within this distance of the frame's middle, in x and in y
PICTURE_RADIUS_RANGE = (0.16, 0.24)  # pictures have no path to leave room for
PICTURE_JITTER = 0.08

TEST_FRACTION = 0.1
# Changing these makes checkpoints trained before it see held-out combinations.
_SPLIT_SEED = "tiny-world-1"
_LOOK_SPLIT_SEED = "tiny-world-looks-1"
_EDIT_SPLIT_SEED = "tiny-world-edits-1"


class Attributes(NamedTuple):
    """What a caption says, one name of SHAPES, COLOURS, MOTIONS and BACKGROUNDS each."""

    shape: str
    colour: str
    motion: str
    background: str


class Look(NamedTuple):
    """What a picture's caption says: attributes without motion."""

    shape: str
    colour: str
    background: str


Combination = TypeVar("Combination", Attributes, Look)


@dataclass(frozen=True)
class Scene:
    """One clip: the four attributes, and what the caption leaves open. A still one is also a picture.

    ``x``, ``y``: middle of the path, ``radius``: nominal size; all as fractions of the frame's side.
    """

    shape: str
    colour: str
    motion: str
    background: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.2

    def __post_init__(self) -> None:
        names = {"shape": SHAPES, "colour": tuple(COLOURS), "motion": tuple(MOTIONS), "background": tuple(BACKGROUNDS)}
        for name, allowed in names.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    @property
    def attributes(self) -> Attributes:
        return Attributes(self.shape, self.colour, self.motion, self.background)

    @property
    def look(self) -> Look:
        return Look(self.shape, self.colour, self.background)


# --- combinations and the held-out tenth -----------------------------------------------------------------------------


def all_combinations() -> tuple[Attributes, ...]:
    return tuple(Attributes(*names) for names in product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS))


def _hold_out(combinations: Sequence[Combination], seed: str) -> tuple[Combination, ...]:
    """A tenth of the combinations, in an order whose every prefix is balanced over all attribute values.

    Greedy: take the combination whose values were taken least so far, a hash decides between equals. So the first N
    are an even sample for any N.
    """
    remaining = sorted(combinations, key=lambda a: hashlib.sha256(repr((seed, *a)).encode()).digest())
    values_per_attribute = tuple(len(set(names)) for names in zip(*combinations, strict=True))
    taken: dict[tuple[int, str], int] = {}  # (which attribute, its value) -> times taken
    chosen: list[Combination] = []

    def times_taken(names: Combination) -> int:
        # in units of each attribute's fair share: one of 8 colours should come up half as often as one of 4 shapes
        return sum(taken.get(key, 0) * n for key, n in zip(enumerate(names), values_per_attribute, strict=True))

    for _ in range(round(TEST_FRACTION * len(remaining))):
        best = min(remaining, key=times_taken)
        remaining.remove(best)
        chosen.append(best)
        for key in enumerate(best):
            taken[key] = taken.get(key, 0) + 1
    return tuple(chosen)


@lru_cache(maxsize=1)
def test_combinations() -> tuple[Attributes, ...]:
    """The 128 held-out combinations, any first N of them balanced: in all, each shape is held out 32 times of 320,
    each colour and motion 16 times of 160."""
    return _hold_out(all_combinations(), _SPLIT_SEED)


test_combinations.__test__ = False  # type: ignore[attr-defined]  # the name looks like a test to pytest; it is none


@lru_cache(maxsize=1)
def train_combinations() -> tuple[Attributes, ...]:
    return tuple(a for a in all_combinations() if a not in _held_out())


@lru_cache(maxsize=1)
def _held_out() -> frozenset[Attributes]:
    return frozenset(test_combinations())


def split(scene: Scene | Attributes) -> str:
    """ "train" or "test"; depends on the four attributes only."""
    attributes = scene.attributes if isinstance(scene, Scene) else Attributes(*scene)
    return "test" if attributes in _held_out() else "train"


def scene_for(attributes: Attributes, rng: np.random.Generator) -> Scene:
    """A scene with these attributes, and place and size drawn from ``rng``."""
    x, y = 0.5 + rng.uniform(-JITTER, JITTER, size=2)
    return Scene(*attributes, x=float(x), y=float(y), radius=float(rng.uniform(*RADIUS_RANGE)))


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene of the "train" or the "test" split."""
    _check_split(split)
    combinations = train_combinations() if split == "train" else test_combinations()
    return scene_for(combinations[rng.integers(len(combinations))], rng)


# --- captions --------------------------------------------------------------------------------------------------------


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _write_caption(attributes: Attributes, form: str) -> str:
    verb, participle = MOTIONS[attributes.motion]
    return form.format(a=_article(attributes.colour), verb=verb, participle=participle, **attributes._asdict())


def _normalised(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def caption(scene: Scene | Attributes, rng: np.random.Generator | None = None) -> str:
    """The canonical caption, or with ``rng`` one of the four forms at random."""
    attributes = scene.attributes if isinstance(scene, Scene) else Attributes(*scene)
    form = CAPTION_FORMS[0] if rng is None else CAPTION_FORMS[rng.integers(len(CAPTION_FORMS))]
    return _write_caption(attributes, form)


@lru_cache(maxsize=1)
def _caption_table() -> dict[str, Attributes]:
    return {_write_caption(a, form): a for a in all_combinations() for form in CAPTION_FORMS}


def corpus() -> list[str]:
    """Every sentence of the grammar (5,120 of them)."""
    return list(_caption_table())


def parse_caption(text: str) -> Attributes:
    """The attributes that ``text`` names. Case, spacing and a final full stop do not matter; other wordings do."""
    key = _normalised(text)
    if key not in _caption_table():
        raise ValueError(f"not a caption of the tiny world: {text!r}; write it like {corpus()[0]!r}")
    return _caption_table()[key]


# --- pictures --------------------------------------------------------------------------------------------------------


def all_looks() -> tuple[Look, ...]:
    return tuple(Look(*names) for names in product(SHAPES, COLOURS, BACKGROUNDS))


@lru_cache(maxsize=1)
def test_looks() -> tuple[Look, ...]:
    """The 16 looks held out of training with pictures, any first N of them balanced: each shape 4 times, each colour
    twice, each background 3 or 4 times. Clips of a look may have been trained on: clips have a split of their own."""
    return _hold_out(all_looks(), _LOOK_SPLIT_SEED)


test_looks.__test__ = False  # type: ignore[attr-defined]  # no test either


@lru_cache(maxsize=1)
def train_looks() -> tuple[Look, ...]:
    held_out = frozenset(test_looks())
    return tuple(look for look in all_looks() if look not in held_out)


def picture_for(look: Look, rng: np.random.Generator) -> Scene:
    """A still scene with this look, and place and size drawn from ``rng``: from wider ranges than those of clips."""
    x, y = 0.5 + rng.uniform(-PICTURE_JITTER, PICTURE_JITTER, size=2)
    radius = float(rng.uniform(*PICTURE_RADIUS_RANGE))
    return Scene(look.shape, look.colour, "still", look.background, float(x), float(y), radius)


def sample_picture(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random picture of the "train" or the "test" split of the looks."""
    _check_split(split)
    looks = train_looks() if split == "train" else test_looks()
    return picture_for(looks[rng.integers(len(looks))], rng)


def _write_picture_caption(look: Look, form: str) -> str:
    return form.format(a=_article(look.colour), **look._asdict())


def picture_caption(scene: Scene | Look, rng: np.random.Generator | None = None) -> str:
    """The canonical caption, or with ``rng`` one of the four forms at random. It says nothing of motion."""
    look = scene.look if isinstance(scene, Scene) else Look(*scene)
    form = PICTURE_CAPTION_FORMS[0 if rng is None else rng.integers(len(PICTURE_CAPTION_FORMS))]
    return _write_picture_caption(look, form)


@lru_cache(maxsize=1)
def _picture_caption_table() -> dict[str, Look]:
    return {_write_picture_caption(look, form): look for look in all_looks() for form in PICTURE_CAPTION_FORMS}


def picture_corpus() -> list[str]:
    """Every caption of a picture (640 of them)."""
    return list(_picture_caption_table())


def parse_picture_caption(text: str) -> Look:
    """The look that ``text`` names, as ``parse_caption`` does for clips."""
    key = _normalised(text)
    if key not in _picture_caption_table():
        raise ValueError(f"not a picture's caption: {text!r}; write it like {picture_corpus()[0]!r}")
    return _picture_caption_table()[key]


# --- edits -----------------------------------------------------------------------------------------------------------


class Mention(NamedTuple):
    """Some of a look by name; None where nothing is said."""

    shape: str | None = None
    colour: str | None = None
    background: str | None = None


def edit_kind(source: Look, target: Look) -> tuple[str, ...]:
    """The names of what differs, one of EDIT_KINDS. Raises ValueError where nothing does."""
    changed = tuple(name for name, a, b in zip(Look._fields, source, target, strict=True) if a != b)
    if not changed:
        raise ValueError(f"source and target are both {source}; an edit changes something")
    return changed


def edit_split(source: Look, target: Look) -> str:
    """ "train" or "test": depends on what the picture shows before and after, not on wording, place or size."""
    digest = hashlib.sha256(repr((_EDIT_SPLIT_SEED, *source, *target)).encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_FRACTION * 2**32 else "train"


@lru_cache(maxsize=1)
def _edits() -> dict[tuple[tuple[str, ...], str], list[tuple[Look, Look]]]:
    """(kind, split) -> its pairs of source and target; 160 x 159 in all."""
    pairs: dict[tuple[tuple[str, ...], str], list[tuple[Look, Look]]] = {
        (kind, split): [] for kind in EDIT_KINDS for split in ("train", "test")
    }
    for source, target in product(all_looks(), repeat=2):
        if source != target:
            pairs[edit_kind(source, target), edit_split(source, target)].append((source, target))
    return pairs


def edits(split: str, kind: tuple[str, ...]) -> tuple[tuple[Look, Look], ...]:
    """Every pair of source and target of the "train" or the "test" split that differ in just what ``kind`` names."""
    _check_split(split)
    return tuple(_edits()[kind, split])


def _write_instruction(source: Look, target: Look, form: str, say_colour: bool) -> str:
    thing = f"the {source.colour} {source.shape}" if say_colour else f"the {source.shape}"
    return form.format(object=thing, a=_article(target.colour), **target._asdict())


def instruction(source: Look, target: Look, rng: np.random.Generator | None = None) -> str:
    """The canonical instruction that turns the one into the other, or with ``rng`` one of its wordings at random."""
    forms = INSTRUCTION_FORMS[edit_kind(source, target)]
    if rng is None:
        return _write_instruction(source, target, forms[0], say_colour=False)
    return _write_instruction(source, target, forms[rng.integers(len(forms))], say_colour=bool(rng.integers(2)))


def sample_edit(
    rng: np.random.Generator, split: str = "train", kind: tuple[str, ...] | None = None
) -> tuple[Scene, str, Scene]:
    """A random source picture, instruction and target picture; every kind of edit is equally likely.

    The target stands where the source stands and has its size. No pair of looks is in both splits.
    """
    _check_split(split)
    pairs = _edits()[EDIT_KINDS[rng.integers(len(EDIT_KINDS))] if kind is None else kind, split]
    source_look, target_look = pairs[rng.integers(len(pairs))]
    source = picture_for(source_look, rng)
    return source, instruction(source_look, target_look, rng), replace(source, **target_look._asdict())


@lru_cache(maxsize=1)
def _instruction_table() -> dict[str, tuple[Mention, Mention]]:
    table: dict[str, tuple[Mention, Mention]] = {}
    # Backgrounds before the edit are never said, so two of them lead to every sentence.
    looks = all_looks()
    sources = [look for look in looks if look.background in ("white", "black")]
    for source, target in product(sources, looks):
        if source == target:
            continue
        kind = edit_kind(source, target)
        after = Mention(**{name: getattr(target, name) for name in kind})
        for form, say_colour in product(INSTRUCTION_FORMS[kind], (False, True)):
            before = Mention(source.shape, source.colour if say_colour else None)
            text = _write_instruction(source, target, form, say_colour)
            table[text] = (before if "{object}" in form else Mention(), after)
    return table


def instruction_corpus() -> list[str]:
    """Every instruction of the grammar."""
    return list(_instruction_table())


def parse_instruction(text: str) -> tuple[Mention, Mention]:
    """What ``text`` says of the picture before the edit, and of the picture after it. What the second leaves open
    stays as it was."""
    key = _normalised(text)
    if key not in _instruction_table():
        raise ValueError(f"not an instruction of the tiny world: {text!r}; write it like {instruction_corpus()[0]!r}")
    return _instruction_table()[key]


# --- drawing ---------------------------------------------------------------------------------------------------------


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Distance to the outline, negative inside; x and y from the shape's centroid. Broadcasts.

    The proportions make the four areas similar (circle 3.1, square 3.1, triangle 2.4, cross 2.9 radius²), so that size
    does not give the shape away. Outside a corner the distance is that to the nearer edge's line: exact enough for
    a one-pixel edge, and it keeps corners sharp.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.886 * radius
    if shape == "triangle":  # equilateral, point up; its three edges lie at the inradius from the centroid
        slanted = np.abs(x) * np.float32(0.8660254) - y * np.float32(0.5)
        return np.maximum(slanted, y) - 0.68 * radius
    assert shape == "cross"
    ax, ay = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(ax, ay) - 1.1 * radius, np.minimum(ax, ay) - 0.4 * radius)


def path(scene: Scene, num_frames: int, loop: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y and radius of the object at each frame, (num_frames,) each, as fractions of the side.

    loop: it goes half the way and back, and ends where it began; what bounces has the whole clip for its rise and fall
    in any case. It begins and ends slowly: what turns round at full speed jumps there, whoever draws it.
    """
    t = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.array([0.5])
    there_and_back = 0.5 - 0.5 * np.cos(2 * np.pi * t)
    rise = there_and_back if loop else np.sin(np.pi * t)
    if loop:
        t = there_and_back / 2
    still = np.zeros(num_frames)
    along = TRAVEL * (t - 0.5)
    dx = {"left": -along, "right": along}.get(scene.motion, still)
    dy = {"up": -along, "down": along, "bounce": BOUNCE * (0.5 - rise)}.get(scene.motion, still)
    first, last = GROWTH
    growing = first + (last - first) * t
    scale = {"grow": growing, "shrink": first + last - growing}.get(scene.motion, np.ones(num_frames))
    return scene.x + dx, scene.y + dy, scene.radius * scale


def render(scene: Scene, num_frames: int = 25, size: int = 128, loop: bool = False) -> np.ndarray:
    """Draws the clip: uint8 (num_frames, size, size, 3), RGB, with a one-pixel soft edge. The same scene gives the same
    bytes. A single frame shows the middle of the motion. A loop's last frame is its first."""
    if num_frames < 1 or size < 8:
        raise ValueError(f"num_frames={num_frames}, size={size}; a clip needs at least 1 frame and 8 pixels a side")
    cx, cy, radius = (v[:, None, None].astype(np.float32) * size for v in path(scene, num_frames, loop))
    pixels = np.arange(size, dtype=np.float32) + np.float32(0.5)
    distance = _signed_distance(scene.shape, pixels[None, None, :] - cx, pixels[None, :, None] - cy, radius)
    distance *= -255.0  # to coverage of the pixel in 1/255: full half a pixel inside, none half a pixel outside
    distance += 128.0
    coverage = np.clip(distance, 0, 255, out=distance).astype(np.uint8)  # (T, H, W)
    mix = np.linspace(0.0, 1.0, 256)[:, None]
    ends = np.array(BACKGROUNDS[scene.background]), np.array(COLOURS[scene.colour])
    palette = np.rint(ends[0] * (1 - mix) + ends[1] * mix).astype(np.uint8)  # (256, 3)
    frames = np.empty((*coverage.shape, 3), np.uint8)
    for channel in range(3):
        frames[..., channel] = palette[:, channel][coverage]
    return frames


def render_picture(scene: Scene, size: int = 128) -> np.ndarray:
    """Draws a still scene, or the middle of a moving one: uint8 (size, size, 3), RGB."""
    return render(scene, 1, size)[0]


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the pixels show. None: nothing that can be called by one of our names (no object, a mixed motion, ...)."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str | None
    diagnostics: dict[str, float] = field(default_factory=dict, compare=False)

    def overlap(self, shape: str) -> float | None:
        """Intersection over union with the best-fitting silhouette of that shape; None where no object was found."""
        return self.diagnostics.get(f"overlap_{shape}")

    def agrees(self, attributes: Attributes | Look) -> dict[str, bool]:
        return {name: getattr(self, name) == value for name, value in attributes._asdict().items()}


def measure(frames: np.ndarray) -> Measured:
    """Reads the attributes from uint8 frames (T, H, W, 3), H = W. Made for clips that are blurry and a little noisy.

    The object is what differs from the background's colour by more than half of what its own colour does. Motion is a
    least-squares fit to where its centre of mass and its area go; shape is the best overlap with drawn silhouettes.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; measure() takes uint8 (T, H, W, 3) with H = W")
    _, size = frames.shape[:2]
    border = max(1, size // 32)
    ring = np.concatenate(
        [part.reshape(-1, 3) for part in (frames[:, :border], frames[:, -border:])]
        + [part.reshape(-1, 3) for part in (frames[:, :, :border], frames[:, :, -border:])]
    )
    ground = np.median(ring, axis=0).astype(np.float32)
    background, ground_error = _nearest(ground, BACKGROUNDS)
    diagnostics = {"background_error": ground_error}
    if ground_error > 0.1:  # the two closest classes are 0.12 apart
        background = None

    difference = frames.astype(np.float32) - ground
    contrast = _box3(np.sqrt(np.einsum("thwc,thwc->thw", difference, difference)))  # (T, H, W)
    # The smallest object covers 6 % of the pixels of a clip: this percentile is a pixel well inside it.
    strength = float(np.percentile(contrast, 97.5))
    diagnostics["contrast"] = strength
    if strength < 40:  # the faintest colour on the faintest background is 100 away
        return Measured(None, None, None, background, diagnostics)
    mask = contrast > 0.5 * strength
    area = mask.sum(axis=(1, 2)) / size**2
    visible = area > 0.01
    diagnostics["visible"] = float(visible.mean())
    diagnostics["area"] = float(area.mean())
    if visible.mean() < 0.8 or area.mean() > 0.6:
        return Measured(None, None, None, background, diagnostics)

    colour, colour_error = _measure_colour(frames, mask, margin=max(1, size // 40))
    motion, motion_diagnostics = _measure_motion(mask, area, visible)
    shape, shape_diagnostics = _measure_shape(mask, area, visible)
    if len(frames) == 1:
        diagnostics |= _measure_place(mask[0], max(SHAPES, key=lambda name: shape_diagnostics[f"overlap_{name}"]))
    diagnostics |= {"colour_error": colour_error} | motion_diagnostics | shape_diagnostics
    return Measured(shape, colour, motion, background, diagnostics)


def measure_picture(picture: np.ndarray) -> Measured:
    """Reads shape, colour and background from one uint8 picture (H, W, 3), H = W; motion is None.

    Where there is an object, ``diagnostics`` also has where it stands and how large it is, as in ``Scene``: ``x``,
    ``y`` and ``radius``.
    """
    if picture.ndim != 3:
        raise ValueError(f"the picture has shape {picture.shape}; measure_picture() takes one of (H, W, 3)")
    return measure(picture[None])


def _box3(x: np.ndarray) -> np.ndarray:
    """3x3 mean over the last two axes, edges repeated."""
    for axis in (-2, -1):
        n = x.shape[axis]
        before = x.take(np.maximum(np.arange(n) - 1, 0), axis=axis)
        after = x.take(np.minimum(np.arange(n) + 1, n - 1), axis=axis)
        x = (before + x + after) / 3
    return x


def _oklab(rgb: np.ndarray | tuple[int, int, int]) -> np.ndarray:
    """sRGB in 0..255 to Oklab (Ottosson 2020): distances there are close to what an eye sees."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_cone = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_cone.T) @ to_lab.T


def _nearest(rgb: np.ndarray, classes: dict[str, tuple[int, int, int]]) -> tuple[str | None, float]:
    """The class closest in colour, and how far it is. Hue and chroma count in full, lightness half: a red that came
    out pale is a red, a black that came out dark gray is a black."""
    weights = np.array([0.5, 1.0, 1.0])
    distances = {name: float(np.linalg.norm(weights * (_oklab(rgb) - _oklab(c)))) for name, c in classes.items()}
    best = min(distances, key=lambda name: distances[name])
    return best, distances[best]


def _measure_colour(frames: np.ndarray, mask: np.ndarray, margin: int) -> tuple[str | None, float]:
    """Nearest colour to the median of the object's inside, away from its blurred edge."""
    inside = mask
    for _ in range(margin):
        padded = np.pad(inside, ((0, 0), (1, 1), (1, 1)))
        inside = inside & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    if inside.sum() < 0.1 * mask.sum():
        inside = mask
    name, error = _nearest(np.median(frames[inside], axis=0), COLOURS)
    return (name if error < 0.12 else None), error  # the two closest colours are 0.13 apart


def _measure_place(mask: np.ndarray, shape: str) -> dict[str, float]:
    """Centre of mass, and the radius of a ``shape`` with this area, as fractions of the side."""
    size = len(mask)
    rows, columns = np.nonzero(mask)
    x, y = (columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size
    return {"x": float(x), "y": float(y), "radius": float(np.sqrt(mask.mean() / _unit_area(shape)))}


def _measure_motion(mask: np.ndarray, area: np.ndarray, visible: np.ndarray) -> tuple[str | None, dict[str, float]]:
    """Fits x, y and log size by 1, t and an arc; the motion is the one coefficient that is large."""
    num_frames, size = mask.shape[:2]
    if num_frames < 5:
        return None, {}
    t = np.linspace(0.0, 1.0, num_frames)
    coordinate = (np.arange(size) + 0.5) / size
    count = np.maximum(mask.sum(axis=(1, 2)), 1)
    x = mask.sum(axis=1) @ coordinate / count  # (T,)
    y = mask.sum(axis=2) @ coordinate / count
    log_size = 0.5 * np.log(np.maximum(area, 1e-6))
    basis = np.stack([np.ones(num_frames), t - 0.5, np.sin(np.pi * t) - 2 / np.pi], axis=1)[visible]
    tracks = np.stack([x, y, log_size], axis=1)[visible]
    fit = np.linalg.lstsq(basis, tracks, rcond=None)[0]  # (3 basis, 3 tracks)
    unexplained = np.sqrt(((tracks - basis @ fit)[:, :2] ** 2).mean())
    # Each in units of what a clip of this world does: 1 is a full motion, 0 is none.
    moves = {
        "right": fit[1, 0] / TRAVEL,
        "down": fit[1, 1] / TRAVEL,
        "grow": fit[1, 2] / np.log(GROWTH[1] / GROWTH[0]),
        "bounce": -fit[2, 1] / BOUNCE,
        "sideways arc": fit[2, 0] / BOUNCE,  # nothing in this world does it: it can only spoil
    }
    diagnostics = {f"motion_{name.replace(' ', '_')}": float(value) for name, value in moves.items()}
    diagnostics["motion_residual"] = float(unexplained)
    ranked = sorted(moves, key=lambda name: -abs(moves[name]))
    first, second = (moves[name] for name in ranked[:2])
    if unexplained > 0.06:  # jumps about
        return None, diagnostics
    if abs(first) < 0.35:
        return "still", diagnostics
    if abs(second) > 0.6 * abs(first):  # two motions at once
        return None, diagnostics
    opposite = {"right": "left", "down": "up", "grow": "shrink"}
    motion = ranked[0] if first > 0 else opposite.get(ranked[0])
    return (motion if motion in MOTIONS else None), diagnostics


_GRID = 32  # a silhouette is compared at this many points a side ...
_EXTENT = 1.25  # ... over a square reaching this far from its centre of mass, in units of sqrt(area)


@lru_cache(maxsize=len(SHAPES))
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    fine = np.linspace(-2.5, 2.5, 400)
    return float((_signed_distance(shape, fine[None, :], fine[:, None], 1.0) < 0).mean() * 5.0**2)


@lru_cache(maxsize=1)
def _silhouettes() -> np.ndarray:
    """The four shapes at unit area in slightly different sizes and places: (4, variants, grid * grid) of 0 and 1."""
    axis = np.linspace(-_EXTENT, _EXTENT, _GRID)
    offsets = (-0.08, -0.04, 0.0, 0.04, 0.08)
    banks = []
    for shape in SHAPES:
        for scale, dx, dy in product((0.88, 0.94, 1.0, 1.06, 1.12), offsets, offsets):
            radius = scale / np.sqrt(_unit_area(shape))
            banks.append(_signed_distance(shape, axis[None, :] - dx, axis[:, None] - dy, radius) < 0)
    return np.array(banks, np.float32).reshape(len(SHAPES), -1, _GRID**2)


def _measure_shape(mask: np.ndarray, area: np.ndarray, visible: np.ndarray) -> tuple[str | None, dict[str, float]]:
    """Intersection over union with the best-fitting silhouette of each shape, averaged over up to nine frames."""
    size = mask.shape[1]
    shown = np.flatnonzero(visible)
    shown = shown[np.unique(np.linspace(0, len(shown) - 1, 9).round().astype(int))]
    axis = np.linspace(-_EXTENT, _EXTENT, _GRID)
    coordinate = np.arange(size)
    normalised = []
    for index in shown:
        frame = mask[index]
        unit = np.sqrt(area[index]) * size
        count = frame.sum()
        columns = np.rint(frame.sum(axis=0) @ coordinate / count + axis * unit).astype(int)
        rows = np.rint(frame.sum(axis=1) @ coordinate / count + axis * unit).astype(int)
        view = frame[np.clip(rows, 0, size - 1)][:, np.clip(columns, 0, size - 1)]
        outside = (rows < 0) | (rows >= size), (columns < 0) | (columns >= size)
        normalised.append(view & ~outside[0][:, None] & ~outside[1][None, :])
    seen = np.array(normalised, np.float32).reshape(len(shown), -1)  # (frames, grid²)
    bank = _silhouettes()
    both = np.einsum("fp,svp->fsv", seen, bank, optimize=True)
    either = seen.sum(axis=1)[:, None, None] + bank.sum(axis=2)[None] - both
    overlap = (both / either).max(axis=2).mean(axis=0)  # (shapes,)
    diagnostics = {f"overlap_{name}": float(value) for name, value in zip(SHAPES, overlap, strict=True)}
    best = int(overlap.argmax())
    return (SHAPES[best] if overlap[best] > 0.7 else None), diagnostics
