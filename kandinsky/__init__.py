"""Kandinsky 5: video and images from text and pictures.

The public API, imported lazily: `import kandinsky` costs nothing and does not load torch. A name is looked up in its
module the first time somebody asks for it. This file knows names and modules, nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kandinsky.config.reading import load_config
    from kandinsky.diffusers_calls.media import export_to_video, load_image
    from kandinsky.diffusers_calls.pipelines import (
        Kandinsky5I2IPipeline,
        Kandinsky5I2VPipeline,
        Kandinsky5T2IPipeline,
        Kandinsky5T2VPipeline,
    )
    from kandinsky.loading.getters import get_I2I_pipeline, get_I2V_pipeline, get_T2I_pipeline, get_T2V_pipeline
    from kandinsky.serving.extend_video import extend_video

__version__ = "0.1.0"
_HOME = {
    "get_T2V_pipeline": "kandinsky.loading.getters",
    "get_I2V_pipeline": "kandinsky.loading.getters",
    "get_T2I_pipeline": "kandinsky.loading.getters",
    "get_I2I_pipeline": "kandinsky.loading.getters",
    "extend_video": "kandinsky.serving.extend_video",
    "load_config": "kandinsky.config",
    "Kandinsky5T2VPipeline": "kandinsky.diffusers_calls.pipelines",
    "Kandinsky5I2VPipeline": "kandinsky.diffusers_calls.pipelines",
    "Kandinsky5T2IPipeline": "kandinsky.diffusers_calls.pipelines",
    "Kandinsky5I2IPipeline": "kandinsky.diffusers_calls.pipelines",
    "export_to_video": "kandinsky.diffusers_calls.media",
    "load_image": "kandinsky.diffusers_calls.media",
}
__all__ = [
    "get_T2V_pipeline",
    "get_I2V_pipeline",
    "get_T2I_pipeline",
    "get_I2I_pipeline",
    "extend_video",
    "load_config",
    "Kandinsky5T2VPipeline",
    "Kandinsky5I2VPipeline",
    "Kandinsky5T2IPipeline",
    "Kandinsky5I2IPipeline",
    "export_to_video",
    "load_image",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
