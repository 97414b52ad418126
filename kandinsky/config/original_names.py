"""Configs by the names that the original repository has for them: configs/k5_lite_t2v_5s_sft_sd.yaml.

Knows how both name a variant, and nothing of what is in the files.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)


_ORIGINAL = re.compile(r"k5_(lite|pro)_(t2v|i2v|t2i|i2i)(?:_(\d+s))?_(sft|pretrain|nocfg|distil)_(sd|hd)")


def our_config(path: Path) -> Path:
    """The file that is meant by `path`: itself where it is there, else ours for the variant that it is named after."""
    match = _ORIGINAL.fullmatch(path.stem)
    if match is None or path.exists():
        return path
    size, task, duration, kind, resolution = match.groups()
    words = [duration] if duration else []
    is_plain = size == "lite" and task == "t2v"  # the first ones, which we call by what they were trained with alone
    words += [] if is_plain else [task]
    words += ["pro"] if size == "pro" else []
    words += [kind] if is_plain or kind != "sft" else []
    words += ["hd"] if size == "pro" and resolution == "hd" else []
    ours = path.with_name(f"config_{'_'.join(words)}{path.suffix}")
    if not ours.is_file():
        return path
    logger.info("%s is %s here", path, ours.name)
    return ours
