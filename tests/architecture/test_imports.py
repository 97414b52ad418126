"""Imports point downward only: the floors of the house, checked over the syntax trees of all of kandinsky/.

A room (a module, or a package like models/) may import itself and rooms on lower floors, never one above it or beside
it, wherever the import stands: at the top, in a function, or for type checkers only. `python -c "import ..."` in fresh
interpreters checks what the trees can't: that the light modules don't load torch by way of somebody else.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# From the roof to the ground. A new file in kandinsky/ gets its place here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__",),  # with test.py, serve.py, comfyui/, tools/ and benchmarks/ outside of the package
    ("commands",),
    ("serving", "diffusers_calls"),
    ("loading",),
    ("pipelines", "runtime", "planning"),
    ("outputs",),
    ("run_state",),
    ("text", "sampling", "request", "clips", "keyframes"),
    ("models", "sizes", "coarse", "frames", "pictures"),
    ("attention", "checkpoints"),
    ("config",),
    ("common",),
)
FLOOR_OF = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms, and files of rooms, that come without torch, so that `test.py --help` and a mistyped flag answer at once.
WITHOUT_TORCH = (
    *("__init__", "config", "sizes", "coarse", "frames", "pictures", "request", "clips", "keyframes"),
    *("common", "checkpoints", "planning", "serving", "commands"),
    *("outputs.media", "outputs.records", "outputs.latents_file", "outputs.resume", "outputs.sources", "text.prompts"),
    "outputs.post",
)
# Front doors with what they alone know, and what is only there for tests.
FOREIGN = ("test", "tests", "tools", "benchmarks", "diffusers", "comfyui", "comfy", "folder_paths")
ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
COMMAND_LINE = "commands"  # where printing is the work, and launchers tell by variables who one is
MAY_READ_IT = (
    "runtime/compile.py",
    "runtime/prompt_cache.py",
)  # where this user's caches are, which is for the desktop to say and not for us


def room_of(module: str) -> str:
    """kandinsky.models.dit -> models; kandinsky itself -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, absolute and relative, and of import_module("..." )."""
    here = module_of(path, package).split(".")
    folder = here if path.stem == "__init__" else here[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if source != package.name:
                    yield node.lineno, source
                elif not alias.name.startswith("__"):  # __version__ and its like are data, not a way in
                    below = package / alias.name
                    is_module = below.is_dir() or below.with_suffix(".py").is_file()
                    yield node.lineno, f"{source}.{alias.name}" if is_module else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no bodies of functions, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_at_import(child)


def wrong_imports(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    room = room_of(module_of(path, package))
    if room not in FLOOR_OF:
        yield 1, f"{room} has no floor: give it its place in FLOORS"
        return
    for line, target in imports_of(tree, path, package):
        top = target.split(".")[0]
        if top in FOREIGN:
            yield line, f"{room} imports {target}, which is not part of the package"
        elif top == package.name and (other := room_of(target)) != room:
            if other not in FLOOR_OF:
                yield line, f"{room} imports {target}, which has no floor: give it its place in FLOORS"
            elif FLOOR_OF[other] >= FLOOR_OF[room]:
                where = "beside" if FLOOR_OF[other] == FLOOR_OF[room] else "above"
                yield line, f"{room} imports {target}, which is {where} it: imports point downward only"


def early_torch(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    room = room_of(module_of(path, package))
    if not {room, module_of(path, package).partition(".")[2]} & set(WITHOUT_TORCH):
        return
    for node in run_at_import(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, target in imports_of(node, path, package):
                if target.split(".")[0] == "torch" or target == "safetensors.torch":
                    yield line, f"{room} imports {target}; it has to stay light"


def manners(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    if path.relative_to(package).parts[0] == COMMAND_LINE:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno, "print(: use logging"
        elif path.relative_to(package).as_posix() in MAY_READ_IT:
            continue
        elif isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and ast.unparse(node.value) == "os":
            yield node.lineno, f"os.{node.attr}: settings come in as arguments"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ENVIRONMENT:
                    yield node.lineno, f"os.{alias.name}: settings come in as arguments"


def asks_for_devices(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Whether there is a GPU, how many, and how much memory it has free: only loading asks."""
    if room_of(module_of(path, package)) == "loading":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("is_available", "device_count", "mem_get_info"):
            yield node.lineno, f"{node.attr}: only loading asks which devices there are"


