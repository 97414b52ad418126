"""What ComfyUI imports where a clone of this repository lies in its `custom_nodes` (comfyui/README.md).

Nobody else does: the repository's folder is no package, and `kandinsky` is imported by its own name.
"""

from .comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
