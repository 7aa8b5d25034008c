"""The floor plan: imports go downwards, torch stays in integrations, importing is light."""

import ast
import subprocess
import sys
import typing
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "catversion_jax"

# Longest prefix wins. The table in CONTRIBUTING.md says the same in words.
FLOORS = {
    "errors": 0,
    "array_types": 0,
    "atomic_files": 0,
    "bucket_paths": 0,
    "assets": 0,
    "residual": 0,
    "token_embeddings": 0,
    "learned": 0,
    "config": 0,
    "presets": 0,
    "config_ranges": 0,
    "concepts": 0,
    "sampling_settings": 0,
    "mask_settings": 0,
    "models": 1,
    "diffusion": 1,
    "samplers": 1,
    "images": 2,
    "data": 2,
    "objective": 2,
    "sharding": 2,
    "processes": 2,
    "foreign_files": 2,
    "export": 2,
    "learned_tensors": 2,
    "attention_mass": 2,
    "official_adapter": 2,
    "grids": 2,
    "concept_report": 2,
    "image_requests": 2,
    "object_masks": 2,
    "mask_files": 2,
    "training": 4,
    "sampling": 3,
    "evaluation": 3,
    "prompt_embeds": 3,
    "cross_attention_masks": 3,
    "report": 4,
    "planning": 5,
    "cli": 6,
    "integrations": 6,
}


def module_names() -> list[str]:
    return sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    )


def imported(module: str) -> set[str]:
    """Modules of the package that ``module`` imports anywhere, except for type checking only."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def floor(module: str) -> int:
    return FLOORS[module.split(".")[0]]


@pytest.mark.parametrize("module", module_names())
def test_a_floor_imports_only_lower_floors_or_its_own(module: str) -> None:
    assert module.split(".")[0] in FLOORS, f"{module}: give it a floor here and in CONTRIBUTING.md"
    own = {
        name.removeprefix("catversion_jax.")
        for name in imported(module)
        if name.startswith("catversion_jax.")
    }
    upwards = {name for name in own if name.split(".")[0] in FLOORS and floor(name) > floor(module)}
    assert not upwards, f"{module} (floor {floor(module)}) imports upwards: {upwards}"


@pytest.mark.parametrize("module", module_names())
def test_torch_lives_in_integrations_only(module: str) -> None:
    tops = {name.split(".")[0] for name in imported(module)}
    if not module.startswith("integrations"):
        assert not tops & {"torch", "diffusers"}, f"{module}: the base install has no torch"


def test_the_choices_of_when_are_written_once() -> None:
    """Apart from the type in config.py, which must say the same."""
    from catversion_jax.concepts.fields import WHEN
    from catversion_jax.config import TrainConfig

    assert typing.get_args(typing.get_type_hints(TrainConfig)["when"]) == WHEN
    lists = {
        module
        for module in module_names()
        for node in ast.walk(ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text()))
        if isinstance(node, ast.Tuple | ast.List)
        and [getattr(item, "value", None) for item in node.elts] == list(WHEN)
    }
    assert lists == {"concepts.fields", "config"}


def test_files_stay_readable() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")
    }
    too_long = {str(path): length for path, length in lengths.items() if length > 450}
    assert not too_long
    assert sorted(lengths.values())[len(lengths) // 2] < 200


def test_import_is_light() -> None:
    program = (
        "import os, sys; before = dict(os.environ); import catversion_jax; "
        "heavy = {'jax', 'flax', 'torch', 'numpy', 'transformers', 'datasets'} & set(sys.modules); "
        "assert not heavy, heavy; assert dict(os.environ) == before; "
        "assert set(catversion_jax.__all__) <= set(dir(catversion_jax))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_public_names_resolve_without_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None; "
        "import catversion_jax as c; "
        "assert all(getattr(c, name) is not None for name in c.__all__)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)
