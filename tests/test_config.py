"""Options: precedence, spellings, the shipped files, and that a written config reads back."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from catversion_jax.config.training import (
    ALIASES,
    PRESETS,
    RECORDING_OPTIONS,
    TrainConfig,
    dump_config,
    learning_options,
    load_config,
    make_config,
    option_table,
)
from catversion_jax.errors import CatVersionError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_load_and_say_how_to_run_them(path: Path) -> None:
    load_config(path, ["concepts=somewhere"])
    header = path.read_text().split("\n\n")[0]
    for word in (f"train_tpu.py --config configs/{path.name}", "Machine:", "Result:"):
        assert word in header


def test_the_stronger_source_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("concepts: a\npreset: official\nseed: 5\nlearning_rate: 1e-3\n")
    config = load_config(file, ["learning_rate=2e-3"])
    assert config.logit_bias == 1.0  # the preset over the default 0
    assert config.seed == 5  # the file over the preset's 23
    assert config.learning_rate == 2e-3  # the command line over the file
    assert load_config(None, ["concepts=a"]).logit_bias == 0.0


def test_the_official_preset_is_the_released_code() -> None:
    # RoyZhao926/CatVersion: +1.0 on the logits, squash, seed 23, float32, AdamW 1e-2, 1000 x 2
    config = make_config({"concepts": "a", "preset": "official"})
    assert (config.logit_bias, config.crop, config.seed, config.when) == (1, "squash", 23, "always")
    assert (config.mixed_precision, config.num_positions, config.layers) == ("no", 1, "last3")
    assert (config.learning_rate, config.adam_weight_decay) == (1e-2, 1e-2)
    assert (config.max_train_steps, config.train_batch_size) == (1000, 2)
    assert (config.init, config.init_std, config.lr_scheduler) == ("normal", 1.0, "constant")
    assert (config.max_grad_norm, config.snr_gamma, config.caption_dropout) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate=1e-2", "learning_rate", 0.01),
        ("learning_rate=1", "learning_rate", 1.0),
        ("mixed_precision=no", "mixed_precision", "no"),
        ("layers=9,10,11", "layers", "9,10,11"),
        ("layers=[9, 10]", "layers", "9,10"),
        ("layers=11", "layers", "11"),
        (
            "validation_prompt=a {base_class}: large",
            "validation_prompt",
            ("a {base_class}: large",),
        ),
        ("validation_prompt=[a, b]", "validation_prompt", ("a", "b")),
        ("max_grad_norm=null", "max_grad_norm", None),
        ("variant=", "variant", None),
        ("num_embeddings=4", "num_positions", 4),
    ],
)
def test_spellings(text: str, name: str, value: object) -> None:
    assert getattr(load_config(None, ["concepts=a", text]), name) == value


def test_a_written_config_reads_back() -> None:
    config = make_config({"concepts": "a", "preset": "official", "validation_prompt": ["x", "y"]})
    assert make_config(yaml.safe_load(dump_config(config))) == config


def test_names_are_consistent() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= RECORDING_OPTIONS
    assert names >= set(ALIASES.values())
    assert not names & set(ALIASES)
    assert all(preset.keys() <= names for preset in PRESETS.values())
    assert not learning_options(make_config({"concepts": "a"})).keys() & RECORDING_OPTIONS
    assert all(text for _, _, text in option_table())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 3, "data_parallel": 2}, "multiple of data_parallel"),
        ({"random_flip": 1.5}, "within 0..1"),
        ({"adam_beta1": 1.0}, "below 1"),
        ({"seed": 2**32}, "below"),
        ({"max_train_steps": 0}, "at least 1"),
        ({"learning_rate": "fast"}, "learning_rate='fast': must be float"),
        ({"max_train_steps": True}, "must be int"),
        ({"crop": "centre"}, "Did you mean 'center'"),
    ],
)
def test_values_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(CatVersionError, match=message):
        make_config({"concepts": "a", **options})
