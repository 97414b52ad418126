"""What people type, paste and save: configs, calls, flags, pictures and files of prompts, each spoiled at random.

Every case is refused in one clear line or taken; see tests/robustness/fuzzing.py.
"""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageCms

from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config
from kandinsky.pictures import FORMATS, MAX_MEGAPIXELS, load_image
from kandinsky.request import resolve_request
from kandinsky.serving.batch import resolve_jobs
from kandinsky.serving.prompts_file import COLUMNS, MOST_TOLD, RowMistakes, read_prompts
from tests.robustness.fuzzing import (
    NASTY_BYTES,
    NASTY_TEXTS,
    NASTY_VALUES,
    assert_clear,
    fuzz,
    spoiled_bytes,
    spoiled_json,
    spoiled_value,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config_of(name: str) -> Config:
    return load_config(CONFIGS / f"config_{name}.yaml")


# --------------------------------------------------------------------------------------------------- YAML and overrides

SYNTAX = (
    *(b"&a [*a]", b"*b", b"!!python/object/apply:os.system [ls]", b"${model}", b"${oc.env:HOME}", b"${oc.env:NO_SUCH}"),
    *(b"|\n", b">-", b"? x", b"2024-13-45", b"0o9", b"190:20:30", b"???", b"<<", b"%", b"${${model}}", b"1_0", b".nan"),
)
TEXTS = ("1" + "0" * 400, "[1", "{a: b}", "${model}", "a=b", "~", "1e400", "0x" + "f" * 5000)


def keys_of(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def spoiled_yaml(rng: Random, config: dict[str, Any]) -> bytes:
    """Mostly YAML that says something else, sometimes YAML with other syntax, sometimes none."""
    kind = rng.random()
    if kind < 0.5:
        text = yaml.safe_dump(spoiled_value(rng, config), allow_unicode=rng.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    if kind < 0.65:
        return spoiled_json(rng, config)
    if kind < 0.7:
        return "".join(f"{' ' * i}a:\n" for i in range(rng.choice((10, 90, 300, 990, 2000)))).encode()
    content = yaml.safe_dump(config).encode()
    if kind < 0.85:
        at = rng.choice([i for i, byte in enumerate(content) if byte == ord(":")])
        return content[:at] + b": " + rng.choice(SYNTAX) + b"\n" * rng.randrange(2) + content[at + 1 :]
    return spoiled_bytes(rng, content)


def spoiled_overrides(rng: Random, keys: list[str]) -> list[str]:
    """Some key=value, of keys that there are or nearly are, and values that may be anything."""
    overrides = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        key = rng.choice(keys) if rng.random() < 0.8 else rng.choice((*NASTY_TEXTS, "model..x", "model.num_step", "x"))
        value = rng.choice((*map(repr, NASTY_VALUES[:20]), *NASTY_TEXTS, *TEXTS))
        overrides.append(f"{key}={value}" if rng.random() < 0.95 else key)
    return overrides


def test_fuzz_configs(tmp_path: Path) -> None:
    seeds = [yaml.safe_load(path.read_text()) for path in sorted(CONFIGS.glob("config_*.yaml"))]
    keys = sorted({key for seed in seeds for key in keys_of(seed)})
    path = tmp_path / "a.yaml"

    def case(rng: Random) -> None:
        config = copy.deepcopy(rng.choice(seeds))
        path.write_bytes(spoiled_yaml(rng, config) if rng.random() < 0.75 else yaml.safe_dump(config).encode())
        load_config(path, spoiled_overrides(rng, keys))

    fuzz(case)


# ------------------------------------------------------------------------------------------------------ calls and flags


def test_fuzz_requests() -> None:
    """What Python calls ask for, with values of any type."""
    configs = [config_of(name) for name in ("tiny_t2v", "tiny_i2v", "t2i", "10s_sft")]
    plain: dict[str, Any] = {
        **{"text": "a cat", "samples_per_prompt": 1, "time_length": 1, "num_frames": 25, "width": 512, "height": 512},
        **{"seed": 1, "num_steps": 3, "guidance_weight": 2.0, "scheduler_scale": 3.0, "guidance_interval": [0.1, 0.9]},
        **{"guidance_every": 2, "negative_caption": "x", "max_sequence_length": 7, "expand_prompts": True},
    }
    numpys = np.int64(3), np.float32(0.5), np.bool_(True), np.zeros(2), np.array("x")
    anything = *NASTY_VALUES, *numpys, 3j, b"x", (), (1, 2), {1}

    def case(rng: Random) -> None:
        given = {name: plain[name] for name in rng.sample(sorted(plain), rng.randint(0, 6))} | {"text": "a cat"}
        given |= {name: rng.choice(anything) for name in rng.sample(sorted(plain), rng.randint(1, 2))}
        sizes = [(rng.choice((0, 1, 16, 100, 10**9)), rng.choice((1, 16, 100)))] if rng.random() < 0.3 else []
        request = resolve_request(rng.choice(configs), image_sizes=sizes, **given)
        numbers = (request.width, request.height, request.num_frames, request.num_steps, request.guidance_every)
        assert all(type(number) is int and number > 0 for number in numbers)
        assert type(request.guidance_weight) is type(request.scheduler_scale) is float

    fuzz(case)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to be in, with a picture and a file of prompts, and a command line that ends where models are loaded."""
    from kandinsky.loading import assemble as loading

    def stop(*_: Any, **__: Any) -> None:
        raise ValueError("here the models are loaded")

    for name in ("load_pipeline", "load_for_decoding"):
        monkeypatch.setattr(loading, name, stop)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "a" / "b"  # so that ../x is still the test's
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    Image.new("RGB", (128, 128)).save("a.png")
    Path("a.csv").write_text("prompt,seed\nx,1\ny,\n")
    Path("a.latents.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return folder


GOOD = {
    **{"--prompt": "a red circle", "--image": "a.png", "--negative_prompt": "x", "--width": "128", "--height": "128"},
    **{"--video_duration": "1", "--sample_steps": "2", "--guidance_weight": "2", "--scheduler_scale": "3"},
    **{"--seed": "1", "--output_filename": "out.mp4", "--output_dir": "out", "--prompts_file": "a.csv"},
    **{"--guidance_every": "2", "--decode_latents": "a.latents.safetensors", "--resume_from": "a.png"},
    **{"--config": str(CONFIGS / "config_tiny_t2v.yaml"), "--lora": "a:1", "--compile": "off", "--preview": "1"},
    **{"--blocks_on_gpu": "2", "--cfg_parallel": "1", "--device_preset": "12gb", "--dit_quantization": "int8"},
    **{"--memory_gb": "12", "--host_memory_gb": "30", "--device": "cpu", "--dtype": "float32"},
    **{"--cache_dir": "weights", "--attention_engine": "sdpa", "--expand_prompt": "off", "--guidance_interval": "0"},
}
SWITCHES = ("--plan", "--resume", "--data_parallel", "--offload", "--magcache", "--nope", "--", "-1")


def test_fuzz_flags(no_loading: Path, cli: ModuleType) -> None:
    """All flags but those that fetch or start something, with good values, bad ones and none, in any order."""
    configs = [str(CONFIGS / f"config_{name}.yaml") for name in ("tiny_t2v", "tiny_t2i", "tiny_i2v", "5s_sft")]
    texts = [text for text in NASTY_TEXTS if "\0" not in text]  # no command line can have that
    starts = (["--prompt", "x"], [], ["--prompt", "a", "red", "circle"])

    def case(rng: Random) -> None:
        words = ["--config", rng.choice(configs), *rng.choice(starts)]
        for flag in rng.sample(sorted(GOOD), rng.randint(0, 4)):
            bad = rng.choice((*texts, "0", "-1", "1e400", "nan", "9" * 400))
            words += [flag, GOOD[flag] if rng.random() < 0.6 else bad][: 1 if rng.random() < 0.05 else 2]
        words += rng.sample(SWITCHES, rng.choice((0, 0, 1)))
        words += rng.sample(texts, rng.choice((0, 0, 0, 1)))
        run(cli, words)

    fuzz(case, cases=200)


def run(cli: ModuleType, words: list[str]) -> None:
    """Run the command line, and raise ValueError with what it says where it refuses."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as error:
            code = error.code
    if code != 0:
        lines = err.getvalue().removesuffix("\n").split("\n")
        assert code == 2 and all(line.startswith("error: ") for line in lines), (code, lines)
        for line in lines[1:]:  # of several rows
            assert_clear(line)
        raise ValueError(lines[0].removeprefix("error: "))


# ------------------------------------------------------------------------------------------------------------- pictures

FOREIGN = (
    *(b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"P6 4 4 255 ", b"%PDF-1.7", b"\0\0\0\x1cftypavif", b"qoif", b"DDS "),
    *(b"icns", b"\x89HDF\r\n\x1a\n", b"GIMP", b"8BPS", b"\0\0\1\0", b"\xff\x4f\xff\x51", b"BLP2", b"SIMPLE  ="),
)


def pictures() -> list[bytes]:
    """Small ones of each format and kind of pixel, with EXIF and a profile where they can have them."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    contents = []
    for kind in FORMATS:
        for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "LA"):
            picture = noise.convert("L").convert("I;16") if mode == "I;16" else noise.convert(mode)
            file = io.BytesIO()
            try:
                picture.save(file, kind, exif=exif, icc_profile=profile)
            except (OSError, ValueError, KeyError):
                continue  # no such picture in this format
            contents.append(file.getvalue())
    return contents


def with_other_sizes(rng: Random, content: bytes) -> bytes:
    """With some of the numbers in its beginning replaced: of what is allocated before it is looked at."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, min(len(content) - 4, 100)))
        number = rng.choice((0, 1, 255, 256, 4000, 8000, 9000, 65535, 2**31 - 1, 2**32 - 1))
        changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
    return bytes(changed)


def test_fuzz_pictures(tmp_path: Path) -> None:
    seeds = pictures()
    assert len(seeds) > 20
    path = tmp_path / "a.png"

    def case(rng: Random) -> None:
        content, kind = rng.choice(seeds), rng.random()
        if kind < 0.6:
            content = spoiled_bytes(rng, content)
        elif kind < 0.9:
            content = with_other_sizes(rng, content)
        else:
            content = rng.choice((*FOREIGN, *NASTY_BYTES)) + rng.randbytes(rng.choice((0, 1, 100)))
        path.write_bytes(content)
        image = load_image(path)
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_MEGAPIXELS * 1_000_000

    fuzz(case)


# ---------------------------------------------------------------------------------------------------- files of prompts


def table_of(rng: Random, rows: list[Any], between: str) -> bytes:
    """Rows as a spreadsheet has them, in quotes or without."""

    def text(value: Any) -> str:
        return "" if value is None else value[:5000] if isinstance(value, str) else json.dumps(value)[:5000]

    names = [*COLUMNS, "mood"]
    cells = [[text(row.get(name)) for name in names] for row in rows if isinstance(row, dict)]
    if rng.random() < 0.5:
        cells = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    lines = [between.join(row) for row in (names, *cells)]
    return rng.choice(("\n", "\r\n", "\r")).join(lines).encode("utf-8", "surrogatepass")


def spoiled_file(rng: Random, rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    """The suffix and the content of a file."""
    spoiled = spoiled_value(rng, rows) if rng.random() < 0.7 else rows
    spoiled = spoiled if isinstance(spoiled, list) else [spoiled]
    suffix = rng.choice((".txt", ".csv", ".tsv", ".jsonl"))
    if suffix == ".jsonl":
        lines = [spoiled_json(rng, row) if rng.random() < 0.2 else json.dumps(row).encode() for row in spoiled]
        content = b"\n".join(lines)
    else:
        content = table_of(rng, spoiled, "\t" if suffix == ".tsv" else rng.choice(",;\t"))
    return suffix, spoiled_bytes(rng, content) if rng.random() < 0.4 else content


def test_fuzz_files_of_prompts(no_loading: Path) -> None:
    configs = [config_of("tiny_t2v"), config_of("tiny_i2v")]
    rows = [
        {"prompt": "a red circle", "seed": 1, "output": "x.png"},
        {"prompt": "синий квадрат", "width": 128, "height": 128, "negative_prompt": "x", "image": "a.png"},
        {"prompt": 'a "quoted", one', "seed": 7.0, "mood": "calm"},
    ]

    def case(rng: Random) -> None:
        suffix, content = spoiled_file(rng, rows)
        path = no_loading / f"a{suffix}"
        path.write_bytes(content)
        try:
            found = read_prompts(path)
            picture = no_loading / "a.png" if rng.random() < 0.5 else None
            jobs = resolve_jobs(rng.choice(configs), path, found, no_loading / "out", image=picture, time_length=0)
        except RowMistakes as error:
            assert len(error.mistakes) <= MOST_TOLD + 1
            for mistake in error.mistakes:
                assert_clear(mistake)
        else:
            assert len(jobs) == len(found) and len({job.output for job in jobs}) == len(jobs)

    fuzz(case)
