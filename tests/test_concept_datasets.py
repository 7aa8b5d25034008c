"""Concepts out of data sets, in the form in which their publishers write them: DreamBench, Custom
Concept 101, image folders and saved data sets of ``datasets``, the examples of the package.
"""

import json
from pathlib import Path

import pytest
from concept_folders import labels, put_images

from catversion_jax.concepts import concept_prompts, read_concepts
from catversion_jax.errors import CatVersionError

# google/dreambooth dataset/prompts_and_classes.txt, its form with four of its thirty subjects.
DREAMBENCH = """Classes

subject_name,class
backpack,backpack
backpack_dog,backpack
bear_plushie,stuffed animal
grey_sloth_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""


# adobe-research/custom-diffusion customconcept101/dataset.json, two of its 101 entries.
CUSTOM_CONCEPT_101 = [
    {
        "instance_prompt": "photo of a <new1> action figure",
        "class_prompt": "action figure",
        "instance_data_dir": "./benchmark_dataset/actionfigure_1",
        "class_data_dir": "./regularization/actionfigure",
        "prompt_filename": "prompts/actionfigure.txt",
    },
    {
        "instance_prompt": "photo of <new1> sunglasses",
        "class_prompt": "sunglasses",
        "instance_data_dir": "./benchmark_dataset/wearable_sunglasses2",
        "class_data_dir": "./regularization/wearable_sunglasses",
        "prompt_filename": "prompts/sunglasses.txt",
    },
]


def test_dreambench_as_published(tmp_path: Path) -> None:
    for subject in ("backpack", "backpack_dog", "bear_plushie"):
        put_images(tmp_path / "dataset" / subject, "00.jpg", "01.jpg", "02.jpg", "03.jpg")
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(DREAMBENCH)
    (tmp_path / "dataset" / "references_and_licenses.txt").write_text("x")
    put_images(tmp_path / "dataset" / "unlisted", "00.jpg")
    for source in (tmp_path, tmp_path / "dataset"):
        found = read_concepts(source)
        assert {spec.name: spec.base_class for spec in found.concepts} == {
            "backpack": "backpack",
            "backpack_dog": "backpack",
            "bear_plushie": "stuffed animal",
        }
        (problem,) = found.problems
        assert problem.name == "unlisted"
        assert "prompts_and_classes.txt" in problem.message
        assert found.skipped[0] == "references_and_licenses.txt"
        assert "grey_sloth_plushie" in found.skipped[1]


def test_dreambench_file_without_its_table(tmp_path: Path) -> None:
    put_images(tmp_path / "backpack", "00.jpg")
    (tmp_path / "prompts_and_classes.txt").write_text("Classes\nbackpack: backpack\n")
    with pytest.raises(CatVersionError, match="no line 'subject_name,class'"):
        read_concepts(tmp_path)


@pytest.mark.parametrize("where", ["beside the file", "working directory"])
def test_custom_concept_101_as_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    root = tmp_path / "root"
    put_images(root / "benchmark_dataset" / "actionfigure_1", "0.jpeg", "1.jpeg")
    put_images(root / "benchmark_dataset" / "wearable_sunglasses2", "0.jpeg")
    home = root if where == "beside the file" else tmp_path / "assets"
    home.mkdir(exist_ok=True)
    monkeypatch.chdir(root)
    (home / "dataset.json").write_text(json.dumps(CUSTOM_CONCEPT_101))
    first, second = read_concepts(home / "dataset.json").concepts
    assert (first.name, first.base_class, labels(first)) == (
        "actionfigure_1",
        "action figure",
        ["0.jpeg", "1.jpeg"],
    )
    assert concept_prompts(first, "default") == ("photo of a action figure",)
    assert concept_prompts(second, "default") == ("photo of sunglasses",)
    assert first.notes == second.notes == ()


def test_custom_diffusion_mistakes(tmp_path: Path) -> None:
    put_images(tmp_path / "cat", "0.jpg")
    entries = [
        {
            "instance_prompt": "photo of a <new1> cat",
            "class_prompt": "<new1> cat",
            "instance_data_dir": "cat",
        },
        {"instance_prompt": "a <new1> dog", "class_prompt": "dog", "instance_data_dir": "gone"},
        {
            "instance_prompt": "a <new1> pot",
            "class_prompt": "captions.txt",
            "instance_data_dir": "cat",
            "name": "pot",
        },
        {
            "instance_prompt": "a <new1> pot",
            "class_prompt": "vase",
            "instance_data_dir": "cat",
            "name": "vase",
        },
    ]
    (tmp_path / "concepts_list.json").write_text(json.dumps(entries))
    found = read_concepts(tmp_path / "concepts_list.json")
    assert [(spec.name, spec.base_class) for spec in found.concepts] == [("cat", "cat")]
    messages = {problem.name: problem.message for problem in found.problems}
    assert "neither" in messages["gone"]
    assert "file of captions" in messages["pot"]
    assert "does not contain the base class 'vase'" in messages["vase"]
    (tmp_path / "multi.json").write_text(json.dumps([CUSTOM_CONCEPT_101]))
    with pytest.raises(CatVersionError, match="single-concept list"):
        read_concepts(tmp_path / "multi.json")


def write_imagefolder(folder: Path) -> Path:
    put_images(folder, "0.png", "1.png", "2.png", "unused.png")
    rows = [
        {"file_name": "0.png", "who": "rex", "what": "dog"},
        {"file_name": "1.png", "who": "tom", "what": "cat"},
        {"file_name": "2.png", "who": "rex", "what": "dog"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def datasets_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("datasets", reason="pip install datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf-cache")))


@pytest.mark.usefixtures("datasets_cache")
def test_imagefolder_with_a_concept_column(tmp_path: Path) -> None:
    folder = write_imagefolder(tmp_path / "pets")
    rex, tom = read_concepts(folder, concept_column="who", base_class_column="what").concepts
    assert (rex.name, rex.base_class, labels(rex)) == ("rex", "dog", ["0.png", "2.png"])
    assert (tom.name, tom.base_class, labels(tom)) == ("tom", "cat", ["1.png"])
    assert rex.images[0].path == folder / "0.png"
    with pytest.raises(CatVersionError, match=r"no such column.*Did you mean 'who'"):
        read_concepts(folder, concept_column="whom")
    found = read_concepts(folder, base_class="pet").concepts
    assert [(spec.name, len(spec.images)) for spec in found] == [("pets", 3)]


@pytest.mark.usefixtures("datasets_cache")
def test_saved_dataset_keeps_encoded_bytes(tmp_path: Path) -> None:
    import datasets

    put_images(tmp_path, "a.png", "b.png")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "who": datasets.ClassLabel(names=["rex", "tom"]),
            "what": datasets.Value("string"),
        }
    )
    encoded = [
        {"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("a.png", "b.png")
    ]
    rows = {"image": encoded, "who": [1, 0], "what": ["cat", "dog"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    tom, rex = read_concepts(
        tmp_path / "saved", concept_column="who", base_class_column="what"
    ).concepts
    assert (tom.name, tom.base_class, rex.name) == ("tom", "cat", "rex")
    assert tom.images[0].data == (tmp_path / "a.png").read_bytes()
    assert tom.images[0].path is None


def test_the_examples_that_ship() -> None:
    found = read_concepts("tiny-sd-examples")
    assert {spec.name: spec.base_class for spec in found.concepts} == {
        "blue_penguin": "penguin",
        "dotted_teapot": "teapot",
        "golden_turtle": "turtle",
        "navy_elephant": "elephant",
        "plum_teddy_bear": "teddy bear",
        "violet_owl": "owl",
    }
    for spec in found.concepts:
        assert [image.label for image in spec.images] == [f"{i}.png" for i in range(1, 6)]
        assert all(image.mask for image in spec.images)
    assert found.skipped == ()
