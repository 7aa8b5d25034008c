"""Several processes with two devices each train one list, as hosts of a slice do."""

import concurrent.futures
import csv
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from random_model import write_toy_concepts
from running import arguments, assert_close, final_files, run_to_end, start

from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.atomic_files import check_writable
from catversion_jax.runtime.processes import HEARTBEAT_SECONDS

OPTIONS = {"concepts_per_device": 1, "max_train_steps": 40}
# Evaluations that keep the processes busy until a signal has reached them all.
BUSY = {"eval_steps": 4, "num_eval_samples": 8}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six concepts."""
    folder = tmp_path_factory.mktemp("toys")
    write_toy_concepts(folder)
    for path in sorted(folder.iterdir()):
        shutil.copytree(path, folder / f"second_{path.name}")
    return folder


@pytest.fixture(scope="module")
def alone(one_block_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    run_to_end(arguments(one_block_sd_folder, toys, output, **OPTIONS), **devices(2))
    return output


def devices(count: int) -> dict[str, str]:
    flag = f"--xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}


def start_all(count: int, args: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            [
                *args,
                f"coordinator_address=localhost:{port}",
                f"num_processes={count}",
                f"process_id={i}",
            ],
            **devices(2),
        )
        for i in range(count)
    ]


def newest_checkpoint(output: Path) -> int:
    """Of process 1."""
    folders = output.glob("checkpoints/process-0001/[0-9]*")
    return max((int(folder.name) for folder in folders if folder.name.isdigit()), default=0)


def wait_for_checkpoint(output: Path, after: int, processes: list[subprocess.Popen]) -> None:
    """Until process 1 has saved one more, while all are at work."""
    while newest_checkpoint(output) <= after:
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        time.sleep(0.05)


def test_processes_may_look_at_the_same_new_folder_at_once(tmp_path: Path) -> None:
    """A process that fails over it before it has joined leaves the others waiting."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(check_writable, [tmp_path / "runs" / "out"] * 2000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_share_the_list_and_learn_what_one_learns(
    one_block_sd_folder: Path, toys: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    processes = start_all(4, arguments(one_block_sd_folder, toys, output, **OPTIONS))
    texts = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, "\n".join(texts)
    assert final_files(output).keys() == final_files(alone).keys()
    assert_close(output, alone)
    with (output / "index.csv").open() as file:
        assert {row["state"] for row in csv.DictReader(file)} == {"done"}
    parts = []
    for path in output.glob("timeline*.csv"):
        with path.open() as file:
            parts.append({row["concept"] for row in csv.DictReader(file)})
    assert sorted(len(part) for part in parts) == [1, 1, 2, 2]
    assert len(set().union(*parts)) == 6


@pytest.mark.slow
def test_a_signal_to_one_stops_all_one_killed_ends_the_others_and_a_restart_continues(
    one_block_sd_folder: Path, toys: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    args = arguments(one_block_sd_folder, toys, output, **OPTIONS, **BUSY)
    processes = start_all(2, args)
    wait_for_checkpoint(output, 0, processes)
    processes[1].send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], "\n".join(texts)
    assert time.monotonic() - signalled < 30
    assert (output / "STOP").exists()

    saved = newest_checkpoint(output)
    processes = start_all(2, args)
    wait_for_checkpoint(output, saved, processes)
    assert not (output / "STOP").exists()
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    killed = time.monotonic()
    text, _ = processes[0].communicate(timeout=4 * HEARTBEAT_SECONDS)
    assert time.monotonic() - killed < 4 * HEARTBEAT_SECONDS
    assert processes[0].returncode != 0
    assert "resumed" in text, text
    assert "heartbeat" in text or "unhealthy" in text or "disconnected" in text, text

    # on one machine, with another number of processes
    run_to_end(arguments(one_block_sd_folder, toys, output, **OPTIONS), **devices(2))
    assert_close(output, alone)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(
    one_block_sd_folder: Path, toys: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    args = arguments(one_block_sd_folder, toys, output, **{**OPTIONS, "max_train_steps": 4000})
    processes = start_all(2, args)
    wait_for_checkpoint(output, 0, processes)
    folder = output / "checkpoints" / "process-0001"
    folder.rename(tmp_path / "away")
    folder.write_text("in the way")
    broken = time.monotonic()
    texts = [process.communicate(timeout=4 * HEARTBEAT_SECONDS)[0] for process in processes]
    assert time.monotonic() - broken < 4 * HEARTBEAT_SECONDS
    assert all(process.returncode != 0 for process in processes)
    assert "error: " in texts[1]
    assert "process-0001" in texts[1]


def test_half_an_address_is_refused() -> None:
    with pytest.raises(CatVersionError, match="belong together"):
        make_config({"concepts": "x", "num_processes": 2})
    with pytest.raises(CatVersionError, match=r"process_id=2: must lie within 0..num_processes"):
        make_config(
            {"concepts": "x", "coordinator_address": "a:1", "num_processes": 2, "process_id": 2}
        )
