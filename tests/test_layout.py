"""Rules of the house that a reader of one file cannot see, held by reading the source."""

import ast
import socket
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ddpm_hf"
MODULES = sorted(SOURCE.rglob("*.py"))
# From the ground up: a room, which is a module or a folder with all that is in it, imports from its
# own floor and those below.
FLOORS = (
    {
        "diffusion",
        "image_batches",
        "inference_optimization",
        "inference_settings",
        "json_records",
        "model_options",
        "option_parser",
        "options",
        "paths",
        "randomness",
        "run_record",
        "scheduler_spec",
        "utils",
    },
    {
        "evaluation_options",
        "losses",
        "decoders",
        "editing",
        "timestep_samplers",
        "weightings",
        "data",
        "hub",
        "pictures",
        "sampling",
    },
    {
        "likelihood",
        "calibration",
        "trajectory_timesteps",
        "evaluation",
        "openai_conversion",
        "post_hoc_ema",
    },
    {"app", "training"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# What travels with the weights may rely on nothing that a reader with stock diffusers lacks.
TRAVELLERS = sorted((SOURCE / "diffusion").glob("*"))
TRAVEL_WITH = {"torch", "numpy", "PIL", "diffusers", "huggingface_hub", "safetensors"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path): path for path in MODULES}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, in functions too; `from a import b` is a.b."""
    package = ["ddpm_hf", *path.relative_to(SOURCE).parts[:-1]]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def our_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports; a name of the package itself is none."""
    found = set()
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "ddpm_hf":
            ends = range(len(parts), 1, -1)
            found |= {next((n for n in (".".join(parts[1:end]) for end in ends) if n in NAMES), "")}
    return found - {"", module_name(path)}


def floor(name: str) -> int:
    room = name.split(".")[0]
    floors = [rank for rank, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"give {name} its place in FLOORS"
    return floors[0]


def test_imports_point_from_the_command_line_down_to_the_mathematics():
    upward = {
        f"{name} -> {other}"
        for name in NAMES.keys() - {"__init__"}
        for other in our_imports(NAMES[name])
        if floor(other) > floor(name)
    }
    assert upward == set()


def test_no_module_imports_itself_through_others():
    # __init__ names every public module, and loads none of them before it is asked.
    graph = {name: our_imports(path) for name, path in NAMES.items() if name != "__init__"}
    TopologicalSorter(graph).prepare()


def test_the_folder_that_travels_needs_only_what_its_reader_has():
    """Its copies lie side by side, where only `from . import` finds them."""
    assert [path.name for path in TRAVELLERS if path.suffix != ".py"] in ([], ["__pycache__"])
    reliable = TRAVEL_WITH | sys.stdlib_module_names
    modules = [path for path in TRAVELLERS if path.suffix == ".py"]
    foreign = {
        f"{path.name}: {name}"
        for path in modules
        for name in imported_names(path)
        if name.split(".")[0] not in reliable and not name.startswith("ddpm_hf.diffusion.")
    }
    assert foreign == set()
    absolute = {
        f"{path.name}: {node.module}"
        for path in modules
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and not node.level
        if (node.module or "").startswith("ddpm_hf")
    }
    assert absolute == set()


def test_a_check_of_input_is_no_assert():
    """`python -O` drops asserts, and an AssertionError tells a user nothing."""
    asserts = {
        f"{path.name}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assert)
    }
    assert asserts == set()


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public names without a docstring; a `check_...` says in its name all that it does."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
            continue  # described where it is implemented
        if ast.get_docstring(node) is None and not node.name.startswith("check_"):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


def test_everything_public_is_documented():
    assert [str(path) for path in MODULES if not ast.get_docstring(parse(path))] == []
    missing = {
        f"{module_name(path)}.{name}"
        for path in MODULES
        for name in undocumented(parse(path).body, "")
    }
    assert missing == set()


def written_files() -> list[Path]:
    """What people wrote: code, prose and configuration, without the licence and the pictures."""
    folders = (ROOT / name for name in ("src", "tests", "training", ".ci", ".github"))
    files = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".txt", ".json", ""}
    return [path for path in files if path.is_file() and path.suffix in kinds]


def test_code_is_ascii():
    code = [path for path in written_files() if path.suffix not in {".md", ".json"}]
    assert [str(path) for path in code if not path.read_text(encoding="utf-8").isascii()] == []


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("hub.invalid", 443)])
def test_no_test_reaches_another_machine(address):
    with pytest.raises(RuntimeError, match="loopback"):
        socket.create_connection(address, timeout=1)
