"""Nodes for ComfyUI. Only this folder imports its modules: `kandinsky` does the work and knows none of them."""

from .package import make_importable

make_importable()

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402  (it imports `kandinsky`)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
