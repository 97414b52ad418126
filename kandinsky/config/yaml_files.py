"""YAML files and key=value overrides, read into plain dicts. What keys mean is for schema.py to say.

Whatever cannot be read is a ValueError of one line: a file that is none, text that is no YAML, nesting without end.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kandinsky.common.given import shortened, shown, why_no_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEY = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"


def read_yaml(path: Path, overrides: Sequence[str], presets: Sequence[Path]) -> dict[str, Any]:
    """The file, under the presets, under the overrides. Raises ValueError for what cannot be read."""
    from omegaconf import DictConfig, OmegaConf

    if (reason := why_no_file(path)) is not None:
        raise ValueError(f"no such config file{_advice(path, reason)}")

    _check_overrides(overrides)
    layers = [_readable(partial(OmegaConf.load, file)) for file in (path, *presets)]
    config = layers[0]
    if not all(isinstance(layer, DictConfig) for layer in layers) or not isinstance(config, DictConfig):
        raise ValueError("not a config: the file is not a mapping of keys to values")
    if not config:
        raise ValueError("not a config: there is nothing in the file")
    written = OmegaConf.to_container(config)
    if isinstance(written, dict) and list(written.values()) == [None]:  # as which OmegaConf takes a file of plain text
        raise ValueError("not a config: the file is text, and not a mapping of keys to values")

    def merged() -> Any:
        config.merge_with(*layers[1:], OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)

    return _readable(merged)


def with_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What `read_yaml` returned, under further overrides. Raises ValueError for those that cannot be read."""
    from omegaconf import OmegaConf

    _check_overrides(overrides)

    def merged() -> Any:
        changed = OmegaConf.merge(OmegaConf.create(dict(raw)), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(changed)

    return _readable(merged)


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        if not re.fullmatch(f"{KEY}=.*", override, flags=re.DOTALL):
            raise ValueError(f"override {shown(override)} is not of the form key.key=value, like model.num_steps=20")


def _readable(read: Callable[[], Any]) -> Any:
    """What `read` returns; ValueError for what YAML and OmegaConf raise."""
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    try:
        return read()
    except InterpolationResolutionError as error:
        raise ValueError(f"{error.full_key}: what ${{...}} stands for is not there, or not text") from None
    except OmegaConfBaseException as error:  # whose first line is for people
        what, key = str(error).partition("\n")[0], f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"not readable as YAML: {shortened(key + what.replace('NoneType', 'null'))}") from None
    except RecursionError:
        raise ValueError("not readable as YAML: it is nested too deeply") from None
    except Exception as error:
        # YAML's own errors, and what OmegaConf stumbles over: bytes that are no text, the 32nd of a month, a number of
        # more than 4,300 digits, a document that is text in another text.
        what = shortened(str(error)) or "it is not a mapping of keys to values"
        raise ValueError(f"not readable as YAML: {what}") from None


def _advice(path: Path, reason: str) -> str:
    """What to give in place of `path`, which is no file: one in that folder, or one that is called alike."""
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.yaml") if file.is_file())
        return f": {reason}" + (f"; name a file in it, like {names[0]}" if names else "")
    if path.exists():
        return f": {reason}"
    known = {file.stem: _from_here(file) for file in _configs_in(CONFIGS)}
    known |= {file.stem: file.name for file in _configs_in(path.parent)}
    alike = [path.stem] if path.stem in known else difflib.get_close_matches(path.stem, known, n=3)
    near = " or ".join(known[name] for name in alike)
    return f"; did you mean {near}?" if near else f"; the models' configs are in {_from_here(CONFIGS)}"


def _configs_in(folder: Path) -> list[Path]:
    """Files of a folder that may be configs of models: those of other programs have no section called model."""
    files = sorted(file for file in folder.glob("*.yaml") if why_no_file(file) is None) if folder.is_dir() else []
    return [file for file in files if re.search(rb"^model:", file.read_bytes()[:100_000], re.MULTILINE)]


def _from_here(path: Path) -> str:
    """As it is called from the current folder, where it lies in that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
