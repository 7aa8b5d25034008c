"""Every layout, on files written as their publishers write them; every mistake, by its message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from concept_folders import labels, put_images

from catversion_jax.concepts import ConceptSpec, concept_prompts, read_concepts
from catversion_jax.concepts.prompts import prompt_templates
from catversion_jax.errors import CatVersionError, ConceptError

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


def test_flat_folder_orders_naturally_and_lists_what_it_skips(tmp_path: Path) -> None:
    folder = put_images(tmp_path / "teapot", "10.jpg", "2.JPG", "1.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "clip.mp4", "._1.png"):
        (folder / name).write_bytes(b"x")
    put_images(folder / ".ipynb_checkpoints", "1-checkpoint.png")
    (spec,) = read_concepts(folder, base_class="teapot").concepts
    assert (spec.name, spec.base_class) == ("teapot", "teapot")
    assert labels(spec) == ["1.png", "2.JPG", "10.jpg"]
    assert set(spec.skipped) == {
        ".DS_Store",
        "Thumbs.db",
        "notes.txt",
        "clip.mp4",
        "._1.png",
        ".ipynb_checkpoints/",
    }


def test_flat_folder_needs_a_base_class(tmp_path: Path) -> None:
    folder = put_images(tmp_path / "teapot", "1.png")
    with pytest.raises(CatVersionError, match=r"no base class.*base_class=teapot.*concept\.json"):
        read_concepts(folder)


def test_concept_json_in_a_flat_folder(tmp_path: Path) -> None:
    folder = put_images(tmp_path / "folder", "1.png")
    fields = {
        "name": "my bear",
        "base_class": "stuffed  animal",
        "prompts": ["a photo of a {}"],
        "seed": 7,
        "random_flip": False,
        "when": "always",
        "source": "somewhere",
    }
    (folder / "concept.json").write_text(json.dumps(fields))
    (spec,) = read_concepts(folder).concepts
    assert (spec.name, spec.base_class, spec.seed, spec.random_flip, spec.when) == (
        "my bear",
        "stuffed animal",
        7,
        0.0,
        "always",
    )
    assert concept_prompts(spec, "default") == ("a photo of a stuffed animal",)
    assert any("source" in note for note in spec.notes)
    assert spec.skipped == ()
    # For one folder the command line is more specific than the file.
    (spec,) = read_concepts(folder, base_class="bear").concepts
    assert spec.base_class == "bear"


def test_images_inside_and_beside_sub_folders_are_refused(tmp_path: Path) -> None:
    folder = put_images(tmp_path / "teapot", "1.png")
    put_images(folder / "regularization", "1.png")
    with pytest.raises(CatVersionError, match=r"regularization.*Move the sub-folders out"):
        read_concepts(folder, base_class="teapot")


@pytest.mark.parametrize("content", [(), ("notes.txt",)])
def test_empty_folder(tmp_path: Path, content: tuple[str, ...]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("x")
    with pytest.raises(CatVersionError, match=r"no image.*Put 3 to 10 photos"):
        read_concepts(folder, base_class="teapot")


def test_source_not_found(tmp_path: Path) -> None:
    with pytest.raises(CatVersionError, match="not found"):
        read_concepts(tmp_path / "nowhere")
    with pytest.raises(CatVersionError, match="hf:owner/name"):
        read_concepts("photos/tea_pot")
    put_images(tmp_path, "1.png")
    with pytest.raises(CatVersionError, match="Give the folder the image lies in"):
        read_concepts(tmp_path / "1.png")


def test_folder_of_folders_quarantines_what_is_broken(tmp_path: Path) -> None:
    put_images(tmp_path / "good", "1.png")
    (tmp_path / "good" / "concept.json").write_text('{"base_class": "cup"}')
    put_images(tmp_path / "undecided", "1.png")
    (tmp_path / "empty").mkdir()
    put_images(tmp_path / "misspelt", "1.png")
    (tmp_path / "misspelt" / "concept.json").write_text('{"base_clas": "cup"}')
    put_images(tmp_path / "not_json", "1.png")
    (tmp_path / "not_json" / "concept.json").write_text("{base_class: cup}")
    put_images(tmp_path / ".git", "1.png")
    (tmp_path / "README.md").write_text("x")
    found = read_concepts(tmp_path)
    assert [spec.name for spec in found.concepts] == ["good"]
    messages = {problem.name: problem.message for problem in found.problems}
    assert set(messages) == {"undecided", "empty", "misspelt", "not_json"}
    assert "no base class" in messages["undecided"]
    assert "no image" in messages["empty"]
    assert "Did you mean 'base_class'?" in messages["misspelt"]
    assert "not valid JSON" in messages["not_json"]
    assert set(found.skipped) == {".git/", "README.md"}
    # The argument fills in for those that do not say; it does not override those that do.
    classes = {
        spec.name: spec.base_class for spec in read_concepts(tmp_path, base_class="bowl").concepts
    }
    assert classes == {"good": "cup", "undecided": "bowl"}


def test_no_usable_concept_lists_every_reason(tmp_path: Path) -> None:
    put_images(tmp_path / "a", "1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(CatVersionError) as caught:
        read_concepts(tmp_path)
    assert "/a: no base class" in str(caught.value)
    assert "/b: no image" in str(caught.value)


def test_masks_are_never_training_images(tmp_path: Path) -> None:
    habits = tmp_path / "habits"
    onetrainer = put_images(habits / "onetrainer", "dog.jpg", "dog-masklabel.png", "cat.jpg")
    lora = put_images(habits / "lora", "1.src.jpg", "1.mask.png", "2.png", "2.mask.png")
    inside = put_images(habits / "inside", "a.jpg", "b.jpg")
    put_images(inside / "masks", "a.png", "b.png")
    beside = put_images(habits / "beside", "a.jpg")
    put_images(habits / "beside_masks", "a.png")
    suffix = put_images(habits / "suffix", "a.jpg", "a_mask.png", "gas_mask.jpg")
    found = read_concepts(habits, base_class="dog")
    pairs = {s.name: {i.label: i.mask for i in s.images} for s in found.concepts}
    assert pairs == {
        "onetrainer": {"cat.jpg": None, "dog.jpg": onetrainer / "dog-masklabel.png"},
        "lora": {"1.src.jpg": lora / "1.mask.png", "2.png": lora / "2.mask.png"},
        "inside": {"a.jpg": inside / "masks" / "a.png", "b.jpg": inside / "masks" / "b.png"},
        "beside": {"a.jpg": habits / "beside_masks" / "a.png"},
        "suffix": {"a.jpg": suffix / "a_mask.png", "gas_mask.jpg": None},
    }
    assert all(not beside.samefile(p.parent) for p in pairs["beside"].values() if p)
    assert found.problems == ()


@pytest.mark.parametrize(
    ("photo", "beside"),
    [("DOG.JPG", "dog"), ("caf\u00e9.png", "cafe\u0301"), ("CAFE\u0301.png", "caf\u00e9")],
)
@pytest.mark.parametrize("joint", ["_mask", ".mask"])
def test_names_that_are_one_on_other_systems(tmp_path: Path, photo, beside, joint) -> None:
    """macOS writes accents apart, and Windows does not tell capitals: a mask is no photo."""
    folder = put_images(tmp_path / "dog", photo, f"{beside}{joint}.png")
    (folder / f"{beside}.txt").write_text("a dog on a chair")
    (spec,) = read_concepts(folder, base_class="dog").concepts
    assert labels(spec) == [photo]
    assert spec.images[0].mask == folder / f"{beside}{joint}.png"
    assert spec.prompts == ("a dog on a chair",)
    # the very name wins
    put_images(folder, f"{Path(photo).stem}{joint}.png")
    (spec,) = read_concepts(folder, base_class="dog").concepts
    assert spec.images[0].mask == folder / f"{Path(photo).stem}{joint}.png"
    assert any("not used" in warning for warning in spec.warnings)


def test_a_mask_without_image_is_a_warning(tmp_path: Path) -> None:
    put_images(tmp_path / "dog", "a.jpg", "b-masklabel.png", "a.mask.png")
    put_images(tmp_path / "dog" / "masks", "a.png")
    (spec,) = read_concepts(tmp_path / "dog", base_class="dog").concepts
    assert labels(spec) == ["a.jpg"]
    assert sorted(spec.warnings) == [
        "mask a.png not used: a.mask.png is already the mask of a",
        "mask b-masklabel.png has no image",
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


def test_prompts_fill_both_placeholders_and_word_match_is_whole() -> None:
    spec = ConceptSpec("bear", "stuffed animal", ())
    assert concept_prompts(spec, "default") == ("stuffed animal",)
    assert concept_prompts(spec, ["a {} on a {base_class}"]) == (
        "a stuffed animal on a stuffed animal",
    )
    owl = ConceptSpec("mine", "owl", ())
    assert concept_prompts(owl, ["a {} on A {}", "a red {}"]) == ("an owl on An owl", "a red owl")
    assert concept_prompts(spec, "my Stuffed  Animal!") == ("my Stuffed Animal!",)
    with pytest.raises(ConceptError, match="not a separate word"):
        concept_prompts(spec, "a stuffed animals")
    with pytest.raises(ConceptError, match="does not contain"):
        concept_prompts(spec, "a stuffed bear")
    assert concept_prompts(spec, "anything", default_when="always") == ("anything",)
    objects, style = prompt_templates("object"), prompt_templates("style")
    assert objects[0] == "a photo of a {base_class}"
    assert (len(set(objects)), len(set(style))) == (len(objects), len(style))
    assert concept_prompts(spec, "style")[0] == "a painting in the style of stuffed animal"
    with pytest.raises(CatVersionError, match="Did you mean 'object'"):
        prompt_templates("objects")


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


def test_reading_concepts_needs_neither_jax_nor_torch(tmp_path: Path) -> None:
    put_images(tmp_path / "teapot", "1.png")
    code = (
        "import sys; from catversion_jax.concepts import read_concepts; "
        f"read_concepts({str(tmp_path / 'teapot')!r}, base_class='teapot'); "
        "assert not {'jax', 'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


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
