"""Options: precedence, spellings, the shipped files, and that a written config reads back."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from catversion_jax.config import (
    ALIASES,
    PRESETS,
    TrainConfig,
    dump_config,
    learning_options,
    load_config,
    make_config,
    option_table,
)
from catversion_jax.config.options import Options, option
from catversion_jax.errors import CatVersionError

DECIDING = """
    pretrained_model_name_or_path revision variant prediction_type method preset base_class
    dataset_split image_column concept_column base_class_column resolution crop random_flip alpha
    instance_prompt
    num_positions layers logit_bias init init_std adapt scope when snr_gamma masked_training
    unmasked_weight timestep_sampling caption_dropout max_train_steps train_batch_size learning_rate
    lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    ema_decay early_stop early_stop_eps early_stop_window early_stop_min_steps seed mixed_precision
    mask_polarity preserve_weight context_states
"""
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
        ("seed=1_000", "seed", 1000),
        ("seed=0", "seed", 0),
        ("learning_rate=0.010", "learning_rate", 0.01),
        ("output_dir=007", "output_dir", "007"),
    ],
)
def test_spellings(text: str, name: str, value: object) -> None:
    assert getattr(load_config(None, ["concepts=a", text]), name) == value


def test_one_option_under_two_names(tmp_path: Path) -> None:
    """The last word counts, whichever name it uses; in one file there is one."""
    file = tmp_path / "config.yaml"
    file.write_text("concepts: a\nnum_vectors: 2\n")
    assert load_config(file, ["num_positions=4"]).num_positions == 4
    given = ["concepts=a", "num_positions=4", "num_vectors=2"]
    assert load_config(None, given).num_positions == 2
    file.write_text("concepts: a\nnum_positions: 4\nnum_vectors: 2\n")
    with pytest.raises(CatVersionError, match=r"num_vectors: .* both mean num_positions"):
        load_config(file)
    for text in ("seed=0200", "seed=1:30", "max_train_steps=010"):
        with pytest.raises(CatVersionError, match="to the base 8"):
            load_config(None, ["concepts=a", text])


def test_a_written_config_reads_back() -> None:
    config = make_config({"concepts": "a", "preset": "official", "validation_prompt": ["x", "y"]})
    assert make_config(yaml.safe_load(dump_config(config))) == config


def test_names_are_consistent() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= set(ALIASES.values())
    assert not names & set(ALIASES)
    assert all(preset.keys() <= names for preset in PRESETS.values())
    assert sorted(row.name for row in option_table()) == sorted(names)
    assert all(row.help.endswith(".") or row.help.endswith(").") for row in option_table())
    assert all(row.help[0].isupper() and row.group for row in option_table())


def test_what_decides_the_result() -> None:
    """Files of released versions hold these names; a run is refused when their values change."""
    config = make_config({"concepts": "a"})
    assert learning_options(config).keys() == set(DECIDING.split())
    stopping = dataclasses.replace(config, early_stop="plateau", eval_steps=20)
    assert learning_options(stopping).keys() - learning_options(config).keys() == {
        "eval_steps",
        "num_eval_samples",
    }


def test_an_option_says_whether_it_decides_the_result() -> None:
    with pytest.raises(TypeError, match="decides_result"):

        @dataclasses.dataclass(frozen=True)
        class Silent(Options):
            strength: float = option(1.0, "Strength of something.")  # type: ignore[call-arg]

    with pytest.raises(TypeError, match=r"Bare\.strength: is not defined by option"):

        @dataclasses.dataclass(frozen=True)
        class Bare(Options):
            strength: float = 1.0


def test_groups_hold_the_values_of_the_whole() -> None:
    config = make_config({"concepts": "a", "adapt": "key", "eval_steps": 7, "learning_rate": 0.5})
    groups = {name: getattr(config, name) for name in dir(config) if name.endswith("_options")}
    assert groups["method_options"].adapt == "key"
    found = [vars(group) for group in groups.values()]
    merged = {name: value for group in found for name, value in group.items()}
    assert len(merged) == sum(map(len, found))
    assert merged | {"preset": "none"} == dataclasses.asdict(config)


def test_a_shipped_file_has_a_name() -> None:
    named = load_config("quickstart")
    assert named == load_config(next(path for path in CONFIGS if path.stem == "quickstart"))
    with pytest.raises(
        CatVersionError, match=r"ships with this package.*Did you mean 'quickstart'"
    ):
        load_config("quikstart")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 3, "data_parallel": 2}, "multiple of data_parallel"),
        ({"random_flip": 1.5}, "within 0..1"),
        ({"adam_beta1": 1.0}, "below 1"),
        ({"seed": 2**32}, "below"),
        ({"data_parallel": 0}, "data_parallel=0: must be at least 1"),
        ({"max_train_steps": -1}, "at least 0"),
        ({"max_train_steps": 0}, "Use 1 or more, or init=predicted"),
        ({"learning_rate": "fast"}, "learning_rate='fast': must be float"),
        ({"max_train_steps": True}, "must be int"),
        ({"crop": "centre"}, "Did you mean 'center'"),
    ],
)
def test_values_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(CatVersionError, match=message):
        make_config({"concepts": "a", **options})
