"""The folder for ComfyUI as far as it can be looked at without ComfyUI; test_comfyui.py runs it."""

import ast
import json
import runpy
import tomllib
from pathlib import Path

import catversion_jax

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "integrations" / "comfyui"


def test_what_it_brings_along_is_what_the_package_runs() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "comfyui" / "copy_loader.py"))
    copies = {path.name for path in (FOLDER / "loader").glob("*.py")} - {"__init__.py"}
    assert copies == set(tool["NAMES"])
    for name in copies:
        same = (FOLDER / "loader" / name).read_text() == tool["copied"](name)
        assert same, f"loader/{name} differs: run python tools/comfyui/copy_loader.py"


def test_it_needs_torch_and_safetensors_only() -> None:
    import sys

    imported = set()
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - set(sys.stdlib_module_names) == {"torch", "safetensors", "folder_paths"}


def test_its_release_is_that_of_the_package() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert project["project"]["version"] == catversion_jax.__version__
    assert project["project"]["license"] == {"text": "Apache-2.0"}
    assert project["tool"]["comfy"]["DisplayName"] == "CatVersion"


def test_the_example_workflow_spares_the_negative_prompt() -> None:
    workflow = json.loads((FOLDER / "example_workflows" / "catversion_sd15.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    sources = {link[0]: nodes[link[1]]["type"] for link in workflow["links"]}
    wired = {
        node["title"]: sources[node["inputs"][0]["link"]]
        for node in nodes.values()
        if node["type"] == "CLIPTextEncode"
    }
    assert wired == {
        "Positive prompt": "LoadCatVersionConcept",
        "Negative prompt": "CheckpointLoaderSimple",
    }
