"""Any text for any option of any command gives a value or one line of error, soon."""

import argparse
import datetime
import importlib
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from catversion_jax.cli import COMMANDS, main
from catversion_jax.cli.prompt_files import read_prompts
from catversion_jax.config import PRESETS, TrainConfig, load_config, make_config, option_table
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.image_folders import find_images, recorded_settings
from catversion_jax.evaluation.prompts import EvaluationPrompt, load_prompt_set
from catversion_jax.sampling.pages import says_the_same
from catversion_jax.sampling.png import read_metadata
from catversion_jax.sampling.requests import ImageRequest

TEXTS = (
    "", " ", "null", "~", "true", "no", "nan", "-inf", "1e400", "-1", "0", "1.5", "2000000000",
    "1" + "0" * 400, "9" * 5000, "2026-02-30", "2026-11-28", "1:30", "0x1f", "1_000", "[1, 2]",
    "{a: 1}", "[" * 5000, "*a", "&a [*a]", "<<: {a: 1}", "!!python/object:os.system x",
    "!!binary x", "!!timestamp x", "'", '"', "%", "%s", "\\", "a=b", "=1", "@", "`", "- -", "?",
    "\x1b[31m", "\u202e", "\udcff", "a\x00b", "~nosuchuser/x", "a/" * 2500, "x" * 5000, "\u00b2",
    "\u0663", ".", "/dev/null", "gs://", "http://x", "lone \ud800",
)  # fmt: skip
VALUES = (
    None, True, -1, 10**400, -(10**5000), 1e308, float("nan"), float("inf"), [], [1], ["a", None],
    [[]], {}, {"a": 1}, (), ("a", 1), b"bytes", datetime.date(2026, 1, 1), object(), "\udcff",
    "\x00", {1, 2},
)  # fmt: skip
OPTIONS = [row.name for row in option_table()]


def one_line(error: CatVersionError) -> None:
    """One short line for each mistake, which can be stored and printed."""
    lines = str(error).splitlines()
    assert 1 <= len(lines) <= 3
    assert all(len(line) < 1000 for line in lines)
    str(error).encode()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_text_for_every_option(name: str, tmp_path: Path) -> None:
    for text in TEXTS:
        try:
            assert isinstance(load_config(None, ["concepts=x", f"{name}={text}"]), TrainConfig)
        except CatVersionError as error:
            one_line(error)
        path = tmp_path / "config.yaml"
        path.write_text(f"concepts: x\n{name}: {text}\n", "utf-8", "surrogatepass")
        try:
            assert isinstance(load_config(path), TrainConfig)
        except CatVersionError as error:
            one_line(error)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_value_for_every_option(name: str) -> None:
    for value in VALUES:
        for make in (make_config, lambda values: TrainConfig(**values)):
            try:
                config = make({"concepts": "x", name: value})
            except CatVersionError as error:
                one_line(error)
            else:
                assert config.preset in PRESETS


@pytest.mark.parametrize("key", [1, None, "", "\udcff", "x" * 5000, ("a",)])
def test_what_is_no_option(key: object) -> None:
    with pytest.raises(CatVersionError, match="no such option"):
        make_config({"concepts": "x", key: 1})


# ---- the arguments of the other commands

NOWHERE = "./nowhere"
USUAL = {
    "generate": ["--model", NOWHERE, "--prompt", "a cup"],
    "evaluate": [NOWHERE],
    "export": [NOWHERE, "--output_dir", "out"],
    "import": [NOWHERE, "--base_class", "cup"],
    "inspect": [NOWHERE],
    "check": [NOWHERE],
    "masks": [NOWHERE, "--model", NOWHERE],
    "status": [NOWHERE],
    "merge": [NOWHERE],
    "pack": [NOWHERE, "--out", "out.arrow"],
    "plan": ["--gpu", "h100", f"pretrained_model_name_or_path={NOWHERE}"],
}


