"""The documentation says what the code does: the picture, links, the concept file's page."""

import argparse
import dataclasses
import importlib
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import catversion_jax
from catversion_jax import KVResidual, load_backbone, save_concept
from catversion_jax.assets import embedded_folder
from catversion_jax.cli import COMMANDS
from catversion_jax.methods.per_encoder import PerEncoder
from catversion_jax.methods.token_embeddings import TokenEmbeddings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("catversion_jax/assets/**/*.md")]
)


def test_help_texts_are_words_and_not_markup() -> None:
    """The reference of the commands has two cells in a row, and no tag or emphasis by accident."""
    page = runpy.run_path(str(DOCS / "generated.py"))["commands"]()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert any("RUN" in row and "IMAGES" in row for row in rows)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    without_code = re.sub(r"^```.*?^```|`[^`]*`", "", page, flags=re.M | re.S)
    assert not re.findall(r"(?<!\\)[*_<]", without_code)


def test_commands_in_the_guides_are_seen_whole() -> None:
    """A code block of the site shows about 104 letters of a line; the rest waits behind a bar."""
    guides = [path for path in PAGES if path.is_relative_to(DOCS)]
    written_by_hand = [path for path in guides if path.name != "study.md"]
    assert len(written_by_hand) > 20
    long = [
        f"{path.name}: {line}"
        for path in written_by_hand
        for block in re.findall(r"^```.*?\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
        for line in block.splitlines()
        if len(line) > 104
    ]
    assert not long


def test_the_picture_of_the_architecture_is_the_floor_plan_drawn() -> None:
    """``python docs/architecture.py`` would change nothing."""
    script = runpy.run_path(str(DOCS / "architecture.py"))
    plan = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = script["read_rooms"](plan)
    drawn = script["draw"](rooms)
    assert drawn == script["PICTURE"].read_text(encoding="utf-8")
    folders = {path.name + "/" for path in (ROOT / "catversion_jax").iterdir() if path.is_dir()}
    shown = {room.name for room in rooms}
    assert folders - {"__pycache__/"} <= shown
    assert all(f">{name}<" in drawn for name in shown)


def test_links_between_pages_lead_somewhere() -> None:
    """Files that Markdown links and images name are there; so are the headings."""
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = (page.parent / path) if path else page
            if not file.exists() or (heading and heading not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_files_that_pages_name_are_there() -> None:
    """Paths from the repository's root, and rooms' files by their path in the package."""
    roots = "tests|tools|benchmarks|configs|docs|catversion_jax"
    rooms = "|".join(path.name for path in (ROOT / "catversion_jax").iterdir() if path.is_dir())
    made_by_hand = {"benchmarks/results/step_gpu.json"}
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        paths = re.findall(rf"(?<![\w/.-])((?:{roots})/[\w/.-]+\.\w+)", text)
        paths += re.findall(r"`(test_\w+\.py)`", text)
        paths += [f"catversion_jax/{p}" for p in re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", text)]
        for path in set(paths) - made_by_hand:
            if not (ROOT / path).exists() and not (ROOT / "tests" / path).exists():
                missing.append(f"{page.relative_to(ROOT)}: {path}")
    assert not missing


def anchors(page: Path) -> set[str]:
    """The names that GitHub and MyST give to headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_table_of_the_readme_names_every_command() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[1].split("##")[0]
    assert set(re.findall(r"`catversion ([\w-]+)", table)) == set(COMMANDS)


def test_every_argument_of_every_command_says_what_it_is() -> None:
    for name, (module, _) in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=name)
        importlib.import_module(f"catversion_jax.cli.{module}").add_arguments(parser)
        silent = [action.dest for action in parser._actions if not action.help]
        assert not silent, (name, silent)


def test_every_public_name_has_its_place_in_the_reference() -> None:
    text = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    documented = set(
        re.findall(r"^\.\. auto(?:function|class):: (\w+)(?:\(.*\))?$", text, re.MULTILINE)
    )
    assert documented == set(catversion_jax.__all__)


@pytest.fixture(scope="module")
def page() -> dict:
    """What the code on the concept file's page defines."""
    text = (DOCS / "reference" / "concept_file.md").read_text(encoding="utf-8")
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    names: dict = {}
    exec(compile(code, "concept_file.md", "exec"), names)
    return names


def residual(scope: str) -> KVResidual:
    rng = np.random.default_rng(7)
    key, value = rng.standard_normal((2, 3, 2, 4, 8)).astype(np.float32)
    return KVResidual(key, value, (3, 5, 10), 0.25, scope)


@pytest.mark.parametrize("scope", ["all", "from_class_word"])
def test_the_page_reads_and_writes_a_concept_to_the_byte(page, tmp_path, scope) -> None:
    """Its reader sees what the safetensors library sees, its writer makes the package's bytes."""
    concept = residual(scope)
    config = {"resolution": 512, "instance_prompt": "ein Käfer"}
    path = save_concept(
        tmp_path / "c.safetensors", concept, base_class="tea pot", name="Möhre", config=config,
        images=["1.jpg"], metrics={"eval_loss": 0.1},
    )  # fmt: skip
    metadata, tensors = page["read_concept"](path.read_bytes())
    expected = load_file(path)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])
    pairs = page["keys_and_values"](metadata, tensors)
    assert list(pairs) == [3, 5, 10]
    np.testing.assert_array_equal(pairs[5][1], concept.value[1])
    assert metadata["catversion.format_version"] == ("1" if scope == "all" else "2")
    assert page["write_concept"](metadata, tensors) == path.read_bytes()
    damaged = path.read_bytes()[:-1] + b"\x00"
    with pytest.raises(ValueError, match="damaged"):
        page["read_concept"](damaged)


def test_the_page_reads_both_parts_of_a_concept(page, tmp_path) -> None:
    parts = (residual("all"), residual("all"))
    path = save_concept(tmp_path / "c.safetensors", PerEncoder(parts), base_class="cat")
    metadata, tensors = page["read_concept"](path.read_bytes())
    pairs = page["keys_and_values"](metadata, tensors, "text_encoder_2.")
    np.testing.assert_array_equal(pairs[10][0], parts[1].key[2])
    assert page["write_concept"](metadata, tensors) == path.read_bytes()


def test_the_page_reads_token_embeddings(page, tmp_path) -> None:
    vectors = np.arange(24, dtype=np.float32).reshape(3, 8)
    path = save_concept(tmp_path / "t.safetensors", TokenEmbeddings(vectors), base_class="cat")
    metadata, tensors = page["read_concept"](path.read_bytes())
    np.testing.assert_array_equal(tensors[metadata["catversion.placeholder_token"]], vectors)
    with pytest.raises(ValueError, match="textual_inversion"):
        page["keys_and_values"](metadata, tensors)


def test_the_page_names_every_metadata_key(page, tmp_path) -> None:
    text = (DOCS / "reference" / "concept_file.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \|", text.split("## Metadata")[1], re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]
    named = {f"modelspec{key}" if key.startswith(".") else key for key in keys}
    written = set()
    of_both = PerEncoder((residual("all"), residual("all")))
    states = dataclasses.replace(residual("all"), states=np.ones((2, 32)))
    every = [residual("class_word"), TokenEmbeddings(np.ones((1, 8))), of_both, states]
    for number, learned in enumerate(every):
        path = save_concept(
            tmp_path / f"{number}.safetensors", learned, base_class="cat",
            config={"resolution": 512, "prediction_type": "epsilon"}, metrics={"eval_loss": 1.0},
        )  # fmt: skip
        written |= set(page["read_concept"](path.read_bytes())[0])
    parts = ("catversion.text_encoder.", "catversion.text_encoder_2.")  # one row for both
    assert {key for key in written if not key.startswith(parts)} == named


def test_the_page_computes_the_fingerprint_of_a_text_encoder(page) -> None:
    folder = embedded_folder("tiny-sd")
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    assert page["text_encoder_sha256"](weights) == load_backbone("tiny-sd").text_encoder_sha256
