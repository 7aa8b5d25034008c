"""``catversion teach``: what it takes for the photos of one thing, and for its name."""

import json
import shutil

import pytest
from running import COMPILATION_CACHE

from catversion_jax import load_concept
from catversion_jax.cli import main
from catversion_jax.cli.serve import teaching_config
from catversion_jax.cli.teach import _preset, _unlike, own_start
from catversion_jax.config import as_override, load_config
from catversion_jax.config.serving import ServeOptions
from catversion_jax.errors import CatVersionError


@pytest.fixture
def cup(toys, tmp_path, monkeypatch):
    """A folder of photos with masks, a caption and a ``concept.json``; the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toys / "teal_cup", "cup")
    (tmp_path / "cup" / "1.txt").write_text("a cup on grass")
    own = {"base_class": "cup", "eval_images": ["4.png"], "prompts": ["my {}"]}
    (tmp_path / "cup" / "concept.json").write_text(json.dumps(own))
    return tmp_path / "cup"


def teach(*args, capsys):
    """Until the model is asked for, which is nowhere; what was printed."""
    assert main(["teach", *map(str, args), "--model", "nowhere/"]) == 2
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_a_folder_under_another_name_is_read_as_a_folder(cup, capsys):
    said = teach("cup", "--base_class", "cup", "--name", "mine", capsys=capsys)
    assert "1 concept, 3 images" in said
    assert "mine: held out from training, for evaluation: 4.png" in said


def test_a_pattern_that_names_masks_too(cup, capsys):
    said = teach(*sorted(cup.glob("*.png")), "--base_class", "cup", capsys=capsys)
    assert "1 concept, 4 images" in said
    assert "masks by their names: 1.mask.png, 2.mask.png" in said


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "..", "CON", "cup?", "a: b"])
def test_a_name_that_is_no_folder_s_writes_nothing(cup, name, capsys):
    before = sorted(cup.parent.parent.rglob("*"))
    for given in (["cup", "--name", name, "--base_class", "cup"], ["cup/1.png", "--name", name]):
        said = teach(*given, "--base_class", "cup", capsys=capsys)
        assert "concept name" in said
        assert "Give another --name." in said
    assert sorted(cup.parent.parent.rglob("*")) == before


def test_a_base_class_with_a_slash_stays_in_the_folder(cup, capsys):
    said = teach("cup/1.png", "cup/2.png", "--base_class", "../cup", capsys=capsys)
    assert "Give another --name." in said
    assert [path.name for path in cup.parent.iterdir()] == ["cup"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cup", "other"], "PHOTOS 'cup': is a folder. Give one folder, or photos alone."),
        (["."], "holds 2 concepts (cup, other). Give the folder of one"),
        (["cup", "concepts=other"], "this command gives concepts itself. Say it with PHOTOS."),
        (["cup", "instance_data_dir=other"], "this command gives concepts itself"),
        (["cup", "output_dir=x"], "Say it with --output_dir."),
        (["cup", "shard=2/3"], "this command gives shard itself. Leave it out."),
        (["cup", "start=null"], "this command gives start itself. Say it with --start."),
        (["cup", "--base_class", ""], "--base_class '': must be plain words"),
        (["cup", "--base_class", "{}"], "--base_class '{}': must be plain words"),
    ],
)
def test_what_is_not_one_thing_is_refused(cup, given, message, capsys):
    shutil.copytree(cup, "other")
    rest = [] if "--base_class" in given else ["--base_class", "cup"]
    assert message in teach(*given, *rest, capsys=capsys)


def test_a_folder_whose_concept_file_has_a_name(cup, monkeypatch, capsys):
    (cup / "concept.json").write_text('{"name": "mine", "base_class": "cup"}')
    monkeypatch.chdir(cup)
    assert "output_dir=taught/mine: lies inside" in teach(".", "--base_class", "cup", capsys=capsys)


@pytest.mark.parametrize("name", ["[2024] cats", "'90s", "null", "'quoted'", "no", "#1", "1e3"])
def test_any_name_of_a_folder(cup, name, capsys):
    """No text of an argument is read as YAML."""
    cup.rename(cup.parent / name)
    said = teach(name, "--base_class", "null", capsys=capsys)
    assert "1 concept, 3 images" in said
    assert "base_class 'null' used, not 'cup'" in said


@pytest.mark.parametrize("text", ["[2024] cats", "'90s", "'", '"q', "null", "[", "a: b", "é\u202e"])
def test_texts_on_the_command_line_are_no_yaml(text):
    assert load_config(None, [as_override("concepts", text)]).concepts == text
    if text != "null":
        assert load_config(None, [f"concepts={text}"]).concepts == text
    served = teaching_config(ServeOptions(model=text, output_dir=text))
    assert (served.pretrained_model_name_or_path, served.output_dir) == (text, f"{text}/run")


def test_quotes_and_lists_are_still_read():
    read = load_config(
        None, ["concepts='a b'", "layers=[0, 1]", "validation_prompt=['a {}', 'b {}']"]
    )
    assert (read.concepts, read.layers) == ("a b", "0,1")
    assert read.validation_prompt == ("a {}", "b {}")
    with pytest.raises(CatVersionError, match="must be text"):
        load_config(None, ["instance_prompt=['a {}', 'b {}']"])


@pytest.mark.parametrize(
    ("options", "preset"),
    [
        ([], "quality"),
        (["lr=0.1", "init=normal"], "quality"),
        (["preset=fast"], "fast"),
        (["init=predicted"], "fast"),
        (["method=textual_inversion"], "fast"),
        (["preset=official", "init=predicted"], "official"),
    ],
)
def test_the_closest_preset_is_the_usual_one(options, preset):
    assert _preset(options, with_start=False) == preset


def test_photos_without_masks_are_taught_with_states_of_their_own(cup, one_block_sd_folder, capsys):
    for mask in cup.glob("*.mask.png"):
        mask.unlink()
    command = ["teach", "cup", "--base_class", "cup", "--model", str(one_block_sd_folder)]
    shared = [f"compilation_cache_dir={COMPILATION_CACHE}", "num_eval_samples=2"]
    assert main([*command, "--updates", "2", *shared]) == 0
    concept = load_concept(cup.parent / "taught" / "cup" / "concepts" / "cup")
    assert concept.learned.num_context_states == 16
    assert concept.train_config["preserve_weight"] == 1
    assert concept.train_config["digests"]["masks"] == ["", "", ""]
    assert not list(cup.glob("*.mask.png"))


@pytest.mark.parametrize(
    ("option", "fits"),
    [
        ("init=class_word", False),
        ("init=predicted", True),
        ("method=textual_inversion", False),
        ("context_states=4", False),
        ("preserve_weight=1", True),
        ("lr=0.1", True),
        ("preset=fast", True),
        ("preset=quality", False),
        ("preset=official", False),
        ("preset=textual_inversion", False),
    ],
)
def test_the_models_own_prediction_is_for_what_it_was_fitted_for(option, fits):
    start = own_start("tiny-sd")
    assert _unlike(start, ["lr_scheduler=constant", option]) == (None if fits else option)


def test_the_model_of_a_home_folder_has_its_own_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    shutil.copyfile(own_start("tiny-sd"), tmp_path / "model" / "start.safetensors")
    assert own_start("~/model") == tmp_path / "model" / "start.safetensors"


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert main(["status", "run"]) == 2
    assert (
        "the working directory: No such file or directory. Change to one" in capsys.readouterr().err
    )
