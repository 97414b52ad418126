"""Makes this clone's `kandinsky` importable inside ComfyUI, and nothing else of the clone.

The clone's folder does not go onto sys.path: that would offer our `tests`, `tools` and `test.py` to all of ComfyUI.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "kandinsky"


def make_importable() -> None:
    """From now on `import kandinsky` is this clone's. Raises ImportError where it is another's already."""
    folder = REPOSITORY / NAME
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        places = [Path(place).resolve() for place in getattr(loaded, "__path__", [])]
        if folder not in places:
            raise ImportError(
                f"another package called {NAME} is loaded, from {places or 'nowhere'}: ComfyUI can have one of the two "
                "in custom_nodes; move the other one out"
            )
        return
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
