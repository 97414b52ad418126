"""What is written can be read back as it was, and appears whole or not at all; what people hand in is read right."""

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kandinsky.outputs import media


def smooth_video(num_frames: int = 9, height: int = 48, width: int = 80) -> np.ndarray:
    """Colour gradients that drift: (T, H, W, 3) uint8."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij")
    channels = [0.5 + 0.45 * np.sin(3 * x + 2 * t), 0.5 + 0.45 * np.cos(2 * y - t), 0.2 + 0.6 * (x + y) / 2]
    return (255 * np.stack(channels, axis=-1)).round().astype(np.uint8)


def read_video(path: Path) -> tuple[np.ndarray, dict]:
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data())), reader.get_meta_data()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestVideo:
    # 66 and 54 are even, but no multiples of 16: nothing may be stretched to fit an encoder's blocks.
    @pytest.mark.parametrize(
        ("num_frames", "height", "width", "fps"), [(25, 128, 128, 24), (7, 54, 66, 12), (1, 64, 96, 24)]
    )
    def test_round_trip(self, tmp_path: Path, num_frames: int, height: int, width: int, fps: int) -> None:
        video = smooth_video(num_frames, height, width)
        media.write_video(video, tmp_path / "a.mp4", fps=fps)
        back, meta = read_video(tmp_path / "a.mp4")
        assert back.shape == video.shape
        assert meta["fps"] == fps
        assert min(psnr(a, b) for a, b in zip(back, video, strict=True)) > 40
        assert files(tmp_path) == {"a.mp4"}

    def test_primary_colours_keep_their_values(self, tmp_path: Path) -> None:
        colours = np.array(
            [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8
        )
        video = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3))
        media.write_video(video, tmp_path / "a.mp4")
        back, _ = read_video(tmp_path / "a.mp4")
        assert np.abs(back.astype(int) - video).max() <= 4

    def test_tensor_is_channels_first(self, tmp_path: Path) -> None:
        video = smooth_video()
        media.write_video(video, tmp_path / "array.mp4")
        media.write_video(torch.from_numpy(video).permute(3, 0, 1, 2), tmp_path / "tensor.mp4")
        assert (tmp_path / "array.mp4").read_bytes() == (tmp_path / "tensor.mp4").read_bytes()

    def test_is_what_every_player_shows(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        media.write_video(smooth_video(), path)
        probe = subprocess.run(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)], capture_output=True, text=True
        )
        stream = re.search(r"Video: .*", probe.stderr)
        assert stream is not None
        assert "h264" in stream[0] and "yuv420p(tv, bt709" in stream[0]
        content = path.read_bytes()
        assert 0 < content.index(b"moov") < content.index(b"mdat")  # plays before it is loaded to the end

    def test_replaces_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_text("old")
        media.write_video(smooth_video(5), tmp_path / "a.mp4")
        assert len(read_video(tmp_path / "a.mp4")[0]) == 5

    @pytest.mark.parametrize(
        ("frames", "message"),
        [
            (smooth_video(3, 47, 80), "80x47"),
            (smooth_video().astype(np.float32), "float32"),
            (torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8), r"\(1, 3, 4, 16, 16\)"),
            (torch.zeros(4, 16, 16, 3, dtype=torch.uint8), r"\(4, 16, 16, 3\)"),
            (np.zeros((0, 16, 16, 3), np.uint8), "not empty"),
        ],
    )
    def test_refuses_other_frames(self, tmp_path: Path, frames: media.Pixels, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            media.write_video(frames, tmp_path / "a.mp4")
        assert files(tmp_path) == set()

    def test_refuses_other_formats(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a\.gif ends in '\.gif'.*call it .*a\.mp4"):
            media.write_video(smooth_video(), tmp_path / "a.gif")

    @pytest.mark.parametrize("fps", [0, -1, float("nan")])
    def test_refuses_other_fps(self, tmp_path: Path, fps: float) -> None:
        with pytest.raises(ValueError, match="fps"):
            media.write_video(smooth_video(), tmp_path / "a.mp4", fps=fps)


class TestAtomic:
    def test_failing_encoder_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.mp4").write_text("old")
        get_writer, seen = imageio.get_writer, []

        def failing_writer(*args: object, **kwargs: object) -> object:
            writer = get_writer(*args, **kwargs)
            append = writer.append_data

            def append_data(frame: np.ndarray) -> None:
                if len(seen) == 4:
                    raise RuntimeError("half way")
                seen.append(files(tmp_path))
                append(frame)

            writer.append_data = append_data
            return writer

        monkeypatch.setattr(imageio, "get_writer", failing_writer)
        with pytest.raises(RuntimeError, match="half way"):
            media.write_video(smooth_video(9), tmp_path / "a.mp4")
        assert len(seen) == 4
        assert files(tmp_path) == {"a.mp4"}
        assert (tmp_path / "a.mp4").read_text() == "old"

    def test_missing_frames_are_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # As when the disk fills up: ffmpeg ends early, and imageio says nothing.
        monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (8, 0.3))
        with pytest.raises(OSError, match="8 of 9 frames"):
            media.write_video(smooth_video(9), tmp_path / "a.mp4")
        assert files(tmp_path) == set()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_block_that_raises_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        with pytest.raises(error), media.atomic_path(tmp_path / "new" / "a.bin") as temporary:
            temporary.write_bytes(b"half")
            assert files(tmp_path / "new") == {temporary.name}
            raise error
        assert files(tmp_path / "new") == set()

    def test_name_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        with media.atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"whole")
            assert not (tmp_path / "a.bin").exists()
        assert (tmp_path / "a.bin").read_bytes() == b"whole"
        assert files(tmp_path) == {"a.bin"}

    def test_others_may_read_what_the_umask_lets_them(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            media.write_image(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o644


class TestImage:
    @pytest.mark.parametrize("kind", ["array", "tensor", "pil"])
    def test_round_trip_is_exact(self, tmp_path: Path, kind: str) -> None:
        picture = smooth_video(1, 33, 47)[0]
        frame = {
            "array": picture,
            "tensor": torch.from_numpy(picture).permute(2, 0, 1),
            "pil": Image.fromarray(picture),
        }[kind]
        media.write_image(frame, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as back:
            assert (back.format, back.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(back), picture)

    def test_refuses_other_formats_and_shapes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"call it .*a\.png"):
            media.write_image(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.jpg")
        with pytest.raises(ValueError, match=r"\(4, 4\)"):
            media.write_image(np.zeros((4, 4), np.uint8), tmp_path / "a.png")
        with pytest.raises(ValueError, match="float32"):
            media.to_pil(torch.zeros(3, 4, 4))
        assert files(tmp_path) == set()


class TestSidecar:
    def test_lies_beside_and_reads_back(self, tmp_path: Path) -> None:
        facts = {"prompt": "кот, 猫", "seed": 7, "config": Path("a/b.yaml"), "seconds": {"decode": 1.5}}
        path = media.write_sidecar(tmp_path / "a.mp4", facts)
        assert path == tmp_path / "a.json" == media.sidecar_path(tmp_path / "a.mp4")
        assert json.loads(path.read_text(encoding="utf-8")) == facts | {"config": "a/b.yaml"}
        assert "кот, 猫" in path.read_text(encoding="utf-8")  # for people, not as escapes
        assert files(tmp_path) == {"a.json"}

    def test_half_characters_survive(self, tmp_path: Path) -> None:
        prompt = b"caf\xe9".decode("utf-8", errors="surrogateescape")
        path = media.write_sidecar(tmp_path / "a.mp4", {"prompt": prompt})
        assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": prompt}

    def test_never_takes_the_outputs_own_name(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON"):
            media.write_sidecar(tmp_path / "a.json", {})

    def test_versions_name_what_took_part(self) -> None:
        found = media.versions()
        assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert re.fullmatch(r"\d+\.\d+\.\d+", found["kandinsky"])


class TestNames:
    def test_writable(self, tmp_path: Path) -> None:
        media.check_writable(tmp_path / "new" / "folder" / "a.mp4", ".mp4")
        assert files(tmp_path / "new" / "folder") == set()
        (tmp_path / "old.mp4").write_text("old")
        media.check_writable(tmp_path / "old.mp4")
        assert (tmp_path / "old.mp4").read_text() == "old"

    def test_not_writable(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "folder.mp4").mkdir()
        for path, reason in [
            (tmp_path / "file" / "a.mp4", "can't write"),  # its folder is a file
            (tmp_path / "folder.mp4", "it is a folder"),
            (tmp_path / ("x" * 300 + ".mp4"), "can't write"),
            (tmp_path / "a\0.mp4", "can't write"),
        ]:
            with pytest.raises(ValueError, match=reason):
                media.check_writable(path)
        with pytest.raises(ValueError, match=r"has no ending.*call it .*video\.mp4"):
            media.check_writable(tmp_path / "video", ".mp4")
        assert files(tmp_path) == {"file", "folder.mp4"}

    @pytest.mark.skipif(os.name != "posix", reason="permission bits")
    def test_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.geteuid() == 0:  # root may write anywhere: let the file system's answer come from here

            def refuse(self: Path, *args: object, **kwargs: object) -> None:
                raise PermissionError(13, "Permission denied", str(self))

            monkeypatch.setattr(Path, "touch", refuse)
        else:
            tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            media.check_writable(tmp_path / "a.mp4")

    def test_default_tells_prompt_and_seed(self, tmp_path: Path) -> None:
        path = media.default_output_path(tmp_path / "outputs", "A red circle; moves LEFT!", 42)
        assert path == tmp_path / "outputs" / "a-red-circle-moves-left_seed42.mp4"
        assert path.parent.is_dir() and not path.exists()

    def test_default_never_takes_an_earlier_name(self, tmp_path: Path) -> None:
        taken = []
        for turn in range(6):
            path = media.default_output_path(tmp_path, "a cat", 1, ".png")
            assert path not in taken
            taken.append(path)
            # Either of a result's two files is enough to hold its name.
            (path if turn % 2 else media.sidecar_path(path)).write_text("")
        # Another kind of output with the same words would overwrite the JSON of the first.
        video = media.default_output_path(tmp_path, "a cat", 1, ".mp4")
        assert media.sidecar_path(video) not in [media.sidecar_path(path) for path in taken[::2]]

    @given(prompt=st.text(max_size=300), seed=st.integers(0, 2**32))
    def test_default_is_a_plain_file_name(
        self, tmp_path_factory: pytest.TempPathFactory, prompt: str, seed: int
    ) -> None:
        folder = tmp_path_factory.getbasetemp()
        path = media.default_output_path(folder, prompt, seed)
        assert path.parent == folder and path.suffix == ".mp4"
        assert not path.name.startswith((".", "-"))
        assert len(path.name.encode()) <= 255

    def test_one_output_has_the_name_that_was_given(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_text("old")  # to be replaced: somebody named it
        assert media.output_paths(str(tmp_path / "a.mp4"), 1) == [tmp_path / "a.mp4"]

    def test_several_outputs_are_counted_and_replace_nothing(self, tmp_path: Path) -> None:
        def names(count: int) -> list[str]:
            return [path.relative_to(tmp_path).as_posix() for path in media.output_paths(tmp_path / "v1.5.png", count)]

        assert names(3) == ["v1.5.png", "v1.5_2.png", "v1.5_3.png"]
        (tmp_path / "v1.5_2.json").write_text("{}")  # either of a result's two files is enough to hold its name
        (tmp_path / "v1.5.png").symlink_to("nowhere")
        assert names(2) == ["v1.5_3.png", "v1.5_4.png"]

    def test_prompt_cannot_leave_the_folder(self, tmp_path: Path) -> None:
        assert media.default_output_path(tmp_path, "../../etc/passwd", 0).name == "etc-passwd_seed0.mp4"


class TestLoadImage:
    def test_exif_rotation(self, tmp_path: Path) -> None:
        picture = Image.new("RGB", (40, 20), "blue")
        picture.paste("red", (0, 0, 10, 20))  # red on the left as stored
        exif = Image.Exif()
        exif[0x0112] = 6  # turn a quarter clockwise to see it upright
        picture.save(tmp_path / "a.png", exif=exif)
        upright = media.load_image(tmp_path / "a.png")
        assert upright.size == (20, 40)
        assert upright.getpixel((10, 2)) == (255, 0, 0)  # red on top
        assert upright.getpixel((10, 38)) == (0, 0, 255)

    def test_transparency_becomes_white(self, tmp_path: Path) -> None:
        picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        picture.putpixel((1, 0), (0, 0, 0, 0))
        picture.save(tmp_path / "a.png")
        for source in (tmp_path / "a.png", str(tmp_path / "a.png"), picture, np.asarray(picture)):
            image = media.load_image(source)
            assert image.mode == "RGB"
            assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]

    def test_palette(self, tmp_path: Path) -> None:
        picture = Image.new("P", (2, 1))
        picture.putpalette([10, 20, 30, 200, 100, 50])
        picture.putpixel((1, 0), 1)
        picture.save(tmp_path / "plain.png")
        picture.save(tmp_path / "holes.png", transparency=0)
        plain, holes = media.load_image(tmp_path / "plain.png"), media.load_image(tmp_path / "holes.png")
        assert [plain.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]
        assert [holes.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]

    def test_sixteen_bits_keep_their_range(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
        image = media.load_image(tmp_path / "a.png")
        assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]

    def test_arrays(self) -> None:
        grey = media.load_image(np.full((3, 5), 9, np.uint8))
        assert (grey.mode, grey.size, grey.getpixel((0, 0))) == ("RGB", (5, 3), (9, 9, 9))
        for wrong in (np.zeros((3, 5, 3)), np.zeros((3, 5, 5), np.uint8)):
            with pytest.raises(ValueError, match="uint8"):
                media.load_image(wrong)

    def test_not_an_image(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("words")
        Image.fromarray(smooth_video(1, 64, 64)[0]).save(tmp_path / "whole.png")
        (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
        (tmp_path / "bad.ppm").write_bytes(b"P6 4\xff255 3 255")  # here Pillow stumbles over a number
        with pytest.raises(ValueError, match="there is no image"):
            media.load_image(tmp_path / "missing.png")
        for name in ("text.png", "half.png", "bad.ppm", ".", "a\0.png"):
            with pytest.raises(ValueError, match=r"can't read the image .*; give a PNG") as error:
                media.load_image(tmp_path / name)
            assert "\n" not in str(error.value)
        # Opened by somebody else, who did not look at its pixels yet.
        with Image.open(tmp_path / "half.png") as half, pytest.raises(ValueError, match="can't read the image"):
            media.load_image(half)

    @pytest.mark.parametrize("source", [None, 7, torch.zeros(3, 4, 4, dtype=torch.uint8)])
    def test_not_even_a_source(self, source: object) -> None:
        with pytest.raises(ValueError, match=f"the image is a {type(source).__name__}; it must be a path"):
            media.load_image(source)  # type: ignore[arg-type]

    def test_print_colours(self, tmp_path: Path) -> None:
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
        image = media.load_image(tmp_path / "a.jpg")
        assert image.mode == "RGB"
        assert np.abs(np.subtract(image.getpixel((8, 8)), (255, 0, 0))).max() <= 2

    def test_grey_with_transparency(self, tmp_path: Path) -> None:
        picture = Image.new("LA", (2, 1), (40, 255))
        picture.putpixel((1, 0), (40, 0))
        picture.save(tmp_path / "a.png")
        image = media.load_image(tmp_path / "a.png")
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(40, 40, 40), (255, 255, 255)]

    def test_animation_is_its_first_frame(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=40)
        with Image.open(tmp_path / "a.gif") as animation:
            assert animation.n_frames == 3
        image = media.load_image(tmp_path / "a.gif")
        assert (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (20, 10), (255, 0, 0))


class TestFitImage:
    @pytest.mark.parametrize(("width", "height"), [(60, 48), (200, 160)])
    def test_is_bilinear_with_antialiasing(self, width: int, height: int) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
        fitted = np.asarray(media.fit_image(Image.fromarray(noise), width, height)).astype(float)
        tensor = torch.from_numpy(noise).permute(2, 0, 1)[None].double()
        theirs = torch.nn.functional.interpolate(tensor, (height, width), mode="bilinear", antialias=True)
        assert fitted.shape == (height, width, 3)
        assert np.abs(fitted - theirs[0].permute(1, 2, 0).numpy()).max() < 1.5  # both passes round to whole levels

    # lost: levels of 255 over the whole side. A change of 2 % cuts 1 % off on either side.
    @pytest.mark.parametrize(("width", "lost"), [(496, 0), (505, 0), (490, 2.55), (515, 3.7)])
    def test_one_percent_is_stretched_and_more_is_cropped(self, width: int, lost: float) -> None:
        ramp = np.linspace(0, 255, 1000).round().astype(np.uint8)
        levels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(0)), axis=-1)  # red down, green right
        fitted = np.asarray(media.fit_image(Image.fromarray(levels), width, 500)).astype(int)
        cut = 0 if width > 500 else 1  # what is too narrow loses columns, what is too wide rows
        assert abs(fitted[0, 0, cut] - lost) <= 1 and abs(fitted[-1, -1, cut] - (255 - lost)) <= 1
        assert fitted[0, 0, 1 - cut] == 0 and fitted[-1, -1, 1 - cut] == 255  # the other way nothing is lost

    def test_crop_is_in_the_middle(self) -> None:
        bands = np.zeros((100, 300, 3), np.uint8)
        for band in range(3):
            bands[:, 100 * band : 100 * (band + 1), band] = 255
        wide, tall = Image.fromarray(bands), Image.fromarray(bands.swapaxes(0, 1))
        for picture in (wide, tall):
            assert (np.asarray(media.fit_image(picture, 48, 48))[1:-1, 1:-1] == (0, 255, 0)).all()
        row = np.asarray(media.fit_image(wide, 96, 48))[24]  # half of the outer bands is left, on either side
        assert [int((row[:, channel] > 200).sum()) for channel in range(3)] == [24, 48, 24]

    def test_picture_of_that_size_is_left_alone(self) -> None:
        picture = Image.fromarray(smooth_video(1, 48, 80)[0])
        assert media.fit_image(picture, 80, 48).tobytes() == picture.tobytes()


def test_half_a_picture() -> None:
    """Averaged, not every second pixel; odd sides are rounded down."""
    stripes = np.zeros((6, 9, 3), np.uint8)
    stripes[:, ::2] = 200
    half = media.halve_image(Image.fromarray(stripes))
    assert half.size == (4, 3)
    assert abs(np.asarray(half).mean() - stripes.mean()) < 12 and np.asarray(half).std() < 40
