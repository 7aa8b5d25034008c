"""Manifests and the values in them: every format, every mistake by its message."""

import json
from pathlib import Path

import pytest
from concept_folders import labels, put_images

from catversion_jax.concepts import read_concepts
from catversion_jax.errors import CatVersionError

MANIFESTS = {
    "list.yaml": "- {name: red cup, path: cups/red, base_class: cup, prompt: 'a {}', seed: 3}\n"
    "- {path: cat, base_class: cat}",
    "map.yml": "concepts:\n"
    "- {name: red cup, path: cups/red, base_class: cup, prompt: 'a {}', seed: 3}\n"
    "- {path: cat, base_class: cat}",
    "named.yaml": "red cup: {path: cups/red, base_class: cup, prompt: 'a {}', seed: 3}\n"
    "cat: {path: cat, base_class: cat}",
    "list.json": '[{"name": "red cup", "path": "cups/red", "base_class": "cup", '
    '"prompt": "a {}", "seed": 3},'
    ' {"path": "cat", "base_class": "cat"}]',
    "list.jsonl": '{"name": "red cup", "path": "cups/red", "base_class": "cup", '
    '"prompt": "a {}", "seed": 3}\n\n'
    '{"path": "cat", "base_class": "cat"}\n',
    "list.csv": (
        "\ufeffname,path,base_class,prompt,seed\r\nred cup,cups/red,cup,a {},3\r\n,cat,cat,,\r\n"
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(tmp_path: Path, name: str) -> None:
    put_images(tmp_path / "data" / "cups" / "red", "1.png")
    put_images(tmp_path / "data" / "cat", "1.png", "2.png")
    (tmp_path / "data" / name).write_text(MANIFESTS[name], encoding="utf-8")
    cup, cat = read_concepts(tmp_path / "data" / name).concepts
    assert (cup.name, cup.base_class, cup.prompts, cup.seed) == ("red cup", "cup", ("a {}",), 3)
    assert (cat.name, cat.base_class, cat.prompts, cat.seed, len(cat.images)) == (
        "cat",
        "cat",
        (),
        None,
        2,
    )


def test_manifest_with_listed_files_and_masks(tmp_path: Path) -> None:
    put_images(tmp_path / "shots", "a.png", "b.png", "c.png")
    put_images(tmp_path / "mattes", "a.png", "b.png", "c.png")
    entries = [
        {"name": "listed", "path": "shots", "images": ["c.png", "a.png"], "base_class": "cup"},
        {"name": "both", "images": ["shots/a.png"], "masks": ["mattes/a.png"], "base_class": "cup"},
        {"name": "folder", "path": "shots", "masks": "mattes", "base_class": "cup"},
        {"name": "one file", "path": "shots/b.png", "base_class": "cup"},
        {"name": "missing", "images": ["shots/z.png"], "base_class": "cup"},
    ]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    found = read_concepts(tmp_path / "m.json")
    listed, both, folder, one = found.concepts
    assert labels(listed) == ["c.png", "a.png"]
    assert both.images[0].mask == tmp_path / "mattes" / "a.png"
    assert [image.mask for image in folder.images] == [
        tmp_path / "mattes" / f"{s}.png" for s in "abc"
    ]
    assert labels(one) == ["b.png"]
    (problem,) = found.problems
    assert "z.png" in problem.message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.yaml", "a: [", "not valid YAML"),
        ("m.json", "[{]", "not valid JSON"),
        ("m.json", "[]", "lists no concept"),
        ("m.json", '"text"', "must hold a list"),
        ("m.yaml", "- teapot", "must be a mapping"),
        (
            "m.csv",
            "name,path,base_class\ncup,cup,cup,red, small\n",
            "Quote texts that contain a comma",
        ),
        ("m.csv", "name,base_class\ncup,cup\n", "has no path"),
        ("m.json", '[{"name": "cup", "path": "gone", "base_class": "cup"}]', "'gone' not found"),
    ],
)
def test_broken_manifests(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CatVersionError, match=message):
        read_concepts(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed=-1: must be a whole number"),
        ({"seed": "abc"}, "seed='abc'"),
        ({"seed": True}, "seed=True"),
        ({"random_flip": 1.5}, r"random_flip=1\.5: must be false or a probability"),
        ({"when": "sometimes"}, "must be one of class_word, always"),
        ({"templates": "photos"}, "must be one of default, object, style"),
        ({"prompt": "a {}", "prompts": ["b {}"]}, "keep one of them"),
        ({"prompts": [3]}, "must be a text or a list of texts"),
        ({"prompts": ["a dog"]}, "does not contain the base class 'cup'"),
        ({"prompts": ["a {cup}"]}, "the only placeholders are"),
        ({"base_class": "{cup}"}, "must be plain words"),
        ({"base_class": 3}, "must be text"),
        ({"masks": "gone"}, "must be a folder"),
        ({"masks": "."}, "each would be its own mask"),
        ({"mask_polarity": "grey"}, "must be one of white, black"),
        ({"base_class": "cup " * 100}, "at most 200 characters"),
        ({"name": ["cup"]}, "must be text"),
        ({"promts": ["a {}"]}, "Did you mean 'prompts'"),
    ],
)
def test_values_beside_a_concept(tmp_path: Path, fields: dict, message: str) -> None:
    put_images(tmp_path / "cup", "1.png")
    (tmp_path / "cup" / "concept.json").write_text(json.dumps({"base_class": "cup", **fields}))
    with pytest.raises(CatVersionError, match=message):
        read_concepts(tmp_path / "cup")


