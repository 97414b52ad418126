"""The size that a picture gives: the published examples, and nothing that a model can't take."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kandinsky.config.defaults import HD_SIZES
from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.sizes import check_picture, size_for_image, size_for_video

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SD = load_config(CONFIGS / "config_5s_i2v.yaml")
HD = load_config(CONFIGS / "config_5s_i2v_pro_hd.yaml")
I2I = load_config(CONFIGS / "config_i2i.yaml")
TINY = load_config(CONFIGS / "config_tiny_t2v.yaml")


@pytest.mark.parametrize(
    ("picture", "sd", "hd"),
    [
        ((1920, 1080), (832, 464), (1408, 768)),
        ((1280, 720), (832, 464), (1408, 768)),  # the same aspect: the same size
        ((1080, 1920), (464, 832), (768, 1408)),
        ((300, 300), (624, 624), (1024, 1024)),
        ((768, 512), (768, 512), (1280, 896)),
        ((4000, 1000), (1248, 320), (2048, 512)),
        ((16, 64), (320, 1248), (512, 2048)),
    ],
)
def test_video_keeps_the_aspect_at_the_area_of_its_class(
    picture: tuple[int, int], sd: tuple[int, int], hd: tuple[int, int]
) -> None:
    assert size_for_video(picture, SD) == sd
    assert size_for_video(picture, HD) == hd


def test_dense_attention_at_hd_gets_the_same_sizes() -> None:
    dense = load_config(CONFIGS / "config_5s_i2v_pro_hd.yaml", ["model.attention.type=full"])
    assert size_for_video((1920, 1080), dense) == (1408, 768)


def test_area_is_that_of_the_default_size() -> None:
    assert size_for_video((1000, 1000), TINY) == (128, 128)
    assert size_for_video((200, 100), TINY) == (176, 96)  # 181 and 91, to multiples of 16
    larger = load_config(CONFIGS / "config_5s_i2v.yaml", ["generation.width=512"])
    assert size_for_video((1000, 1000), larger) == (512, 512)


ODD = ["metrics.resolution=128", "generation.resolutions=[[128,128]]", "generation.width=128", "generation.height=128"]
LARGE = ["generation.resolutions=[[2048,2048]]", "generation.width=2048", "generation.height=2048"]
EVERY_KIND = {
    "SD": (SD, 16),
    "HD": (HD, 128),
    "tiny": (TINY, 16),
    "tiny with NABLA": (load_config(CONFIGS / "config_5s_i2v.yaml", [*ODD, "model.attention.type=nabla"]), 128),
    "as large as can be": (load_config(CONFIGS / "config_5s_i2v.yaml", LARGE), 16),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
@given(short=st.integers(16, 5000), aspect=st.floats(1, 4), upright=st.booleans())
def test_every_picture_that_passes_gives_a_size_that_runs(kind: str, short: int, aspect: float, upright: bool) -> None:
    config, multiple = EVERY_KIND[kind]
    picture = (short, int(short * aspect)) if upright else (int(short * aspect), short)
    check_picture(picture)
    size = size_for_video(picture, config)
    assert all(side % multiple == 0 and 0 < side <= 2048 for side in size)
    assert size_for_video(picture[::-1], config) == size[::-1]
    assert size_for_image(picture, I2I) in HD_SIZES


@pytest.mark.parametrize("size", HD_SIZES)
def test_image_of_a_trained_size_keeps_it(size: tuple[int, int]) -> None:
    assert size_for_image(size, I2I) == size
    assert size_for_image((size[0] * 3, size[1] * 3 + 5), I2I) == size


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        ((1920, 1080), (1280, 768)),
        ((1080, 1920), (768, 1280)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((400, 100), (1408, 640)),
        ((100, 400), (640, 1408)),
        ((1000, 890), (1024, 1024)),  # 0.89 is 0.110 from 1 and 0.112 from 896 / 1152
    ],
)
def test_image_gets_the_size_nearest_in_shape(picture: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_for_image(picture, I2I) == expected


def test_image_sizes_are_the_configs() -> None:
    sizes: Config = load_config(
        CONFIGS / "config_i2i.yaml",
        ["generation.resolutions=[[128,64],[64,128]]", "generation.width=64", "generation.height=128"],
    )
    assert size_for_image((1000, 900), sizes) == (128, 64)


@pytest.mark.parametrize("size", [(16, 16), (16, 64), (64, 16), (10000, 2500)])
def test_pictures_that_pass(size: tuple[int, int]) -> None:
    check_picture(size)
    assert min(size_for_video(size, SD)) >= 320  # and give a video of a sensible size


@pytest.mark.parametrize(
    ("size", "parts"),
    [
        ((1, 1), ("1x1 pixels", "at least 16", "larger")),
        ((15, 400), ("15x400 pixels", "at least 16")),
        ((400, 15), ("400x15 pixels", "at least 16")),
        ((1000, 100), ("1000x100 pixels", "at most 4 times", "crop it")),
        ((100, 401), ("100x401 pixels", "at most 4 times")),
    ],
)
def test_pictures_that_do_not_pass(size: tuple[int, int], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        check_picture(size)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
