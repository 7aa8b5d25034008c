"""The queue: refilled rows, early stop, the feeder."""

import csv
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from running import arguments, final_files, run_here, run_to_end, timeline

from catversion_jax import load_concept
from catversion_jax.cli import main
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.training.early_stop import should_stop
from catversion_jax.training.feeder import Feeder

# ---- refilling


@pytest.fixture(scope="module")
def stopped_early(one_block_sd_folder: Path, toys: Path, tmp_path_factory) -> Path:
    """One row after the other ends at another step: a rule that stops at the first chance."""
    output = tmp_path_factory.mktemp("early") / "out"
    text = run_to_end(arguments(one_block_sd_folder, toys, output, **EARLY))
    assert "training step ready after" in text
    assert "compiled again" not in text
    return output


EARLY = {
    "early_stop": "dvar",
    "early_stop_eps": 0.5,
    "early_stop_window": 4,
    "early_stop_min_steps": 4,
    "eval_steps": 2,
    "max_train_steps": 24,
}


def test_an_early_stop_is_what_the_rule_says_and_frees_the_row(stopped_early: Path) -> None:
    config = make_config({"concepts": "x", **EARLY})
    rows = timeline(stopped_early)
    assert {row["concept"] for row in rows} == {"purple_kite", "striped_ball", "teal_cup"}
    for row in rows:
        folder = stopped_early / "concepts" / row["concept"]
        with (folder / "metrics.csv").open() as file:
            metrics = [r for r in csv.DictReader(file) if r["eval_loss"]]
        losses = [(int(r["step"]), float(r["eval_loss"])) for r in metrics]
        last = int(row["last_step"])
        assert losses[-1][0] == last
        stops = [n for n in range(1, len(losses) + 1) if should_stop(losses[:n], config)]
        assert stops == ([] if last == 24 else [len(losses)])
        assert row["outcome"] == ("done" if last == 24 else "stopped early")
        assert load_concept(folder).step == last
    # the third concept took the row that was free first, at that very moment
    third = max(rows, key=lambda row: float(row["began"]))
    before = [row for row in rows if row["row"] == third["row"] and row is not third]
    assert [float(row["ended"]) <= float(third["began"]) for row in before] == [True]


def test_results_do_not_depend_on_order_row_or_company(
    one_block_sd_folder: Path, toys: Path, stopped_early: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "concepts.json"
    names = ["teal_cup", "striped_ball", "purple_kite"]
    entries = [
        {"name": n, "instance_data_dir": str(toys / n), "base_class": n.split("_")[1]}
        for n in names
    ]
    manifest.write_text(json.dumps(entries))
    output = tmp_path / "out"
    run_to_end(arguments(one_block_sd_folder, manifest, output, **EARLY))
    for name in final_files(stopped_early):
        one, other = (load_concept(f / "concepts" / name) for f in (stopped_early, output))
        assert one.step == other.step
        np.testing.assert_array_equal(one.learned.key, other.learned.key)
        np.testing.assert_array_equal(one.learned.value, other.learned.value)


def test_an_early_stopped_concept_is_done(
    one_block_sd_folder: Path, toys: Path, stopped_early: Path
) -> None:
    before = final_files(stopped_early)
    stamps = {p: p.stat().st_mtime_ns for p in stopped_early.glob("concepts/*/*.safetensors")}
    assert run_here(one_block_sd_folder, toys, stopped_early, **EARLY) == 0
    assert final_files(stopped_early) == before
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_the_rules_against_their_formulas() -> None:
    common = {"concepts": "x", "eval_steps": 10, "early_stop_window": 20, "early_stop_min_steps": 0}
    dvar = make_config({**common, "early_stop": "dvar", "early_stop_eps": 0.1})
    plateau = make_config({**common, "early_stop": "plateau", "early_stop_eps": 0.1})
    falling = [(10 * i, 1.0 / (1 + i)) for i in range(6)]
    flat = [*falling, *((60 + 10 * i, 1 / 6) for i in range(3))]
    assert not should_stop(falling[:2], dvar)  # younger than the window
    assert should_stop(flat, dvar) == (
        np.var([v for _, v in flat[-2:]]) <= 0.1 * np.var([v for _, v in flat])
    )
    assert should_stop(flat, dvar)
    assert should_stop(flat, plateau)
    assert not should_stop(falling[:4], plateau)
    assert not should_stop(flat, make_config({"concepts": "x"}))


def test_a_window_without_two_evaluations_is_refused() -> None:
    with pytest.raises(CatVersionError, match=r"must hold at least two evaluations.*eval_steps=12"):
        make_config({"concepts": "x", "early_stop": "dvar", "eval_steps": 100})


def test_what_is_left_open_is_calibrated() -> None:
    """The table of docs/how_to/many_concepts.md."""
    common = {"concepts": "x", "eval_steps": 10}
    losses = [(10 * n, 1 / (1 + n)) for n in range(60)]
    for rule, eps, window in (("dvar", 0.3, 120), ("plateau", 0.02, 80)):
        given = {"early_stop_eps": eps, "early_stop_window": window}
        short = make_config({**common, "early_stop": rule})
        full = make_config({**common, "early_stop": rule, **given})
        stops = [should_stop(losses[:n], short) for n in range(1, 60)]
        assert stops == [should_stop(losses[:n], full) for n in range(1, 60)]
        assert not any(stops[: window // 10])


# ---- the feeder


def test_the_feeder_stays_a_few_ahead_and_hands_errors_over() -> None:
    prepared: list[str] = []

    def prepare(name: str) -> str:
        if name == "d":
            raise OSError("disk gone")
        prepared.append(name)
        return name.upper()

    with Feeder("abcd", prepare, ahead=1) as feeder:
        time.sleep(0.3)
        assert len(prepared) <= 2  # one waits in the queue, one to get into it
        assert [feeder.next() for _ in range(3)] == ["A", "B", "C"]
        with pytest.raises(OSError, match="disk gone"):
            feeder.next()
        assert feeder.next() is None
    with Feeder("abc", str.upper, ahead=1) as feeder:
        assert feeder.next() == "A"
    assert not any(thread.name == "feeder" for thread in threading.enumerate())


def test_status_of_something_else(tmp_path: Path, capsys) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a training run: it has no index.csv" in capsys.readouterr().err
