"""The pictures in the README: every clip's or image's block under its caption."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kandinsky.outputs import media
from tools.contact_sheet import GAP, LINE, STRIP, TILE_GAP, around_seam, captioned_sheet, frames_shown, main


def plain(level: int, size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def plain_clip(level: int) -> np.ndarray:
    return np.stack([plain(level)] * 9)


def test_rows_of_frames_under_captions() -> None:
    clip = plain_clip(50)
    clip[-1] = 200
    sheet = captioned_sheet([("first", frames_shown(clip, 3)), ("another", frames_shown(plain_clip(90), 3))])
    assert sheet.shape == (2 * (STRIP + 64), 3 * 64 + 2 * TILE_GAP, 3)
    row = sheet[STRIP : STRIP + 64]
    tiles = [row[:, i * (64 + TILE_GAP) :][:, :64] for i in range(3)]
    assert [np.unique(tile).tolist() for tile in tiles] == [[50], [50], [200]]  # from the first frame to the last
    strips = sheet[:STRIP], sheet[STRIP + 64 : 2 * STRIP + 64]
    assert all(strip.min() < 60 and strip.max() == 255 for strip in strips)  # something is written there
    assert not np.array_equal(*strips)


def test_a_seam_is_in_the_middle() -> None:
    clip = np.stack([plain(10 * i) for i in range(8)])
    assert [int(frame.mean()) // 10 for frame in around_seam(clip, 8)] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_columns_and_captions_of_several_lines() -> None:
    blocks = [("one", [plain(10)]), ("two words and many more", [plain(20)]), ("three", [plain(30)])]
    sheet = captioned_sheet(blocks, columns=2)
    first_row = sheet.shape[0] - (STRIP + 64)  # the second row's caption has one line
    assert sheet.shape[1] == 2 * 64 + GAP and (first_row - STRIP - 64) % LINE == 0 and first_row > STRIP + 64
    assert (sheet[first_row - 64 : first_row, :64] == 10).all()
    assert (sheet[first_row - 64 : first_row, 64 + GAP :] == 20).all()
    assert (sheet[-64:, :64] == 30).all() and (sheet[first_row:, 64:] == 255).all()  # an empty place at the end
    assert captioned_sheet(blocks[:1], columns=5).shape[1] == 64


def test_unequal_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes"):
        captioned_sheet([("a", [plain(0)]), ("b", [plain(0, size=32)])])


def test_captions_come_from_beside_the_videos(tmp_path: Path) -> None:
    for name in ("a", "b"):
        media.write_video(plain_clip(80), tmp_path / f"{name}.mp4")
    media.write_sidecar(tmp_path / "a.mp4", {"prompt": "grey, all of it"})
    main([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "--frames", "3", "--output", str(tmp_path / "sheet.png")])
    expected = captioned_sheet([("grey, all of it", [plain(80)] * 3), ("b", [plain(80)] * 3)])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert np.abs(np.asarray(sheet).astype(int) - expected).max() <= 4


def test_one_video_is_a_row(tmp_path: Path) -> None:
    media.write_video(plain_clip(80), tmp_path / "a.mp4")
    main([str(tmp_path / "a.mp4"), "--output", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (7 * 64 + 6 * TILE_GAP, STRIP + 64)


def test_images_beside_what_they_were_made_from(tmp_path: Path) -> None:
    for name, picture in (("a", plain(10)), ("b", plain(20)), ("cat", plain(90, size=100)), ("dog", plain(70))):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    media.write_sidecar(tmp_path / "a.png", {"prompt": "make it dark"})
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    sources = [str(tmp_path / "cat.png"), str(tmp_path / "dog.png")]
    sheet = tmp_path / "sheet.png"
    main([*files, "--sources", *sources, "--columns", "2", "--output", str(sheet)])
    expected = captioned_sheet([("make it dark", [plain(90), plain(10)]), ("b", [plain(70), plain(20)])], columns=2)
    with Image.open(sheet) as drawn:
        assert np.array_equal(np.asarray(drawn), expected)


def test_needs_either_files_or_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "sheet.png")])
    assert "name files, or --held_out N" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a.png", "b.png", "--sources", "c.png", "--output", str(tmp_path / "sheet.png")])
    assert "2 files and 1 sources" in capsys.readouterr().err
