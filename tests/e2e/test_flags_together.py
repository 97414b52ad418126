"""Each flag of what is directed, longer or done after it, alone and with each other one, with every task: either it
goes, as far as loading, or it is one line before that. Which goes is said here once more, in other words."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from safetensors.torch import save_file

from kandinsky.models.upscaler import CompactUpscaler

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FLAGS = {
    "video": ["clip"], "strength": ["0.5"], "mask": ["white.png"], "last_image": ["white.png"], "loop": [],
    "keyframe": ["0.17:white.png"], "extend": ["1"], "segments": ["segments.yaml"], "overlap": ["5"],
    "no_colour_match": [], "save_last_frame": [], "fps": ["48"], "upscale": ["2"], "upscaler": ["small.safetensors"],
}  # fmt: skip
FURTHER_PICTURES = {"last_image", "loop", "keyframe"}
LONGER = {"extend", "segments"}


class Loading(BaseException):
    """It came to that: nothing was wrong before."""


def goes(task: str, flags: set[str]) -> bool:
    makes_videos, is_longer = task in ("t2v", "i2v"), bool(flags & LONGER)
    of_source = flags & {"strength", "mask"}
    return (
        (makes_videos or not flags & {"extend", "segments", "save_last_frame", "fps"})
        and (task == "i2v" or not flags & FURTHER_PICTURES)
        and ("video" not in flags or task == "t2v" or (task == "i2v" and is_longer))
        and (not of_source or task == "t2i" or (task == "t2v" and "video" in flags))
        and (not is_longer or not flags & ({"strength", "mask"} | FURTHER_PICTURES))
        and not flags >= LONGER
        and not flags >= {"loop", "last_image"}
        and (is_longer or not flags & {"overlap", "no_colour_match"})
        and ("upscaler" not in flags or "upscale" in flags)
    )


PAIRS = [set(some) for count in (0, 1, 2) for some in combinations(FLAGS, count)]
# What only goes with a third one, or does not go for it.
OF_THREE = {"strength", "mask", "overlap", "no_colour_match"}
THREE = [{*some, "video"} for some in combinations(FLAGS, 2) if set(some) & OF_THREE and "video" not in some]


@pytest.mark.parametrize("task", ["t2v", "i2v", "t2i", "i2i"])
@pytest.mark.parametrize("together", [PAIRS, pytest.param(THREE, marks=pytest.mark.exhaustive)], ids=["pairs", "three"])
def test_all_flags_with_each_other(
    together: list[set[str]],
    task: str,
    cli: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import kandinsky.loading.assemble as assemble

    def loading(*_: object, **__: object) -> None:
        raise Loading

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "load_pipeline", loading)
    (tmp_path / "clip").mkdir()
    for i in range(9):
        Image.new("RGB", (64, 64)).save(f"clip/{i}.png")
    Image.new("RGB", (128, 128), "white").save("white.png")
    Path("segments.yaml").write_text("- a cat\n- a dog\n")
    save_file(CompactUpscaler(channels=4, convolutions=1, scale=2).state_dict(), "small.safetensors")
    wrong = []
    for flags in together:
        words = ["--config", str(CONFIGS / f"config_tiny_{task}.yaml")]
        words += [] if "segments" in flags else ["--prompt", "a cat"]
        starts = task == "t2i" and flags & {"strength", "mask"}
        words += ["--image", "white.png"] if starts or (task in ("i2v", "i2i") and "video" not in flags) else []
        for flag in sorted(flags):
            words += [f"--{flag}", *FLAGS[flag]]
        try:
            status, went = cli.main([*words, "--output_filename", "out.png" if task[2] == "i" else "out.mp4"]), False
        except Loading:
            status, went = 0, True
        except SystemExit as stop:
            status, went = stop.code, False
        told = capsys.readouterr().err
        if went != goes(task, flags):
            wrong.append(f"{sorted(flags)} {'goes' if went else 'does not go'}: {told}")
        elif not went and not (status == 2 and told.startswith("error: ") and len(told.splitlines()) == 1):
            wrong.append(f"{sorted(flags)}: status {status}: {told}")
    assert not wrong, f"{len(wrong)} of {len(together)}:\n" + "\n".join(wrong)
