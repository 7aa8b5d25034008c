"""``retrain=failed``: exactly the concepts that fail the gate get a larger budget, once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import final_files, run_here, steps_of

from catversion_jax import load_concept
from catversion_jax.config import RecordingOptions, make_config
from catversion_jax.config.method import UPDATES_AFTER_PREDICTION
from catversion_jax.errors import CatVersionError
from catversion_jax.training.retraining import (
    failed_concepts,
    gate_path,
    larger_budgets,
)
from catversion_jax.training.run.records import ConceptRecord

OPTIONS = {"max_train_steps": 4, "checkpointing_steps": 2, "eval_steps": 2}


def write_gate(output: Path, failed: dict[str, object]) -> None:
    path = gate_path(RecordingOptions(output_dir=str(output)))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"failed": failed}))


def stamps(output: Path) -> dict[str, int]:
    files = output.glob("concepts/*/catversion.safetensors")
    return {path.parent.name: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow  # five trainings; test_shards.py has the same way through shards
def test_a_larger_budget_for_exactly_those(
    one_block_sd_folder: Path, toys: Path, tmp_path: Path, capsys, caplog
) -> None:
    output, again = tmp_path / "out", {**OPTIONS, "retrain": "failed"}
    assert run_here(one_block_sd_folder, toys, output, **OPTIONS) == 0
    before, stamped = final_files(output), stamps(output)
    assert run_here(one_block_sd_folder, toys, output, **again) == 2
    assert "evaluation/gate.json: not found. catversion evaluate" in capsys.readouterr().err
    assert stamps(output) == stamped

    write_gate(output, {"teal_cup": {"updates": 4}, "unknown": {"updates": 4}})
    caplog.set_level("INFO")
    assert run_here(one_block_sd_folder, toys, output, **again) == 0
    assert "retrain=failed: 1 concepts get more updates: teal_cup 4 -> 8" in caplog.text
    assert "unknown: fails the gate of" in caplog.text
    assert steps_of(output) == {"purple_kite": 4, "striped_ball": 4, "teal_cup": 8}
    retrained, now = final_files(output), stamps(output)
    for name in ("purple_kite", "striped_ball"):
        assert now[name] == stamped[name]
    config = load_concept(output / "concepts" / "teal_cup").train_config
    assert (config["max_train_steps"], config["failed_at"]) == (8, 4)
    run = json.loads((output / "run.json").read_text())
    assert run["options"]["max_train_steps"] == 4

    # neither command has anything left to do
    assert run_here(one_block_sd_folder, toys, output, **again) == 0
    assert run_here(one_block_sd_folder, toys, output, **OPTIONS) == 0
    assert stamps(output) == now

    # the same numbers as of a run that was begun with this budget
    one = tmp_path / "one"
    fresh = {**OPTIONS, "max_train_steps": 8, "base_class": "cup"}
    assert run_here(one_block_sd_folder, toys / "teal_cup", one, **fresh) == 0
    ours, theirs = (load_concept(f / "concepts" / "teal_cup").learned for f in (output, one))
    np.testing.assert_allclose(ours.key, theirs.key, atol=1e-3 * 8 * 1e-2)
    np.testing.assert_allclose(ours.value, theirs.value, atol=1e-3 * 8 * 1e-2)

    # interrupted on the way: the former file is still there, and the newest checkpoint half done
    newest = sorted(output.glob("checkpoints/process-0000/*"), key=lambda path: int(path.name))
    shutil.rmtree(newest[-1])
    (output / "concepts/teal_cup/catversion.safetensors").write_bytes(before["teal_cup"])
    caplog.clear()
    assert run_here(one_block_sd_folder, toys, output, **again) == 0
    assert "resumed 1 concepts at step 6" in caplog.text
    assert final_files(output) == retrained


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", r"is no file of the quality gate"),
        ("{}", r"is no file of the quality gate"),
        ('{"failed": {"rex": {"updates": "many"}}}', r"'rex': updates='many': must be a number"),
        ('{"failed": {"rex": 3}}', r"'rex': updates=None"),
        ('{"failed": {"rex": {"updates": -1}}}', r"updates=-1"),
    ],
)
def test_a_gate_that_is_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    path.write_text(content)
    with pytest.raises(CatVersionError, match=message):
        failed_concepts(path)


def test_images_from_elsewhere_count_as_the_runs_updates(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    path.write_text('{"failed": {"rex": {"reasons": ["copies"]}, "fido": {"updates": 50}}}')
    assert failed_concepts(path) == {"rex": None, "fido": 50}
    options = RecordingOptions(retrain="failed", gate_file=str(path))
    assert gate_path(options) == path
    names = ("rex", "fido", "tom")
    found = larger_budgets(names, 100, options)
    assert found == {
        "rex": {"max_train_steps": 200, "failed_at": 100},
        "fido": {"max_train_steps": 100, "failed_at": 50},
    }
    assert record("rex").with_budget(found["rex"]).has_larger_budget
    assert not record("tom").with_budget({}).has_larger_budget
    path.write_text(json.dumps({"failed": {"cafe\u0301": {"updates": 3}, "na\u00efve": {}}}))
    assert list(larger_budgets(("caf\u00e9", "nai\u0308ve"), 100, options)) == [
        "caf\u00e9",
        "nai\u0308ve",
    ]
    path.write_text(json.dumps({"failed": {"rex": {"updates": 2**31 - 1}}}))
    with pytest.raises(CatVersionError, match=r"2\.0 x 2147483647 updates are more than"):
        larger_budgets(names, 100, options)
    path.write_text('{"failed": {"rex": {"updates": 0}}}')
    found = larger_budgets(names, 100, options)
    assert found["rex"]["max_train_steps"] == UPDATES_AFTER_PREDICTION


def record(name: str) -> ConceptRecord:
    config = {"max_train_steps": 100}
    return ConceptRecord(name, "dog", "class_word", "", "", (), (), 0.0, 0, config)


def test_a_schedule_that_has_ended_is_refused() -> None:
    with pytest.raises(CatVersionError, match=r"retrain=failed: needs lr_scheduler=constant"):
        make_config({"concepts": "x", "retrain": "failed", "lr_scheduler": "linear"})