def test_names_that_cannot_be_folders(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", "1.png")
    bad = [
        "../escape",
        "a/b",
        "a\\b",
        ".",
        "..",
        "",
        "x" * 101,
        "é" * 51,
        "a:b",
        "tab\t",
        " pad",
        "con",
        "dot.",
    ]
    entries: list[dict] = [{"name": name, "path": "cup", "base_class": "cup"} for name in bad]
    entries[5]["images"] = [str(tmp_path / "cup" / "1.png")]
    del entries[5]["path"]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    with pytest.raises(CatVersionError) as caught:
        read_concepts(tmp_path / "m.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(bad), lines
    for name in ("../escape", "a\\b", "a:b", "con", "dot."):
        assert any(repr(name) in line for line in lines)


def test_duplicate_names(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", "1.png")
    entries = [
        {"name": name, "path": "cup", "base_class": "cup"}
        for name in ("Cup", "cup", "bowl", "bowl")
    ]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    with pytest.raises(CatVersionError) as caught:
        read_concepts(tmp_path / "m.json")
    assert "'cup': appears twice (as 'Cup'" in str(caught.value)
    assert "'bowl': appears twice." in str(caught.value)


def test_a_list_and_the_concept_file_of_its_folder(tmp_path: Path) -> None:
    """What ``concept.json`` says counts where the list says nothing of it: above all which photos
    are held out."""
    put_images(tmp_path / "red", "1.png", "2.png", "3.png")
    own = {"base_class": "mug", "prompts": ["my {}"], "eval_images": ["2.png"], "seed": 7}
    (tmp_path / "red" / "concept.json").write_text(json.dumps({"name": "x", **own}))
    entries = [
        {"path": "red", "name": "a"},
        {"path": "red", "name": "b", "base_class": "cup", "prompt": "a {}", "seed": 3},
        {"path": "red", "name": "c", "eval_images": ["red/3.png"]},
        {"path": "red", "name": "d", "images": ["1.png", "2.png"]},
        {"instance_data_dir": "red", "name": "e", "class_prompt": "cup"},
    ]
    for name, listed in (("ours.json", entries[:4]), ("custom.json", entries[4:])):
        (tmp_path / name).write_text(json.dumps(listed))
    a, b, c, d = read_concepts(tmp_path / "ours.json").concepts
    (e,) = read_concepts(tmp_path / "custom.json").concepts
    assert [one.base_class for one in (a, b, c, d, e)] == ["mug", "cup", "mug", "mug", "cup"]
    assert [one.prompts for one in (a, b, c)] == [("my {}",), ("a {}",), ("my {}",)]
    assert [one.seed for one in (a, b, e)] == [7, 3, 7]
    assert [labels(one) for one in (a, b, c, d, e)] == [
        ["1.png", "3.png"],
        ["1.png", "3.png"],
        ["1.png", "2.png"],
        ["1.png"],
        ["1.png", "3.png"],
    ]


def test_a_list_that_names_masks_trains_on_none(tmp_path: Path) -> None:
    """``*.png`` in a folder with masks: a file that is a mask by its name is never a photo."""
    put_images(tmp_path, "1.png", "1.mask.png", "2.png", "2_mask.png", "3.mask.png")
    entries = [
        {"name": "all", "images": sorted(path.name for path in tmp_path.glob("*.png"))},
        {"name": "held out", "images": ["1.png"], "eval_images": ["2.png", "1.mask.png"]},
        {"name": "only masks", "images": ["1.mask.png"]},
        {"name": "its own", "images": ["1.png"], "masks": ["1.png"]},
    ]
    listed = [{"base_class": "cup", **entry} for entry in entries]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    found = read_concepts(tmp_path / "list.json")
    every, held_out = found.concepts
    assert labels(every) == ["1.png", "2.png"]
    assert [source.mask.name for source in every.images] == ["1.mask.png", "2_mask.png"]
    (warning,) = every.warnings
    assert warning.endswith("by their names: 1.mask.png, 2_mask.png, 3.mask.png")
    assert [source.label for source in held_out.eval_images] == ["2.png"]
    messages = [problem.message for problem in found.problems]
    assert "no photo is listed" in messages[0]
    assert "its own mask" in messages[1]
    (tmp_path / "metadata.csv").write_text("file_name\n1.png\n1.mask.png\n")
    (listed_here,) = read_concepts(tmp_path, base_class="cup").concepts
    assert labels(listed_here) == ["1.png"]
    assert "1.mask.png" in listed_here.warnings[0]
