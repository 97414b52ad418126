"""The tiny world and the measurement that scores generated clips: right on what is right, and not on what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from tools import tiny_world
from tools.tiny_world import (
    BACKGROUNDS,
    COLOURS,
    EDIT_KINDS,
    MOTIONS,
    SHAPES,
    Attributes,
    Look,
    Mention,
    Scene,
    caption,
    corpus,
    measure,
    parse_caption,
    render,
    sample_scene,
    split,
    train_combinations,
)

ALL_NAMES = (SHAPES, tuple(COLOURS), tuple(MOTIONS), tuple(BACKGROUNDS))


# --- the split and the captions ---


def test_split_is_a_fixed_disjoint_tenth() -> None:
    train, test = set(train_combinations()), set(tiny_world.test_combinations())
    assert len(train) == 1152 and len(test) == 128 and not train & test
    assert train | test == set(tiny_world.all_combinations())
    assert all(split(a) == "test" for a in test) and all(split(a) == "train" for a in train)
    # Held-out combinations of a trained checkpoint must stay held out: this is the list's first and last entry.
    assert tiny_world.test_combinations()[0] == ("triangle", "cyan", "left", "black")
    assert tiny_world.test_combinations()[-1] == ("square", "red", "left", "gray")


def test_split_is_balanced() -> None:
    """Every value is held out about as often as any other, already among the first hundred."""
    for num in (100, 128):
        for i, names in enumerate(ALL_NAMES):
            counts = Counter(a[i] for a in tiny_world.test_combinations()[:num])
            assert set(counts) == set(names)
            assert max(counts.values()) - min(counts.values()) <= 2
    for i, j in ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3)):  # no pair of values is missing from training
        pairs = Counter((a[i], a[j]) for a in train_combinations())
        assert len(pairs) == len(ALL_NAMES[i]) * len(ALL_NAMES[j])
        assert min(pairs.values()) >= 10


def test_sampled_scenes_come_from_their_split_and_stay_in_the_frame() -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        for _ in range(40):
            scene = sample_scene(rng, name)
            assert split(scene) == name
            frames = render(scene, num_frames=5, size=64)
            border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
            assert (border == BACKGROUNDS[scene.background]).all(), scene
    with pytest.raises(ValueError, match="'train' or 'test'"):
        sample_scene(rng, "validation")


def test_captions_parse_back() -> None:
    assert caption(Scene("circle", "red", "left", "white")) == "a red circle moves left on a white background"
    assert caption(Scene("cross", "orange", "still", "navy")).startswith("an orange cross stays still")
    texts = corpus()
    assert len(texts) == len(set(texts)) == 4 * 1280
    assert Counter(parse_caption(text) for text in texts) == dict.fromkeys(tiny_world.all_combinations(), 4)
    rng = np.random.default_rng(0)
    scene = sample_scene(rng)
    written = {caption(scene, rng) for _ in range(60)}
    assert len(written) == 4 and written <= set(texts)
    assert {parse_caption(text) for text in written} == {scene.attributes}
    assert parse_caption(" A red circle  moves left on a white background. ") == ("circle", "red", "left", "white")
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption("a red dog moves left on a white background")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown motion 'spins'; choose one of left, right"):
        Scene("circle", "red", "spins", "white")


# --- drawing ---


def test_render_is_deterministic_and_shows_the_scene() -> None:
    scene = Scene("circle", "red", "right", "white")
    frames = render(scene)
    assert frames.shape == (25, 128, 128, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, render(scene))
    assert tuple(frames[0, 64, 44]) == COLOURS["red"] == tuple(frames[-1, 64, 84])  # 20 px left, 20 px right of it
    assert tuple(frames[0, 64, 108]) == BACKGROUNDS["white"] == tuple(frames[-1, 64, 20])
    edge = frames[12][(frames[12] != COLOURS["red"]).any(-1) & (frames[12] != BACKGROUNDS["white"]).any(-1)]
    assert 50 < len(edge) < 400  # antialiased, and no wider than a pixel


def test_motion_depends_on_the_clip_not_on_its_length() -> None:
    scene = Scene("square", "cyan", "bounce", "brown", x=0.52, y=0.49)
    short, long = render(scene, 25, 64), render(scene, 49, 64)
    assert np.array_equal(short, long[::2])


# --- measuring ---


def _degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a weak model makes of it: half the eighth-size picture blown up, half a blur, and noise of 8 levels."""
    size = frames.shape[1]
    x = np.ascontiguousarray(frames.transpose(0, 3, 1, 2), dtype=np.float32)  # (T, 3, H, W)
    pixels, coarse = np.arange(size), np.arange(size // 8)
    average = np.float32(pixels // 8 == coarse[:, None]) / 8  # (size / 8, size)
    position = np.clip((pixels + 0.5) / 8 - 0.5, 0, size // 8 - 1)
    bilinear = np.maximum(0, 1 - np.abs(position[:, None] - coarse)).astype(np.float32)  # (size, size / 8)
    gauss = np.exp(-0.5 * ((pixels[:, None] - pixels) / 2.0) ** 2).astype(np.float32)
    gauss /= gauss.sum(axis=1, keepdims=True)
    resized = bilinear @ average.astype(np.float32)
    blurry = (resized @ x @ resized.T.copy() + gauss @ x @ gauss.T.copy()) / 2
    noisy = blurry + 8 * rng.standard_normal(x.shape, dtype=np.float32)
    return np.ascontiguousarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _wash_out(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurry, and three quarters of the contrast."""
    return np.rint(128 + 0.75 * (_degrade(frames, rng).astype(np.float32) - 128)).astype(np.uint8)


@pytest.mark.parametrize(
    ("degrade", "num", "allowed_wrong"),
    [(None, 80, 1), (_degrade, 40, 2), (_wash_out, 20, 1)],
    ids=["clean", "degraded", "washed_out"],
)
def test_measure_reads_the_attributes_back(
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None, num: int, allowed_wrong: int
) -> None:
    rng = np.random.default_rng(7)
    right: Counter[str] = Counter()
    for i in range(num):
        scene = sample_scene(rng, "test" if i % 2 else "train")
        frames = render(scene, num_frames=25 if degrade is None else 13)  # degrading is what takes time
        measured = measure(frames if degrade is None else degrade(frames, rng))
        right.update({name: int(ok) for name, ok in measured.agrees(scene.attributes).items()})
    assert all(right[name] >= num - allowed_wrong for name in Attributes._fields), dict(right)


def test_measure_reads_small_and_longer_clips() -> None:
    rng = np.random.default_rng(8)
    for num_frames, size in ((25, 64), (49, 64), (13, 128)):
        for _ in range(10):
            scene = sample_scene(rng)
            assert all(measure(render(scene, num_frames, size)).agrees(scene.attributes).values()), scene


def test_a_clip_of_other_attributes_is_not_right() -> None:
    """Change one attribute and exactly that one is reported wrong, whatever it is changed to."""
    base = Attributes("square", "purple", "up", "gray")
    for i, names in enumerate(ALL_NAMES):
        for other in set(names) - {base[i]}:
            changed = list(base)
            changed[i] = other
            agrees = measure(render(Scene(*changed), size=64)).agrees(base)
            expected = {name: j != i for j, name in enumerate(Attributes._fields)}
            assert agrees == expected, (changed, agrees)


def test_a_clip_without_an_object_shows_only_a_background() -> None:
    rng = np.random.default_rng(0)
    for name, colour in BACKGROUNDS.items():
        empty = np.clip(np.array(colour) + rng.normal(0, 8, (25, 64, 64, 3)), 0, 255).astype(np.uint8)
        measured = measure(empty)
        assert (measured.shape, measured.colour, measured.motion, measured.background) == (None, None, None, name)


def test_what_is_not_of_this_world_is_not_named() -> None:
    circle = Scene("circle", "red", "right", "black")
    frames = render(circle, size=64)

    gray = frames.copy()
    gray[frames[..., 0] > 120] = 170
    assert measure(gray).colour is None and measure(gray).shape == "circle"

    green_screen = frames.copy()
    green_screen[frames[..., 0] < 120] = (60, 200, 60)
    assert measure(green_screen).background is None

    shuffled = frames[np.random.default_rng(0).permutation(25)]  # jumps about instead of moving
    assert measure(shuffled).motion is None

    diagonal = np.stack([np.roll(frame, i, axis=0) for i, frame in zip(range(-10, 10), frames[:20], strict=True)])
    assert measure(diagonal).motion is None

    half_gone = frames.copy()
    half_gone[10:] = BACKGROUNDS["black"]
    assert not any(measure(half_gone).agrees(circle.attributes)[name] for name in ("shape", "colour", "motion"))

    bar = np.full((25, 64, 64, 3), 16, np.uint8)
    bar[:, 28:36, 8:56] = COLOURS["red"]
    assert measure(bar).shape is None

    noise = np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8)
    assert measure(noise).shape is None and measure(noise).motion is None

    reversed_bounce = render(Scene("circle", "red", "bounce", "black"), size=64)[:, ::-1]
    assert measure(np.ascontiguousarray(reversed_bounce)).motion is None


def test_measure_refuses_other_layouts() -> None:
    with pytest.raises(ValueError, match="uint8"):
        measure(np.zeros((25, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="H = W"):
        measure(np.zeros((25, 3, 64, 64), np.uint8))


# --- pictures ---


def test_looks_are_split_into_a_fixed_balanced_tenth() -> None:
    train, test = tiny_world.train_looks(), tiny_world.test_looks()
    assert len(train) == 144 and len(test) == 16 and not set(train) & set(test)
    assert set(train) | set(test) == set(tiny_world.all_looks())
    # Held-out looks of a trained checkpoint must stay held out: this is the list's first and last entry.
    assert (test[0], test[-1]) == (("triangle", "orange", "brown"), ("circle", "orange", "brown"))
    for i, names in enumerate((SHAPES, tuple(COLOURS), tuple(BACKGROUNDS))):
        counts = Counter(look[i] for look in test)
        assert set(counts) == set(names) and max(counts.values()) - min(counts.values()) <= 1
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pairs = Counter((look[i], look[j]) for look in train)
        assert len(pairs) == len(set(pairs)) and min(pairs.values()) >= 2
    rng = np.random.default_rng(0)
    assert tiny_world.sample_picture(rng).look in train and tiny_world.sample_picture(rng, "test").look in test


def test_picture_captions_parse_back_and_are_no_captions_of_clips() -> None:
    look = Look("circle", "red", "white")
    assert tiny_world.picture_caption(look) == "a red circle on a white background"
    assert tiny_world.parse_picture_caption("On a navy background, an orange cross.") == ("cross", "orange", "navy")
    texts = tiny_world.picture_corpus()
    assert len(set(texts)) == len(texts) == 4 * 160 and not set(texts) & set(corpus())
    assert Counter(map(tiny_world.parse_picture_caption, texts)) == dict.fromkeys(tiny_world.all_looks(), 4)
    rng = np.random.default_rng(0)
    assert len({tiny_world.picture_caption(look, rng) for _ in range(60)}) == 4
    with pytest.raises(ValueError, match="not a picture's caption"):
        tiny_world.parse_picture_caption("a red circle moves left on a white background")


def test_every_look_is_measured_where_it_is() -> None:
    rng = np.random.default_rng(0)
    for i, look in enumerate(tiny_world.all_looks()):
        scene, size = tiny_world.picture_for(look, rng), (64, 128)[i % 2]
        picture = tiny_world.render_picture(scene, size)
        assert picture.shape == (size, size, 3) and np.array_equal(picture, render(scene, 1, size)[0])
        assert (picture[[0, -1]] == BACKGROUNDS[look.background]).all(), scene  # inside the frame
        assert (picture[:, [0, -1]] == BACKGROUNDS[look.background]).all(), scene
        measured = tiny_world.measure_picture(picture)
        assert all(measured.agrees(look).values()), (scene, measured)
        place = measured.diagnostics
        assert abs(place["x"] - scene.x) < 0.01 and abs(place["y"] - scene.y) < 0.01
        assert abs(place["radius"] / scene.radius - 1) < 0.05


def test_blurry_noisy_pictures_are_still_read() -> None:
    rng = np.random.default_rng(1)
    for look in tiny_world.all_looks()[::4]:
        scene = tiny_world.picture_for(look, rng)
        measured = tiny_world.measure_picture(_degrade(render(scene, 1), rng)[0])
        assert all(measured.agrees(look).values()), (scene, measured)
        assert abs(measured.diagnostics["radius"] / scene.radius - 1) < 0.15


def test_a_picture_without_an_object_or_of_another_layout() -> None:
    measured = tiny_world.measure_picture(np.full((64, 64, 3), 240, np.uint8))
    assert measured.background == "white" and measured.shape is None and "x" not in measured.diagnostics
    with pytest.raises(ValueError, match="one of"):
        tiny_world.measure_picture(np.zeros((1, 64, 64, 3), np.uint8))


# --- edits ---


def test_edits_are_split_by_what_is_before_and_after() -> None:
    pairs = {split: {p for k in EDIT_KINDS for p in tiny_world.edits(split, k)} for split in ("train", "test")}
    assert not pairs["train"] & pairs["test"] and sum(map(len, pairs.values())) == 160 * 159
    assert 0.09 < len(pairs["test"]) / (160 * 159) < 0.11
    # Pairs held out of a trained checkpoint must stay held out.
    assert len(pairs["test"]) == 2565
    assert tiny_world.edits("test", ("colour",))[0] == (("circle", "red", "white"), ("circle", "green", "white"))
    for kind in EDIT_KINDS:
        held_out = tiny_world.edits("test", kind)
        assert len(held_out) > 50 and all(tiny_world.edit_kind(*pair) == kind for pair in held_out)
    with pytest.raises(ValueError, match="an edit changes something"):
        tiny_world.edit_kind(Look("circle", "red", "white"), Look("circle", "red", "white"))


def test_sampled_edits_say_what_changes_and_keep_place_and_size() -> None:
    rng = np.random.default_rng(0)
    kinds: Counter[tuple[str, ...]] = Counter()
    for i in range(200):
        name = "test" if i % 2 else "train"
        source, text, target = tiny_world.sample_edit(rng, name)
        assert tiny_world.edit_split(source.look, target.look) == name
        assert (source.x, source.y, source.radius) == (target.x, target.y, target.radius)
        before, after = tiny_world.parse_instruction(text)
        for field in Look._fields:  # what is said of the source is true of it, and the rest of the target is the source
            assert getattr(before, field) in (None, getattr(source, field))
            said = getattr(after, field)
            assert getattr(target, field) == (said if said is not None else getattr(source, field))
        kinds[tiny_world.edit_kind(source.look, target.look)] += 1
    assert set(kinds) == set(EDIT_KINDS) and min(kinds.values()) > 10
    assert tiny_world.sample_edit(np.random.default_rng(0)) == tiny_world.sample_edit(np.random.default_rng(0))
    source, _, target = tiny_world.sample_edit(rng, kind=("shape",))
    assert tiny_world.edit_kind(source.look, target.look) == ("shape",)


def test_instructions() -> None:
    circle = Look("circle", "red", "black")
    assert tiny_world.instruction(circle, circle._replace(colour="blue")) == "make the circle blue"
    assert tiny_world.instruction(circle, circle._replace(shape="square")) == "turn the circle into a square"
    assert tiny_world.instruction(circle, circle._replace(background="white")) == "make the background white"
    both = circle._replace(colour="blue", background="white")
    assert tiny_world.instruction(circle, both) == "make the circle blue and the background white"
    rng = np.random.default_rng(0)
    written = {tiny_world.instruction(circle, Look("square", "orange", "black"), rng) for _ in range(100)}
    assert len(written) == 8 and "turn the red circle into an orange square" in written
    assert tiny_world.parse_instruction("Paint the  red circle green.") == (
        Mention("circle", "red"),
        Mention(colour="green"),
    )
    assert tiny_world.parse_instruction("turn the background navy") == (Mention(), Mention(background="navy"))
    texts = tiny_world.instruction_corpus()
    assert len(texts) == len(set(texts)) and not set(texts) & {*corpus(), *tiny_world.picture_corpus()}
    assert written <= set(texts)
    with pytest.raises(ValueError, match="not an instruction"):
        tiny_world.parse_instruction("make the dog blue")


@pytest.mark.parametrize("motion", tiny_world.MOTIONS)
def test_a_loop_ends_as_it_begins(motion: str) -> None:
    """Where the clip of that motion begins. It goes half the way, or up and down again, slowest where it begins anew,
    and nowhere much faster than other clips, which are all that the VAE has seen."""
    scene = tiny_world.Scene("circle", "red", motion, "white")
    loop, clip = (np.stack(tiny_world.path(scene, 25, loop=loop)) for loop in (True, False))
    assert np.allclose(loop[:, 0], clip[:, 0]) and np.allclose(loop[:, -1], loop[:, 0])
    assert np.allclose(loop[:, 12], clip[:, 12])
    speed, usual = (np.abs(np.diff(path)).max(axis=0) for path in (loop, clip))
    assert speed.max() <= 1.6 * usual.max()
    if motion != "still":
        assert max(speed[0], speed[-1]) < 0.15 * speed.max()
