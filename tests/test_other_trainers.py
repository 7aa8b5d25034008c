"""Lists and folders as OneTrainer's and kohya's users have them; captions; tables."""

import json
from pathlib import Path

import pytest
from concept_folders import labels, put_images

from catversion_jax.cli import main
from catversion_jax.concepts import concept_prompts, read_concepts
from catversion_jax.errors import CatVersionError

# OneTrainer 2026-08, modules/util/config/ConceptConfig.py: the keys of a saved concept that matter
# here, with some that do not.
ONE_TRAINER = {
    "__version": 1,
    "image": {"__version": 0, "enable_crop_jitter": True},
    "text": {"__version": 0, "prompt_source": "sample", "prompt_path": ""},
    "name": "",
    "path": "data/pot",
    "seed": -519283746,
    "enabled": True,
    "validation_concept": False,
    "include_subdirectories": False,
    "balancing": 1.0,
    "balancing_strategy": "REPEATS",
    "loss_weight": 1.0,
}


def test_onetrainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_images(tmp_path / "data" / "pot", "1.png", "2.png", "2-masklabel.png")
    put_images(tmp_path / "data" / "pot" / "more" / "deep", "1.png")
    put_images(tmp_path / "data" / "pot" / "more" / "masks", "9.png")
    put_images(tmp_path / "data" / "pot" / ".thumbs", "1.png")
    (tmp_path / "data" / "pot" / "concept.json").write_text('{"base_class": "pot"}')
    concepts = [
        ONE_TRAINER,
        {**ONE_TRAINER, "name": "all", "include_subdirectories": True},
        {**ONE_TRAINER, "name": "slim", "image": None, "text": None},
        {**ONE_TRAINER, "name": "off", "enabled": False},
        {**ONE_TRAINER, "name": "watched", "validation_concept": True},
        {**ONE_TRAINER, "name": "prior", "type": "PRIOR_PREDICTION"},
        {**ONE_TRAINER, "name": "gone", "path": "data/gone"},
        {**ONE_TRAINER, "name": "windows", "path": "data\\pot"},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    found = read_concepts(tmp_path / "concepts.json")
    specs = {spec.name: spec for spec in found.concepts}
    assert {name: labels(spec) for name, spec in specs.items()} == {
        "pot": ["1.png", "2.png"],
        "all": ["1.png", "2.png", "more/deep/1.png"],
        "slim": ["1.png", "2.png"],
        "windows": ["1.png", "2.png"],
    }
    assert {(spec.base_class, spec.seed) for spec in specs.values()} == {("pot", None)}
    masks = [source.mask and source.mask.name for source in specs["pot"].images]
    assert masks == [None, "2-masklabel.png"]
    assert [problem.name for problem in found.problems] == ["gone"]
    assert [name.split()[0] for name in found.skipped] == ["off", "watched", "prior"]
    assert len(found.notes) == 1
    # Its own paths are relative to where it is started.
    (tmp_path / "training_concepts").mkdir()
    (tmp_path / "concepts.json").rename(tmp_path / "training_concepts" / "concepts.json")
    monkeypatch.chdir(tmp_path)
    assert len(read_concepts("training_concepts/concepts.json").concepts) == 4
    (tmp_path / "off.json").write_text(json.dumps([{**ONE_TRAINER, "enabled": False}]))
    with pytest.raises(CatVersionError, match=r"pot \(not enabled in off\.json\)"):
        read_concepts(tmp_path / "off.json")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """kohya's project: images with captions, regularisation images, a log."""
    images = put_images(tmp_path / "my" / "img" / "10_rex teapot", "1.png", "2.png", "3.png")
    for i in (1, 2):
        (images / f"{i}.txt").write_text(f"rex teapot, number {i}\n\nteapot on a table")
    (images / "3.txt").write_text("nothing of the kind")
    put_images(tmp_path / "my" / "reg" / "1_teapot", "1.png")
    (tmp_path / "my" / "log").mkdir()
    return tmp_path / "my"


@pytest.mark.parametrize("where", ["", "img"])
def test_kohya_project(project: Path, where: str) -> None:
    found = read_concepts(project / where, base_class="teapot")
    (spec,) = found.concepts
    assert (spec.name, spec.base_class, len(spec.images)) == ("rex teapot", "teapot", 3)
    assert concept_prompts(spec, "default") == (
        "rex teapot, number 1",
        "teapot on a table",
        "rex teapot, number 2",
    )
    assert "captions of 3 of 3 images are the training prompts" in spec.notes
    assert "captions without the base class 'teapot' are not used: 3.png" in spec.notes
    skipped = ("log/", "reg/ (regularisation images, not used)")
    assert found.skipped == (() if where else skipped)
    with pytest.raises(CatVersionError, match="no base class"):
        read_concepts(project / where)


def test_regularisation_folders_are_never_concepts(tmp_path: Path) -> None:
    put_images(tmp_path / "rex", "1.png")
    put_images(tmp_path / "regularization_images", "1.png")
    found = read_concepts(tmp_path, base_class="dog")
    assert [spec.name for spec in found.concepts] == ["rex"]
    assert found.skipped == ("regularization_images/ (regularisation images, not used)",)
    # Numbers alone make no project: such folders keep their names.
    put_images(tmp_path / "list" / "1_red", "1.png")
    put_images(tmp_path / "list" / "2_blue", "1.png")
    names = [spec.name for spec in read_concepts(tmp_path / "list", base_class="cup").concepts]
    assert names == ["1_red", "2_blue"]


KOHYA = """
[general]
shuffle_caption = true

[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = 'img/10_rex teapot'
  class_tokens = 'rex teapot'
  num_repeats = 10
  conditioning_data_dir = 'drawn'
  [[datasets.subsets]]
  image_dir = 'more'
  class_tokens = 'rex  teapot'
  [[datasets.subsets]]
  image_dir = 'img\\10_rex teapot'
  class_tokens = 'same folder'
  [[datasets.subsets]]
  image_dir = 'reg/1_teapot'
  is_reg = true
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'gone/5_tom cat'
"""


def test_kohya_dataset_file(project: Path) -> None:
    put_images(project / "drawn", "2.png")
    put_images(project / "more", "1.png")
    (project / "dataset.toml").write_text(KOHYA)
    found = read_concepts(project / "dataset.toml", base_class="teapot")
    rex, same = found.concepts
    assert (rex.name, labels(rex)) == (
        "rex teapot",
        [f"10_rex teapot/{i}.png" for i in (1, 2, 3)] + ["more/1.png"],
    )
    masks = [source.mask for source in rex.images]
    assert masks == [None, project / "drawn" / "2.png", None, None]
    assert (same.name, len(same.images)) == ("same folder", 3)
    assert found.skipped == ("reg/1_teapot (regularisation images, not used)",)
    assert [problem.name for problem in found.problems] == ["tom cat"]
    (note,) = found.notes
    assert note.endswith("without effect here: resolution, shuffle_caption")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
        ("a = " + "9" * 5000, "not valid TOML"),
        ("name = 'x'", r"must have \[\[datasets\]\]"),
        ("datasets = 3", r"must have \[\[datasets\]\]"),
        ("[[datasets]]\nsubsets = [3]", r"must have \[\[datasets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]\nis_reg = true", "names no images to train on"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 3", "has no image_dir"),
    ],
)
def test_toml_that_is_no_dataset_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(CatVersionError, match=message) as caught:
        read_concepts(tmp_path / "d.toml")
    assert len(str(caught.value)) < 600


