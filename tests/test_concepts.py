"""Folders of photos, with masks and ``concept.json`` beside them; every mistake, by its message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from concept_folders import labels, put_images

from catversion_jax.concepts import ConceptSpec, concept_prompts, read_concepts
from catversion_jax.concepts.prompts import prompt_templates
from catversion_jax.errors import CatVersionError, ConceptError


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


def test_reading_concepts_needs_neither_jax_nor_torch(tmp_path: Path) -> None:
    put_images(tmp_path / "teapot", "1.png")
    code = (
        "import sys; from catversion_jax.concepts import read_concepts; "
        f"read_concepts({str(tmp_path / 'teapot')!r}, base_class='teapot'); "
        "assert not {'jax', 'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
