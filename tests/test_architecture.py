"""The floor plan: rooms in order, no circles, torch in integrations only, a light import."""

import ast
import runpy
import subprocess
import sys
import typing
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "catversion_jax"


def room_table() -> dict[str, int]:
    """The rooms of CONTRIBUTING's floor plan, each with its place in the order.

    The picture of the architecture is drawn from the same reading.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    plan = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["read_rooms"](text)
    rooms = [room.name.removesuffix("/").removesuffix(".py") for room in plan]
    assert len(rooms) == len(set(rooms)) > 10, rooms
    return {room: place for place, room in enumerate(rooms)}


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, *, typing_too: bool = False) -> set[str]:
    """Names that a file imports anywhere, except for type checking only (or these as well)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only and not typing_too:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def arrows() -> dict[str, set[str]]:
    """For every module of the package, the modules of the package that it imports."""
    modules = files()
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set()
        for name in imported(path):
            while name and name not in modules:  # the module in which an imported name stands
                name = name.rpartition(".")[0]
            if name and name != module:
                targets.add(name)
        graph[module] = targets
    return graph


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_rooms_stand_in_order_and_nothing_goes_in_a_circle() -> None:
    """The package's root holds rooms and four files; a room imports those above it in the table."""
    rooms, graph = room_table(), arrows()
    on_disk = {
        path.name
        for path in PACKAGE.iterdir()
        if path.name != "__pycache__" and (path.is_file() or any(path.rglob("*.py")))
    }
    folders = {room for room in rooms if (PACKAGE / room).is_dir()}
    assert on_disk == folders | {"__init__.py", "errors.py", "array_types.py", "py.typed"}
    assert set(rooms) == folders | {"errors", "array_types"}
    downwards = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if room_of(module) and room_of(target) and rooms[room_of(target)] > rooms[room_of(module)]
    ]
    assert not downwards, "a room imports only rooms above it in CONTRIBUTING's table"
    assert not circle(graph), "files import each other in a circle"
    between_rooms: dict[str, set[str]] = {room: set() for room in rooms}
    for module, targets in graph.items():
        if room := room_of(module):
            between_rooms[room] |= {room_of(t) for t in targets} - {room, ""}
    assert not circle(between_rooms), "rooms import each other in a circle"


def test_torch_lives_in_integrations_only() -> None:
    """The base install has no torch."""
    using = {
        module
        for module, path in files().items()
        if {name.split(".")[0] for name in imported(path)} & {"torch", "diffusers"}
    }
    assert using
    assert all(room_of(module) == "integrations" for module in using), using


def test_the_choices_of_when_are_written_once() -> None:
    """Apart from the type of the option, which must say the same."""
    from catversion_jax.concepts.fields import WHEN
    from catversion_jax.config import TrainConfig

    assert typing.get_args(typing.get_type_hints(TrainConfig)["when"]) == WHEN
    lists = {
        module
        for module, path in files().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple | ast.List)
        and [getattr(item, "value", None) for item in node.elts] == list(WHEN)
    }
    assert len(lists) == 2, lists


def test_only_the_start_takes_all_options() -> None:
    """A function takes the group of options that it needs; a server is a start too."""
    holders = {
        module
        for module, path in files().items()
        if "TrainConfig" in {name.rpartition(".")[2] for name in imported(path, typing_too=True)}
    }
    others = {m for m in holders if room_of(m) not in ("config", "cli")}
    starts = {"training.start", "training.live", "serving.server", "serving.worker"}
    assert others <= {"catversion_jax", *(f"catversion_jax.{name}" for name in starts)}, others


def test_files_stay_readable() -> None:
    """No Python file that git knows is above 400 lines; the package's median is at most 150."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    paths = {path for name in listed.split("\0") if (path := ROOT / name).is_file()}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {str(path): length for path, length in lengths.items() if length > 400}
    of_package = sorted(lengths[path] for path in paths if path.is_relative_to(PACKAGE))
    assert of_package[len(of_package) // 2] <= 150


def test_test_files_borrow_nothing_from_each_other() -> None:
    """What several of them need stands in a file of its own, such as ``tests/running.py``."""
    borrowed = [
        f"{path.name} imports {name}"
        for path in (ROOT / "tests").glob("*.py")
        for name in imported(path)
        if name.startswith(("test_", "conftest"))
    ]
    assert not borrowed


def test_import_is_light() -> None:
    program = (
        "import os, sys; before = dict(os.environ); import catversion_jax; "
        "heavy = {'jax', 'flax', 'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; assert dict(os.environ) == before; "
        "assert set(catversion_jax.__all__) <= set(dir(catversion_jax))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_public_names_resolve_without_torch() -> None:
    program = """
import sys
from importlib.abc import MetaPathFinder

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NotInstalled())
import catversion_jax as c
assert all(getattr(c, name) is not None for name in c.__all__)
assert not {"torch", "diffusers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)
