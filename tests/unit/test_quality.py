"""The judge of fast paths ranks what is known to be worse, keeps what it has, and asks for nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from benchmarks import quality
from benchmarks._distance import DEGRADATIONS, MOST_DB, WEIGHT_BITS, distance
from benchmarks._resumable import Kept
from benchmarks.quality import PLAIN, QUALITY, SETTINGS, TINY, Setting, measure, round_weights, summary, table
from tools import tiny_world
from tools.eval_tiny import Case, make_cases

CASE = make_cases("t2v", 1)[0]


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return tiny_world.render(CASE.wanted, 25, 128)


def test_a_clip_is_the_same_as_itself(clip: np.ndarray) -> None:
    found = distance(clip, clip)
    assert found["psnr"] == found["psnr worst"] == found["xpsnr"] == found["xpsnr worst"] == MOST_DB
    assert found["ssim"] == found["ssim worst"] == 1
    assert found["vmaf"] > 97 and found["flicker change"] == 0


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_known_degradations_rank(name: str, clip: np.ndarray) -> None:
    """By every measure, over the clip and in its worst frame: the stronger, the worse."""
    spoil, strengths = DEGRADATIONS[name]
    found = [distance(clip, clip), *(distance(spoil(clip, strength), clip) for strength in strengths)]
    for measure_name in QUALITY:
        values = [one[measure_name] for one in found]
        assert values == sorted(set(values), reverse=True), (measure_name, values)
        if measure_name != "vmaf":  # its worst frame is at 0 for more than one strength
            worst = [one[f"{measure_name} worst"] for one in found]
            assert worst == sorted(worst, reverse=True), (measure_name, worst)
    # Noise flickers; blur and frames that stand still do the contrary.
    changes = [one["flicker change"] for one in found]
    assert changes == sorted(set(changes), reverse=name == "noise")


def test_one_bad_frame_is_seen(clip: np.ndarray) -> None:
    spoilt = clip.copy()
    spoilt[7] = 255 - spoilt[7]
    found, reference = distance(spoilt, clip), distance(clip, clip)
    assert found["psnr worst"] < 10 < found["psnr"] and found["ssim worst"] < 0.7 < 0.9 < found["ssim"]
    assert found["xpsnr worst"] < 10 and found["vmaf worst"] < reference["vmaf worst"] - 20


def test_what_cannot_be_compared_is_refused(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one shape"):
        distance(clip[:5], clip)


def test_fewer_bits_of_weights_rank() -> None:
    """Two steps of the tiny checkpoint on five frames."""
    from kandinsky import get_T2V_pipeline

    pipe = get_T2V_pipeline("cpu", conf_path=quality.REPOSITORY / "configs" / f"{TINY}.yaml")
    weights = {name: weight.clone() for name, weight in pipe.dit.state_dict().items()}

    def made(bits: int | None) -> np.ndarray:
        pipe.dit.load_state_dict(weights)
        if bits is not None:
            round_weights(pipe.dit, bits)
        video = pipe(CASE.text, time_length=0.2, num_steps=2, seed=CASE.seed, guidance_weight=1, progress=False)
        return np.ascontiguousarray(video[0].permute(1, 2, 3, 0).numpy())

    plain = made(None)
    found = [distance(made(bits), plain) for bits in WEIGHT_BITS]
    for name in ("psnr", "ssim", "xpsnr"):
        values = [one[name] for one in found]
        assert values == sorted(set(values), reverse=True), (name, values)


class Drawn:
    """In place of a pipeline: draws the clip, noisier with another setting; counts its calls."""

    calls: ClassVar[list[str]] = []

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __call__(self, case: Case) -> tuple[np.ndarray, dict[str, float]]:
        self.calls.append(f"{self.setting.name} {case.seed}")
        frames = tiny_world.render(case.wanted, 9, 64)
        is_plain = self.setting in PLAIN.values()
        spent = {"evaluations": 32 if is_plain else 16, "seconds": 4.0 if is_plain else 1.0}
        return frames if is_plain else DEGRADATIONS["noise"][0](frames, 4), spent

    def operations(self, case: Case) -> int:
        return 100 if self.setting in PLAIN.values() else 25


def test_a_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drawn, "calls", [])
    path, empty = tmp_path / "quality.json", {"machine": "this", "settings": {}, "operations": {}, "rows": {}}
    settings = [PLAIN[TINY], Setting("fast", ("a.b=1",)), *(one for one in SETTINGS if one.spoil is not None)]
    measure(Kept(path, empty), settings, 1, Drawn)
    assert Drawn.calls == ["plain 0", "fast 0"]
    measure(Kept(path, {}), settings, 2, Drawn)  # a further case, and nothing of the first
    assert Drawn.calls == ["plain 0", "fast 0", "plain 1", "fast 1"]
    measure(Kept(path, {}), [*settings, Setting("faster")], 1, Drawn)  # a line more
    assert Drawn.calls[4:] == ["plain 0", "faster 0"]
    measure(Kept(path, {}, minutes=0), settings, 5, Drawn)
    assert len(Drawn.calls) == 6
    with pytest.raises(ValueError, match="other values"):
        measure(Kept(path, {}), [PLAIN[TINY], Setting("fast", ("a.b=2",))], 2, Drawn)
    data = json.loads(path.read_text())
    lines = {line["name"]: line for line in summary(data, settings)}
    assert lines["fast"]["cases"] == 2 and lines["fast"]["psnr"] < 40
    assert (lines["fast"]["operations share"], lines["fast"]["seconds share"]) == (0.25, 0.25)
    rows = table(data, settings).splitlines()
    assert len(rows) == 2 + len(settings) and "same" in rows[2] and "same" not in rows[3]


def test_settings_are_of_the_configs() -> None:
    """Each has a name of its own, values that its config takes, and a plain run beside it."""
    from kandinsky.config.reading import load_config

    names = [setting.name for setting in SETTINGS]
    assert len(set(names)) == len(names) and set(PLAIN.values()) < set(SETTINGS)
    for setting in SETTINGS:
        load_config(quality.REPOSITORY / "configs" / f"{setting.config}.yaml", setting.values)
        assert setting.config in PLAIN


def test_results_that_are_shown_are_complete(tmp_path: Path) -> None:
    """The figures in the repository are of the settings that there are, and can be drawn."""
    from benchmarks._chart import draw_quality

    path = quality.REPOSITORY / "benchmarks" / "quality.json"
    data = json.loads(path.read_text())
    lines = summary(data)
    assert [line["name"] for line in lines] == [setting.name for setting in SETTINGS]
    assert data["settings"] == {setting.name: setting.facts() for setting in SETTINGS}
    draw_quality(lines, data["machine"], tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000