RULES = (wrong_imports, early_torch, manners, asks_for_devices)


def problems(package: Path) -> list[str]:
    """All that is wrong in a package, as "models/dit.py:3: what"."""
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for rule in RULES:
            for line, what in rule(tree, path, package):
                found.append(f"{path.relative_to(package).as_posix()}:{line}: {what}")
    return found


def test_the_house_stands() -> None:
    package = REPOSITORY / "kandinsky"
    assert (package / "models" / "dit.py").is_file()  # not green because nothing was looked at
    assert not problems(package), "\n".join(problems(package))


def test_only_the_page_imports_gradio() -> None:
    package = REPOSITORY / "kandinsky"
    found = {
        path.relative_to(package).parent.as_posix()
        for path in package.rglob("*.py")
        for _, target in imports_of(ast.parse(path.read_text(encoding="utf-8")), path, package)
        if target.split(".")[0] == "gradio"
    }
    assert found == {"serving/page"}


# ------------------------------------------------------------------------------ the checker itself can say no

GOOD = {
    "__init__.py": "def __getattr__(name):\n    from kandinsky.loading import build\n    return build",
    "loading/dit.py": "from kandinsky.pipelines.base import Pipeline\nfrom kandinsky.runtime import placement",
    "pipelines/base.py": "import torch\nfrom kandinsky import __version__, outputs\nfrom ..models.dit import DiT",
    "runtime/placement.py": "import torch\nfrom kandinsky.models.dit import DiT",
    "outputs/media.py": "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch",
    "outputs/preview.py": "import torch\nfrom kandinsky.sampling import sampler",
    "models/dit.py": "import torch\nfrom kandinsky.attention.engines import sdpa\nfrom . import layers\nimport os.path",
    "models/layers.py": "import torch",
    "attention/engines.py": "import torch\nfrom kandinsky.config import Config",
    "checkpoints/files.py": "from kandinsky.config import Config",
    "config/schema.py": "import dataclasses",
}


def build_house(folder: Path, **changes: str) -> Path:
    package = folder / "kandinsky"
    for name, source in (GOOD | changes).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


