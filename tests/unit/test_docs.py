"""What README, docs and ARCHITECTURE say is so: commands parse, files and functions exist, tables hold real numbers."""

import ast
import re
import shlex
import tomllib
from math import prod
from pathlib import Path

import pytest

from kandinsky.checkpoints.dit_layout import expected_dit_shapes
from kandinsky.config.reading import load_config
from kandinsky.runtime.compile import model_evaluations

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))}
DOCUMENTS = {"README.md": README, "ARCHITECTURE.md": ARCHITECTURE, **{f"docs/{name}.md": DOCS[name] for name in DOCS}}
# Made by commands that the documents name.
GENERATED = ("outputs", "weights", ".venv")
NAMING_NO_FILES = ("docs/gpus.md", "docs/many_prompts.md")


def table_rows(document: str, first_heading: str) -> list[list[str]]:
    """The cells of the table whose first heading this is."""
    lines = document.split(f"\n| {first_heading} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def commands(program: str) -> list[list[str]]:
    """The words of every command line in README and docs/ that runs `program`, comments off."""
    text = "\n".join((README, *DOCS.values())).replace("\\\n", " ")
    lines = re.findall(rf"(?:^|`)python {re.escape(program)} ([^`\n]*)", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_commands_parse() -> None:
    from download_models import build_parser as download_parser

    parser = load_module(REPOSITORY / "test.py")["build_parser"]()
    lines = commands("test.py")
    assert len(lines) >= 3
    for words in lines:
        args = parser.parse_intermixed_args(words)
        load_config(REPOSITORY / args.config, args.overrides)
    assert commands("download_models.py")
    for words in commands("download_models.py"):
        download_parser().parse_args(words)


def test_commands_of_the_server_parse() -> None:
    import json

    import yaml

    serve = load_module(REPOSITORY / "serve.py")
    lines = commands("serve.py")
    assert len(lines) >= 3
    docker = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    entry, default = (
        json.loads(re.search(rf"^{name} (.*)$", docker, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD")
    )
    assert entry[:2] == ["python", "serve.py"]
    for words in [*lines, [*entry[2:], *default, "--api_key", "KEY"]]:
        args = serve["checked"](serve["build_parser"]().parse_intermixed_args(words))
        for config in args.config:
            load_config(REPOSITORY / config, args.overrides)
    for name in re.findall(r"COPY ([^.].*) \./", docker)[0].split():
        assert (REPOSITORY / name).is_file()
    service = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))["services"]["kandinsky5"]
    assert service["ports"] == ["127.0.0.1:8000:8000"] and serve["KEY_VARIABLE"] in service["environment"]
    flags = {option for action in serve["build_parser"]()._actions for option in action.option_strings}
    named = {flag for row in table_rows(DOCS["serving"], "flag") for flag in re.findall(r"--\w+", row[0])}
    assert named == flags - {"-h", "--help"}


def test_addresses_of_the_server_are_named(tmp_path: Path) -> None:
    """Each in the table is one, and each is in the table; every field that is named is one of a request's."""
    pytest.importorskip("fastapi")
    from kandinsky.serving.app import create_app
    from kandinsky.serving.engine import Engine
    from kandinsky.serving.fields import DIRECTED, FIELDS
    from kandinsky.serving.variants import Catalogue, Variant

    config = load_config(REPOSITORY / "configs" / "config_tiny_t2v.yaml")
    paths = create_app(Engine(Catalogue([Variant("tiny", config)]), tmp_path, [])).openapi()["paths"]
    routes = {(method.upper(), re.sub(r"{\w+}", "{id}", path)) for path, one in paths.items() for method in one}
    named = set()
    for cell, _ in table_rows(DOCS["serving"], "address"):
        methods: list[str] = []
        for word in re.findall(r"`([^`]+)`", cell):
            method, _, path = word.rpartition(" ")
            methods = [*methods, method or path] if path.isupper() or method else methods
            if path.startswith("/"):
                named |= {(one, path) for one in methods}
                last, methods = path, []
            elif not path.isupper():
                named.add(("GET", f"{last.rpartition('/')[0]}/{path}"))
    shorter = {("GET", "/docs"), ("GET", "/v1/images/{id}/content"), ("GET", "/v1/models/{id}")}
    assert named - shorter == routes - shorter
    fields = re.search(r"Besides OpenAI's fields there are (.*?)\.", DOCS["serving"], re.DOTALL)
    assert fields is not None
    assert set(re.findall(r"`([a-z_]+)`", fields[1])) <= set(FIELDS)
    directed = {name for cell, _ in table_rows(DOCS["serving"], "field") for name in re.findall(r"`([a-z_]+)`", cell)}
    assert directed == set(DIRECTED)


def load_module(path: Path) -> dict:
    import runpy

    return runpy.run_path(str(path))


def paths_in(document: str) -> set[str]:
    """Links, and words in backticks or commands that look like files or folders of this repository."""
    links = re.findall(r"\]\(([^)#][^)]*)\)", document)
    folders = sorted(path.name for path in REPOSITORY.iterdir() if path.is_dir() and not path.name.startswith("."))
    below = rf"(?:{'|'.join({*folders, 'assets', 'benchmarks', *GENERATED})})/[\w./-]*"
    named = re.findall(rf"(?<![\w./-])({below}|[\w-]+\.(?:py|md|txt|toml))(?![\w/*])", document)
    return {path for path in {*links, *named} if path.split("/")[0] not in GENERATED and "://" not in path}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    paths = paths_in(DOCUMENTS[name])
    assert len(paths) > (10 if name in ("README.md", "ARCHITECTURE.md") else 0) or name in NAMING_NO_FILES
    modules = {path.name for path in (REPOSITORY / "kandinsky").rglob("*.py")}  # may be named without their folder
    places = (REPOSITORY, (REPOSITORY / name).parent)
    missing = sorted(path for path in paths if not any((p / path).exists() for p in places) and path not in modules)
    assert not missing


def test_readme_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 200


def test_every_document_is_linked_from_the_readme() -> None:
    assert {f"docs/{name}.md" for name in DOCS} <= {link for link in re.findall(r"\]\(([^)]+)\)", README)}


def test_model_table_is_the_configs() -> None:
    rows = table_rows(README, "config")
    assert {row[0].strip("`") for row in rows} == {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
    for name, task, seconds, pixels, steps, guidance, nfe, attention, parameters, state in rows:
        config = load_config(REPOSITORY / "configs" / f"{name.strip('`')}.yaml")
        model = config.model
        assert task == config.task
        assert float(seconds) == config.generation.time_length
        assert (int(steps), float(guidance)) == (model.num_steps, model.guidance_weight)
        assert int(nfe) == model_evaluations(model)
        assert pixels == f"{config.generation.width}x{config.generation.height}"
        assert attention == model.attention.type
        count = sum(prod(shape) for shape in expected_dit_shapes(model.dit_params).values())
        assert int(parameters.replace(",", "")) == count
        assert (
            state.startswith("runs; weights are in") if "tiny" in name else state == "to be downloaded; never run here"
        )


def test_sizes_of_downloads_are_the_parameters() -> None:
    from kandinsky.planning import weights

    qwen = weights.QWEN_PARAMETERS + weights.QWEN_HEAD_PARAMETERS + weights.QWEN_VISION_PARAMETERS
    said = re.search(
        r"Lite transformer is (\S+) GB, an image one (\S+), a Pro one\s(\S+), and .* need, ([0-9.]+):", README
    )
    assert said is not None
    counts = [int(row[8].replace(",", "")) for row in table_rows(README, "config")]
    sizes = [f"{2 * count / 1e9:.1f}" for count in (2_007_702_848, 6_022_080_576, 19_311_325_248)]
    assert all(count in counts for count in (2_007_702_848, 6_022_080_576, 19_311_325_248))
    assert list(said.groups()) == [*sizes, f"{2 * qwen / 1e9:.1f}"]


def test_flag_table_is_the_parser() -> None:
    parser = load_module(REPOSITORY / "test.py")["build_parser"]()
    flags = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert {flag for row in table_rows(DOCS["command_line"], "flag") for flag in re.findall(r"--\w+", row[0])} == flags


@pytest.mark.parametrize("name", ["proven", "exactness"])
def test_proofs_are_tests(name: str) -> None:
    rows = table_rows(DOCS[name], "what")
    proofs = [proof for row in rows for proof in re.findall(r"`(tests/[^`]+)`", row[2])]
    assert len(rows) > 5 and len(proofs) >= len(rows)
    for proof in proofs:
        path, function = proof.split("::")
        assert f"\ndef {function}(" in (REPOSITORY / path).read_text(encoding="utf-8"), proof


def test_python_example_uses_the_real_arguments() -> None:
    import inspect

    from kandinsky.loading.getters import get_I2V_pipeline, get_T2V_pipeline
    from kandinsky.pipelines.image_to_video import ImageToVideoPipeline
    from kandinsky.pipelines.text_to_video import TextToVideoPipeline

    signatures = {
        "get_T2V_pipeline": inspect.signature(get_T2V_pipeline),
        "get_I2V_pipeline": inspect.signature(get_I2V_pipeline),
        "pipe": inspect.signature(TextToVideoPipeline.__call__),
        "animate": inspect.signature(ImageToVideoPipeline.__call__),
    }
    calls_alone = DOCS["python"].split("## Stage by stage")[0]  # the stages are run, by tests/e2e/test_python_api.py
    blocks = re.findall(r"```python\n(.*?)```", README + calls_alone, flags=re.DOTALL)
    calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == set(signatures)
    for call in calls:
        assert {keyword.arg for keyword in call.keywords} <= set(signatures[ast.unparse(call.func)].parameters)


def test_arguments_of_the_calls_are_named() -> None:
    """Every argument in the table is one of the calls'; every one that all calls have in common and is not a number or
    a path is in the table."""
    import inspect

    from kandinsky.loading.assemble import PIPELINES

    parameters = [set(inspect.signature(pipeline.__call__).parameters) for pipeline in PIPELINES.values()]
    rows = table_rows(DOCS["python"], "argument")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named <= set.union(*parameters)
    plain = {"self", "width", "height", "num_steps", "guidance_weight", "scheduler_scale", "expand_prompts"}
    assert set.intersection(*parameters) - plain - {"save_path", "progress"} <= named


def test_functions_of_a_request_exist() -> None:
    """Every `name` in the life of a request that stands for a function, a method or a class of the package."""
    life = ARCHITECTURE.split("## The life of a request")[1].split("\n## ")[0]
    sources = [REPOSITORY / "test.py", *(REPOSITORY / "kandinsky").rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    defined = {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    names = {name for name in re.findall(r"`([\w.]+)`", life) if not name.endswith(".py")}
    assert len(names) > 20
    assert {name for name in names if not set(name.split(".")) <= defined} == set()


def test_memory_table_is_the_plan_s() -> None:
    from kandinsky.config.reading import preset_file
    from kandinsky.models.vae_memory import GB
    from kandinsky.planning.machine import Machine
    from kandinsky.planning.plan import default_request, make_plan

    heading = "GPU, host with 64 GB"
    presets = re.findall(r"`(\d+)gb`", DOCS["memory"].split(f"| {heading} |")[1].split("\n")[0])
    named = []
    for names, *cells in table_rows(DOCS["memory"], heading):
        for name in re.findall(r"`(\w+)`", names):
            named.append(f"config_{name}")
            for size, cell in zip(presets, cells, strict=True):
                file = REPOSITORY / "configs" / f"config_{name}.yaml"
                config = load_config(file, [], [preset_file(f"{size}gb")])
                machine = Machine(64 * GB, float(size) * 1e9)
                plan = make_plan(config, default_request(config), machine, {}, "bfloat16")
                star = "" if plan.config.runtime.blocks_on_gpu is None else "*"
                peak = f"{max(stage.gpu for stage in plan.stages) / GB:.1f}{star}"
                assert cell == ("no" if plan.refusal else peak), (name, size)
    published = {path.stem for path in (REPOSITORY / "configs").glob("*.yaml") if "tiny" not in path.stem}
    assert sorted(named) == sorted(published)


def test_lower_bounds_are_what_is_tested() -> None:
    """Of Python and torch, on which results depend: a range that nobody has tried is not claimed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    pins = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    (torch_pin,) = re.findall(r"^torch==(\d+\.\d+)", pins, flags=re.MULTILINE)
    assert f"torch>={torch_pin}" in project["project"]["dependencies"]
    python = project["project"]["requires-python"].removeprefix(">=")
    assert f"on Python {python}." in pins
    assert project["tool"]["mypy"]["python_version"] == python
    assert project["tool"]["ruff"]["target-version"] == f"py{python.replace('.', '')}"
