"""What a variant is made of: the YAML file, checked, with every default filled in, as frozen dataclasses."""

from kandinsky.config.reading import load_config
from kandinsky.config.schema import Config

__all__ = ["Config", "load_config"]