def test_checker_accepts_a_good_house(tmp_path: Path) -> None:
    assert problems(build_house(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("models/dit.py", "from kandinsky.runtime.placement import use", "models/dit.py:1: models imports"),
        ("models/dit.py", "import torch\ndef f():\n    import kandinsky.runtime", "models/dit.py:3: models imports"),
        ("models/dit.py", "from ..runtime import placement", "models/dit.py:1: models imports"),
        ("models/dit.py", "from .. import runtime", "models/dit.py:1: models imports"),
        ("models/dit.py", "from kandinsky import runtime", "models/dit.py:1: models imports"),
        ("models/dit.py", "from kandinsky import get_T2V_pipeline", "models imports kandinsky, which is above it"),
        ("models/dit.py", "import importlib\nimportlib.import_module('kandinsky.outputs')", "models/dit.py:2: models"),
        ("models/dit.py", "import diffusers", "which is not part of the package"),
        ("loading/dit.py", "def f():\n    import folder_paths", "which is not part of the package"),
        ("models/dit.py", "if TYPE_CHECKING:\n    from kandinsky.loading import build", "models/dit.py:2: models"),
        ("pipelines/base.py", "from kandinsky.runtime import placement", "which is beside it"),
        ("runtime/placement.py", "from kandinsky.pipelines.base import Pipeline", "which is beside it"),
        ("text/prompts.py", "from kandinsky.sampling.sampler import step", "which is beside it"),
        ("config/schema.py", "from kandinsky.checkpoints import files", "config imports kandinsky.checkpoints"),
        ("config/schema.py", "import torch", "it has to stay light"),
        (
            "config/schema.py",
            "try:\n    from torch.nn import Module\nexcept ImportError:\n    pass",
            "schema.py:2: config",
        ),
        ("checkpoints/files.py", "from safetensors.torch import load_file", "it has to stay light"),
        ("outputs/media.py", "from safetensors.torch import load_file", "outputs imports"),
        ("attic.py", "import dataclasses", "attic has no floor"),
        ("models/dit.py", "def f():\n    print(1)", "models/dit.py:2: print("),
        ("models/dit.py", "import torch\nx = torch.cuda.is_available()", "models/dit.py:2: is_available: only loading"),
        ("loading/dit.py", "import os\nx = os.environ['HOME']", "dit.py:2: os.environ"),
        ("loading/dit.py", "import os\nx = os.getenv('HOME')", "dit.py:2: os.getenv"),
        ("loading/dit.py", "from os import environ", "dit.py:1: os.environ"),
        ("runtime/compile.py", "import os\nprint(os.environ)", "compile.py:2: print("),
        ("runtime/prompt_cache.py", "import os\nprint(os.environ)", "prompt_cache.py:2: print("),
    ],
)
def test_checker_refuses(tmp_path: Path, name: str, source: str, expected: str) -> None:
    found = problems(build_house(tmp_path, **{name: source}))
    assert len(found) == 1, found
    assert expected in found[0]


# ------------------------------------------------------------------------------------------- in a fresh Python


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_light_modules_load_no_torch(room: str) -> None:
    """A package with all that is in it."""
    files = sorted((REPOSITORY / "kandinsky" / room).glob("*.py")) if room != "__init__" else []
    names = ["kandinsky" if room == "__init__" else f"kandinsky.{room}"]
    names += [f"kandinsky.{room}.{file.stem}" for file in files if not file.stem.startswith("__")]
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'transformers', 'diffusers'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


HEAVY = ("transformers", "diffusers", "sympy", "torch._dynamo", "torch.distributed.fsdp", "pandas", "gguf")
A_PICTURE = f"""
import sys, kandinsky
pipe = kandinsky.get_T2I_pipeline("cpu", conf_path="configs/config_tiny_t2i.yaml")
pipe("a red circle", num_steps=1, expand_prompts=False, progress=False)
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_a_picture_imports_only_what_it_needs() -> None:
    """A second of start-up each: FSDP, the compiler and what both do arithmetic with, other people's models."""
    run = subprocess.run([sys.executable, "-c", A_PICTURE], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["tools", "benchmarks"])
def test_scripts_find_the_package_before_they_import_it(folder: str) -> None:
    """Nobody has installed it: what is run by its path has only its own folder to import from."""
    scripts = [path for path in (REPOSITORY / folder).glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) > 5
    for path in scripts:
        own, found = None, None
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ImportFrom | ast.Import):
                names = [statement.module or ""] if isinstance(statement, ast.ImportFrom) else [statement.names[0].name]
                if names[0].split(".")[0] in ("kandinsky", "tools", "benchmarks", "tests"):
                    own = own or statement.lineno
            elif "sys.path.insert" in ast.unparse(statement):
                found = found or statement.lineno
        assert own is None or (found is not None and found < own), path.name


def test_public_api() -> None:
    import kandinsky
    from kandinsky.config.reading import load_config
    from kandinsky.loading.getters import get_T2V_pipeline

    assert kandinsky.load_config is load_config
    assert kandinsky.get_T2V_pipeline is get_T2V_pipeline
    assert set(kandinsky.__all__) <= set(dir(kandinsky))
    with pytest.raises(AttributeError, match="no attribute 'get_T2V'"):
        kandinsky.get_T2V  # noqa: B018
