"""The picture in the README: every clip's row under its caption."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky import media
from tools.contact_sheet import STRIP, captioned_sheet, main


def plain_clip(level: int, size: int = 64) -> np.ndarray:
    return np.full((9, size, size, 3), level, np.uint8)


def test_rows_of_frames_under_captions() -> None:
    clip = plain_clip(50)
    clip[-1] = 200
    sheet = captioned_sheet([("first", clip), ("another", plain_clip(90))], frames_per_clip=3)
    assert sheet.shape == (2 * (STRIP + 64), 3 * 64, 3)
    row = sheet[STRIP : STRIP + 64]
    assert (row[:, :128] == 50).all() and (row[:, 128:] == 200).all()  # from the first frame to the last
    strips = sheet[:STRIP], sheet[STRIP + 64 : 2 * STRIP + 64]
    assert all(strip.min() < 60 and strip.max() == 255 for strip in strips)  # something is written there
    assert not np.array_equal(*strips)


def test_unequal_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes"):
        captioned_sheet([("a", plain_clip(0)), ("b", plain_clip(0, size=32))])


def test_captions_come_from_beside_the_videos(tmp_path: Path) -> None:
    for name in ("a", "b"):
        media.write_video(plain_clip(80), tmp_path / f"{name}.mp4")
    media.write_sidecar(tmp_path / "a.mp4", {"prompt": "grey, all of it"})
    main([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "--frames", "3", "--output", str(tmp_path / "sheet.png")])
    expected = captioned_sheet([("grey, all of it", plain_clip(80)), ("b", plain_clip(80))], 3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.abs(np.asarray(sheet).astype(int) - expected).max() <= 4


def test_needs_either_videos_or_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "sheet.png")])
    assert "name videos, or --held_out N" in capsys.readouterr().err
