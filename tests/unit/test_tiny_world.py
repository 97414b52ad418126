"""The tiny world and the measurement that scores generated clips: right on what is right, and not on what is not."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from tools import eval_tiny, tiny_world
from tools.tiny_world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Attributes,
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
    [(None, 150, 1), (_degrade, 100, 3), (_wash_out, 40, 1)],
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


# --- tools/eval_tiny.py, with stubs instead of the pipeline ---


class _DrawingPipeline:
    """Draws what the caption says, except that every fourth clip is shown backwards."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.vae = _IdentityVAE()

    def __call__(self, text: str, seed: int, progress: bool) -> object:
        import torch

        assert progress is False
        self.calls.append((text, seed))
        frames = render(tiny_world.scene_for(parse_caption(text), np.random.default_rng(seed)), size=64)
        frames = frames[::-1].copy() if seed % 4 == 0 else frames
        return torch.from_numpy(frames[None]).permute(0, 4, 1, 2, 3)


class _IdentityVAE:
    """Off by one level in 255, everywhere."""

    def parameters(self) -> object:
        import torch

        return iter([torch.zeros(1)])

    def encode(self, x: object, tiling: object) -> object:
        assert x.shape[:2] == (1, 3) and x.min() >= -1 and x.max() <= 1  # type: ignore[attr-defined]
        return types.SimpleNamespace(mode=lambda: x)

    def decode(self, z: object, tiling: object) -> object:
        return z + 1 / 127.5  # type: ignore[operator]


def test_eval_counts_what_is_right_and_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = _DrawingPipeline()
    stub = types.ModuleType("kandinsky")
    stub.get_T2V_pipeline = lambda device_map, conf_path: pipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kandinsky", stub)
    output, sheet = tmp_path / "report.json", tmp_path / "sheet.png"  # type: ignore[operator]
    arguments = ["--num", "24", "--output", str(output), "--sheet", str(sheet)]
    eval_tiny.main(arguments)

    assert pipe.calls == [(caption(a), i) for i, a in enumerate(tiny_world.test_combinations()[:24])]
    backwards = [a for i, a in enumerate(tiny_world.test_combinations()[:24]) if i % 4 == 0]
    wrong = sum(a.motion not in ("still", "bounce") for a in backwards)  # these two look the same backwards
    report = json.loads(output.read_text())
    assert 0 < wrong < 24
    assert report["right"] == {"shape": 24, "colour": 24, "motion": 24 - wrong, "background": 24}
    assert report["all_four_right"] == 24 - wrong and sum(report["wrong"]["motion"].values()) == wrong
    assert f"{24 - wrong}/24" in capsys.readouterr().out
    assert sheet.stat().st_size > 1000


def test_eval_of_the_vae_reports_psnr() -> None:
    report, pairs = eval_tiny.evaluate_vae(_IdentityVAE(), num=3, size=64)
    assert report["psnr_mean"] == pytest.approx(48.13, abs=0.01)  # 20 log10(255), an error of one level
    assert report["right"]["motion"] == 3 and pairs[0].shape == (25, 64, 128, 3)
