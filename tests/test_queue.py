"""The queue: refilled slots, early stop, preemption, damaged checkpoints, locks, status."""

import csv
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from random_model import write_toy_concepts
from running import arguments, final_files, run_here, run_to_end, start, timeline, wait_for

from catversion_jax import load_concept
from catversion_jax.cli import main
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.training.early_stop import should_stop
from catversion_jax.training.feeder import Feeder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    write_toy_concepts(folder)
    return folder


# ---- refilling


@pytest.fixture(scope="module")
def stopped_early(tiny_sd_folder: Path, toys: Path, tmp_path_factory) -> Path:
    """One slot after the other ends at another step: a rule that stops at the first chance."""
    output = tmp_path_factory.mktemp("early") / "out"
    text = run_to_end(arguments(tiny_sd_folder, toys, output, **EARLY))
    assert "training step ready after" in text
    assert "compiled again" not in text
    return output


EARLY = {
    "early_stop": "dvar",
    "early_stop_eps": 0.1,
    "early_stop_window": 4,
    "early_stop_min_steps": 4,
    "eval_steps": 2,
    "max_train_steps": 24,
    "learning_rate": 0.1,
}


def test_an_early_stop_is_what_the_rule_says_and_frees_the_slot(stopped_early: Path) -> None:
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
    before = [row for row in rows if row["slot"] == third["slot"] and row is not third]
    assert [float(row["ended"]) <= float(third["began"]) for row in before] == [True]


def test_results_do_not_depend_on_order_slot_or_company(
    tiny_sd_folder: Path, toys: Path, stopped_early: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "concepts.json"
    names = ["teal_cup", "striped_ball", "purple_kite"]
    entries = [
        {"name": n, "instance_data_dir": str(toys / n), "base_class": n.split("_")[1]}
        for n in names
    ]
    manifest.write_text(json.dumps(entries))
    output = tmp_path / "out"
    run_to_end(arguments(tiny_sd_folder, manifest, output, **EARLY))
    for name, data in final_files(stopped_early).items():
        one, other = (load_concept(f / "concepts" / name) for f in (stopped_early, output))
        assert one.step == other.step
        np.testing.assert_array_equal(one.learned.key, other.learned.key), data


def test_an_early_stopped_concept_is_done(
    tiny_sd_folder: Path, toys: Path, stopped_early: Path
) -> None:
    before = final_files(stopped_early)
    stamps = {p: p.stat().st_mtime_ns for p in stopped_early.glob("concepts/*/*.safetensors")}
    assert run_here(tiny_sd_folder, toys, stopped_early, **EARLY) == 0
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


# ---- faults


LONG = {"max_train_steps": 150}


@pytest.fixture(scope="module")
def whole(tiny_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_to_end(arguments(tiny_sd_folder, toys, output, **LONG, checkpointing_steps=1000))
    return output


def test_sigterm_saves_and_exits_with_its_own_code(
    tiny_sd_folder: Path, toys: Path, whole: Path, tmp_path: Path, capsys
) -> None:
    output, options = tmp_path / "out", {**LONG, "checkpointing_steps": 1000}
    process = start(arguments(tiny_sd_folder, toys, output, **options))
    wait_for(process, "concepts/*/metrics.csv", output)
    shown = ""
    while process.poll() is None and not re.search(r"purple_kite: step [1-9]", shown):
        time.sleep(0.1)
        assert main(["status", str(output)]) == 0
        shown = capsys.readouterr().out
    assert re.search(r"2 running.*purple_kite: step \d+ of 150", shown, re.DOTALL), shown
    # another process is refused while the first one lives
    assert run_here(tiny_sd_folder, toys, output, **options) == 2
    assert "another process is training into it" in capsys.readouterr().err
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert time.monotonic() - started < 30
    (step,) = (int(p.name) for p in output.glob("checkpoints/process-0000/[0-9]*"))
    assert step % 1000
    assert main(["status", str(output)]) == 0
    assert "no process is training here now: run its command again" in capsys.readouterr().out
    text = run_to_end(arguments(tiny_sd_folder, toys, output, **options))
    assert f"resumed 2 concepts at step {step}" in text
    assert final_files(output) == final_files(whole)
    assert main(["status", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 3}


def test_a_damaged_checkpoint_falls_back_to_the_one_before_loudly(
    tiny_sd_folder: Path, toys: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(arguments(tiny_sd_folder, toys, output, **LONG))
    wait_for(process, "checkpoints/process-0000/12", output)
    process.kill()
    process.communicate()
    folders = sorted(
        (output / "checkpoints" / "process-0000").glob("[0-9]*"), key=lambda p: int(p.name)
    )
    folders = [folder for folder in folders if folder.name.isdigit()]
    for file in folders[-1].rglob("*"):
        if file.is_file() and os.path.getsize(file) > 200:
            file.write_bytes(file.read_bytes()[:100])
    text = run_to_end(arguments(tiny_sd_folder, toys, output, **LONG))
    assert f"{folders[-1]}: is damaged" in text.replace("\n", "")
    assert f"resumed 2 concepts at step {folders[-2].name}" in text
    assert final_files(output) == final_files(whole)


def test_more_steps_and_more_concepts_are_welcome(
    tiny_sd_folder: Path, tmp_path: Path, capsys
) -> None:
    concepts, output = tmp_path / "concepts", tmp_path / "out"
    write_toy_concepts(concepts)
    (concepts / "teal_cup").rename(tmp_path / "teal_cup")
    run_to_end(arguments(tiny_sd_folder, concepts, output, max_train_steps=4))
    (tmp_path / "teal_cup").rename(concepts / "teal_cup")
    run_to_end(arguments(tiny_sd_folder, concepts, output, max_train_steps=8))
    files = [
        load_concept(path) for path in sorted(output.glob("concepts/*/catversion.safetensors"))
    ]
    assert [concept.step for concept in files] == [8, 8, 8]
    capsys.readouterr()
    assert run_here(tiny_sd_folder, concepts, output, max_train_steps=6) == 2
    assert "max_train_steps: 8 -> 6" in capsys.readouterr().err


def test_status_of_something_else(tmp_path: Path, capsys) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a training run: it has no index.csv" in capsys.readouterr().err
