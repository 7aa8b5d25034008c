"""Every path on the command line goes through one reader, which knows buckets."""

import argparse
import importlib
import os

import pytest

from catversion_jax.cli import COMMANDS, main
from catversion_jax.cli.paths import path_argument

# Arguments that take any text. Whoever adds one that is a path gives it ``type=path_argument``
# instead: a path that is read in another way takes "gs://bucket" for a folder named "gs:".
TEXTS = {
    "train": {"config", "overrides"},  # the options of training are read by the config
    "teach": {"photos", "base_class", "model", "name"},
    "fit-start": {"concepts", "overrides", "config", "clip"},
    "plan": {"config", "overrides", "tpu", "gpu"},
    "check": {
        "concepts",
        "base_class",
        "model",
        "prediction_type",
        "instance_prompt",
        "dataset_split",
    }
    | {"image_column", "concept_column", "base_class_column"},
    "masks": {"concepts", "model", "clipseg", "base_class", "revision", "variant"}
    | {"prediction_type"},
    "generate": {"model", "revision", "variant", "prompt", "concept", "negative_prompt", "sampler"}
    | {"prediction_type"},
    "evaluate": {"clip", "prompts", "concepts", "base_class", "model", "revision", "variant"}
    | {"dino", "classes", "sampler", "scales", "prediction_type"},
    "export": {"concept", "model", "revision", "variant", "prompt", "negative_prompt"}
    | {"prediction_type"},
    "import": {"base_class", "name", "model", "variant"},
    "inspect": {"model", "prompt", "prediction_type"},
    "push": {"repo_id", "license"},
    "serve": {"model", "host", "sizes"},
    "status": set(),
    "merge": set(),
    "pack": set(),
}


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"catversion_jax.cli.{COMMANDS[command][0]}").add_arguments(parser)
    return parser


@pytest.mark.parametrize("command", COMMANDS)
def test_a_text_argument_is_no_path(command):
    texts = {
        action.dest
        for action in _parser(command)._actions
        if action.type is None and action.nargs != 0 and not action.choices
    }
    options = set()
    if command == "train":
        from catversion_jax.config import option_table

        options = {option.name for option in option_table()}
    assert texts - options == TEXTS[command]


def test_output_folders_are_paths():
    outputs = {
        (command, action.dest): action.type
        for command in COMMANDS
        for action in _parser(command)._actions
        if action.dest == "output_dir" and command != "train"
    }
    assert {command for command, _ in outputs} == {
        "generate", "evaluate", "export", "import", "masks", "serve", "teach",
    }  # fmt: skip
    assert set(outputs.values()) == {path_argument}


def test_a_bucket_that_cannot_be_used_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_code:
        main(["export", "somewhere", "--output_dir", "s3://bucket/run"])
    assert exit_code.value.code == 2
    assert "s3://bucket/run: must be a folder or begin with gs://" in capsys.readouterr().err
    assert os.listdir() == []