def arguments_of(command: str) -> list[str]:
    """Every argument of a command that takes a value; "" is what has no name."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"catversion_jax.cli.{COMMANDS[command][0]}").add_arguments(parser)
    return [
        action.option_strings[0] if action.option_strings else ""
        for action in parser._actions
        if action.nargs != 0
    ]


@pytest.mark.parametrize(
    ("command", "argument"),
    [(command, argument) for command in USUAL for argument in arguments_of(command)],
)
def test_every_text_for_every_argument(
    command: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    usual = USUAL[command]
    if argument in ("--tpu", "--gpu"):
        usual = usual[2:]
    if argument == "--prompts" and command == "generate":
        usual = usual[:2]
    for text in TEXTS:
        own = [f"{argument}={text}"] if argument else [text]
        try:
            code = main([command, *(usual if argument else usual[1:]), *own])
        except SystemExit as stopped:  # argparse
            code = stopped.code
        said = capsys.readouterr().err
        assert code in (2, 3), (text, code, said)
        assert said
        assert "Traceback" not in said
        assert all(len(line) < 12_000 for line in said.splitlines())
        assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--num_images_per_prompt", "2000000000"], "must be at most 1000"),
        (["generate", "--height", "80000000"], "height=80000000: must be at most"),
        (["generate", "--batch_size", "80000000"], "batch_size=80000000: must be at most"),
        (["generate", "--guidance_scale", "1e999"], "--guidance_scale inf: must be a finite"),
        (["generate", "--scale", "nan"], "--scale nan: must be a finite number"),
        (["generate", "--prompt", "\udcff"], "that UTF-8 can hold"),
        (["plan", "--price_per_chip_hour", "nan"], "--price_per_chip_hour nan: must be a finite"),
        (["plan", "--price_per_chip_hour=-1"], "--price_per_chip_hour -1.0: must be at least 0"),
        (["plan", "--images", "3000000000"], "--images 3000000000: must be at most"),
    ],
)
def test_what_is_said(arguments: list[str], words: str, capsys) -> None:
    command, *own = arguments
    assert main([command, *USUAL[command], *own]) == 2
    assert words in capsys.readouterr().err


def test_a_million_images_are_enough(tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("a cup\n" * 1001)
    arguments = ["--model", NOWHERE, "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["generate", *arguments, "--num_images_per_prompt", "1000"]) == 2
    assert "number of images=1001000: must be at most 1000000" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, float("nan")])
def test_a_seed_is_a_whole_number(seed: object) -> None:
    with pytest.raises(CatVersionError, match="must be a whole number within"):
        ImageRequest("a cup", (), seed)


@pytest.mark.parametrize("prompt", ["\ud800", 7, None, b"x"])
def test_a_prompt_is_text(prompt: object) -> None:
    for request in ({"prompt": prompt}, {"prompt": "a cup", "negative_prompt": prompt}):
        with pytest.raises(CatVersionError, match="must be text"):
            ImageRequest(**request)


# ---- files of prompts


@pytest.mark.parametrize("suffix", ["yaml", "json", "jsonl", "txt"])
def test_any_text_in_a_file_of_prompts(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{suffix}"
    texts = [*TEXTS, *(f"- prompt: {text}\n  seed: {text}" for text in TEXTS)]
    texts += [json.dumps({"prompt": "x", "seed": text}) for text in TEXTS]
    for text in texts:
        path.write_text(text, "utf-8", "surrogatepass")
        for read in (read_prompts, lambda path: load_prompt_set(str(path))):
            try:
                assert read(path)
            except CatVersionError as error:
                one_line(error)


@pytest.mark.parametrize(
    "text",
    [
        "{1: 2, b: 3}",
        "prompts: [{prompt: 'a {}', edit: 5}]",
        "prompts: ['a {}']\nlive_prompts: ['a {}']\nlive_classes: 5",
        "prompts: ['a {}']\nnum_images_per_prompt: 2026-01-01",
        "prompts: {a: b}",
    ],
)
def test_a_prompt_set_of_other_types(text: str, tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(CatVersionError, match=r"--prompts .*set\.yaml"):
        load_prompt_set(str(tmp_path / "set.yaml"))


# ---- arrays


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    data = text.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(data)) + data


SHAPE = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}\n"
ARRAYS: dict[str, bytes] = {
    "empty": b"",
    "text": b"no array",
    "magic": b"\x93NUMPY",
    "broken end": header(SHAPE.format("<f4", "(9, 9)")) + b"\x00" * 5,
    "huge": header(SHAPE.format("<f4", "(1000000000000, 1000)")),
    "huge product": header(SHAPE.format("<f4", f"({2**62}, {2**62})")),
    "digits": header(SHAPE.format("<f4", "(1" + "0" * 5000 + ",)")),
    "negative": header(SHAPE.format("<f4", "(-1, 4)")) + b"\x00" * 64,
    "nested": header("(" * 5000),
    "object": header(SHAPE.format("|O", "(1,)")) + b"cos\nsystem\n(S'true'\ntR.",
    "dtype": header(SHAPE.format("nonsense", "(1,)")),
    "text array": header(SHAPE.format("<U4", "(1,)")) + b"\x00" * 16,
    "version": header(SHAPE.format("<f4", "(1,)"), b"\x09\x09"),
    "zip": b"PK\x03\x04" + b"\x00" * 50,
    "pickle": b"\x80\x04cos\nsystem\n.",
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_latents_that_are_no_array(kind: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "latents.npy"
    path.write_bytes(ARRAYS[kind])
    code = main(["generate", *USUAL["generate"], "--latents", str(path)])
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    if kind != "text array":  # an array; what is wrong with it shows beside the model
        assert "is not a readable .npy array" in said or "negative" in kind


def test_latents_that_are_several_arrays(tmp_path: Path, capsys) -> None:
    with zipfile.ZipFile(tmp_path / "latents.npy", "w") as file:
        file.writestr("a.npy", header(SHAPE.format("<f4", "(1,)")) + b"\x00" * 4)
    code = main(["generate", *USUAL["generate"], "--latents", str(tmp_path / "latents.npy")])
    assert code == 2
    assert "holds several arrays" in capsys.readouterr().err


# ---- metadata of pictures

METADATA = (
    "", "null", "7", "[]", '"x"', "{", "[" * 100_000, '{"seed": Infinity}',
    '{"seed": NaN, "prompt": []}',
    '{"seed": 1e999, "prompt": "a cup"}', '{"seed": 1' + "0" * 5000 + ', "prompt": "a cup"}',
    '{"prompt": {"a": 1}, "seed": {}}', '{"concepts": [1, null, []]}', '{"concepts": 5}', "\x00",
    '{"prompt": "a cup", "prompt": "b"}', '{"model": "\\ud800"}',
)  # fmt: skip


@pytest.mark.parametrize("text", METADATA, ids=range(len(METADATA)))
def test_any_metadata_in_a_picture(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a-cup_3.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    try:
        metadata = read_metadata(path)
    except CatVersionError as error:
        one_line(error)
    else:
        assert isinstance(metadata, dict)
        assert not says_the_same(metadata, {"prompt": "a cup"})
    assert json.loads(json.dumps(recorded_settings(path), allow_nan=False)) is not None
    found, others = find_images(tmp_path, [EvaluationPrompt("a {}", "")], "cup")
    assert [(image.prompt, image.seed) for image in found] == [(0, 3)]  # as its name says
    assert others == []
    for name in ("\u00b2_0", "\u0660_\u0663", "0_\u0663"):  # digits, and no numbers here
        (tmp_path / f"{name}.png").write_bytes(path.read_bytes())
    found, others = find_images(tmp_path, [EvaluationPrompt("a {}", "")], "cup")
    assert (len(found), len(others)) == (1, 3)


def damaged(data: bytes) -> list[bytes]:
    return [data[: len(data) // 2], data[:40], b"", data[:30] + b"\xff" * 20 + data[50:]]


@pytest.mark.parametrize("make", [damaged])
def test_a_damaged_picture_has_no_metadata(make: Callable, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)
    for data in make(path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(CatVersionError, match="carries no settings of ours"):
            read_metadata(path)