def test_captions_are_prompts_only_where_the_concept_has_none(tmp_path: Path) -> None:
    folder = put_images(tmp_path / "cup", "1.png", "2.jpg", "3.png", "4.png", "5.png")
    (folder / "1.txt").write_text("a  cup\r\n")
    (folder / "2.jpg.txt").write_text("the cups of my aunt")
    (folder / "3.caption").write_text("a {cup}")
    (folder / "4.txt").write_bytes(b"une tasse \xe0 th\xe9")
    (folder / "notes.txt").write_text("a cup that is no caption")
    (spec,) = read_concepts(folder, base_class="cup").concepts
    assert spec.prompts == ("a cup", "the cups of my aunt")
    assert spec.skipped == ("notes.txt",)
    assert spec.notes == (
        "captions of 3 of 5 images are the training prompts",
        "captions without the base class 'cup' are not used: 3.png",
        "captions that are no short UTF-8 text are not used: 4.png",
    )
    (folder / "concept.json").write_text('{"base_class": "cup", "prompts": ["my {}"]}')
    (spec,) = read_concepts(folder).concepts
    assert spec.prompts == ("my {}",)
    assert "captions are not used: the concept has prompts of its own" in spec.notes


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_as_spreadsheets_write_it(
    tmp_path: Path, delimiter: str, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(tmp_path / "pots" / "é", "1.png")
    rows = [["name", "path", "base_class", "prompt"], ["pot", r"pots\é", "pot", 'a "{}", blue']]
    text = "".join(
        delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows
    )
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    (spec,) = read_concepts(tmp_path / "m.csv").concepts
    assert (spec.name, spec.base_class, spec.prompts) == ("pot", "pot", ('a "{}", blue',))
    assert main(["check", str(tmp_path / "m.csv")]) == 0
    out = capsys.readouterr().out
    assert ("columns are separated by" in out) == (delimiter != ",")


def test_csv_with_excel_s_own_first_line(tmp_path: Path) -> None:
    put_images(tmp_path / "pot", "1.png")
    (tmp_path / "m.csv").write_text("sep=;\r\nname;path;base_class\r\npot;pot;pot\r\n")
    assert [spec.name for spec in read_concepts(tmp_path / "m.csv").concepts] == ["pot"]


def test_csv_with_a_column_twice(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("name,path,base_class,path\na,b,c,d\n")
    with pytest.raises(CatVersionError, match="the column 'path' appears twice in the header"):
        read_concepts(tmp_path / "m.csv")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_images_that_a_list_leaves_out_are_noted(tmp_path: Path, kind: str) -> None:
    folder = put_images(tmp_path / "pots", "1.png", "2.png", "3.png", "1.mask.png")
    put_images(folder / "sub", "4.png")
    rows = [("1.png", "a pot"), ("sub\\4.png", "pots, blue"), ("2.png", "a vase")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    if kind == "csv":
        lines = ["file_name,text", *(f'{name},"{text}"' for name, text in rows)]
    (folder / f"metadata.{kind}").write_text("\n".join(lines))
    found = read_concepts(folder, base_class="pot")
    (spec,) = found.concepts
    assert labels(spec) == ["1.png", "4.png", "2.png"]
    assert spec.images[0].mask == folder / "1.mask.png"
    assert spec.prompts == ("a pot", "pots, blue")
    assert "captions without the base class 'pot' are not used: 2.png" in spec.notes
    assert found.notes == (f"not listed in metadata.{kind}, so not used: 3.png",)
    (folder / "concept.json").write_text('{"base_class": "pot", "name": "mine"}')
    assert [spec.name for spec in read_concepts(folder).concepts] == ["mine"]


def test_rows_of_a_list_that_name_no_image(tmp_path: Path) -> None:
    folder = put_images(tmp_path / "pots", "1.png", "2.png")
    rows = [
        '{"file_name": "1.png", "who": "good"}',
        '{"file_name": "gone.png", "who": "missing"}',
        '{"file_name": 3, "who": "typed"}',
        '{"file_name": "2.png", "who": null}',
        '{"file_name": "2.png", ',
    ]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    found = read_concepts(folder, base_class="pot", concept_column="who")
    assert [spec.name for spec in found.concepts] == ["good"]
    reasons = {problem.name: problem.message for problem in found.problems}
    assert reasons.keys() == {"missing", "typed", "row 4", "row 5"}
    assert "'gone.png' not found" in reasons["missing"]
    assert "file_name=3: must be the name of an image" in reasons["typed"]
    assert "has no concept name" in reasons["row 4"]
    assert "not valid JSON" in reasons["row 5"]
