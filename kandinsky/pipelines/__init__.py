"""Pipelines: encode -> denoise -> decode, written once in `base.py`; one file a task for its call signature."""
