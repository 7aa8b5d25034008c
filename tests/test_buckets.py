"""A run in a bucket of Google Cloud Storage, against a server that speaks its protocol."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import arguments, final_files, run_to_end, start

from catversion_jax import load_concept
from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import concept_folders, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.runtime.atomic_files import emptied_if_stopped, write_atomically
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.training.run.index import Index, index_row, read_index

# The server does not speak the protocol of gcsfs' newer kinds of buckets.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
pytest.importorskip("gcsfs", reason="reads buckets: pip install '.[test]'")
server_module = pytest.importorskip(
    "gcp_storage_emulator.server", reason="the storage server: pip install '.[test]'"
)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    before = {name: os.environ.get(name) for name in ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK")}
    os.environ.update(STORAGE_EMULATOR_HOST=f"http://localhost:{port}", NO_GCE_CHECK="true")
    server = server_module.create_server("localhost", port, in_memory=True, default_bucket="runs")
    server.start()
    yield "gs://runs"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.slow
def test_a_run_in_a_bucket_survives_kills_and_gives_the_same_bytes(
    one_block_sd_folder: Path,
    toys: Path,
    finished: Path,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the same run in a local folder."""
    remote = f"{bucket}/a/run"
    args = [*arguments(one_block_sd_folder, toys, finished, report_to="tensorboard")]
    args.append(f"output_dir={remote}")
    process = start(args)
    saved = as_path(f"{remote}/checkpoints/process-0000")
    while process.poll() is None and not list(saved.glob("[0-9]*/commit_success.txt")):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert main(["status", remote]) == 0
    assert "running" in capsys.readouterr().out
    assert "resumed 2 concepts" in run_to_end(args)
    folders = concept_folders(remote)
    assert {folder.name: _final(folder) for folder in folders} == final_files(finished)
    rows = list(csv.DictReader(as_path(f"{remote}/index.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["done"] * 3
    assert main(["status", remote, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 3}
    for row in rows:  # appended lines have all arrived
        name = f"concepts/{row['name']}/metrics.csv"
        assert as_path(f"{remote}/{name}").read_text() == (finished / name).read_text()
    assert list(as_path(f"{remote}/logs/teal_cup").glob("events*"))
    assert load_concept(f"{remote}/concepts/teal_cup").step == 12
    assert main(["inspect", f"{remote}/concepts/teal_cup"]) == 0


def test_states_arrive_when_a_run_saves(bucket: str) -> None:
    """A bucket gets the changes of ``index.csv`` with each checkpoint, not only twice a minute."""
    path = as_path(f"{bucket}/states/index.csv")
    index = Index(path)
    index.set(index_row("teal_cup", "queued"))
    index.write()
    index.change(index_row("teal_cup", "running"))
    index.flush()
    assert [row["state"] for row in read_index(path)] == ["running"]


def _final(folder: Path) -> bytes:
    return (folder / "catversion.safetensors").read_bytes()


def test_other_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatVersionError, match=r"s3://a/b: must be a folder or begin with gs://"):
        as_path("s3://a/b")
    program = "from catversion_jax.runtime.bucket_paths import as_path; as_path('gs://a/b')"
    empty = tmp_path / "gcsfs"  # hides the installed one
    empty.mkdir()
    (empty / "__init__.py").write_text("raise ImportError('not installed')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert "pip install 'catversion-jax[gcs]'" in done.stderr


@pytest.fixture
def concept_in_bucket(bucket: str) -> str:
    """A concept for the tiny model, and the folder that holds it."""
    key, value = np.random.default_rng(0).normal(size=(2, 2, 1, 4, 8)).astype(np.float32)
    folder = f"{bucket}/made/concepts/my_dog"
    save_concept(
        f"{folder}/catversion.safetensors",
        KVResidual(key, value, (2, 3)),
        base_class="dog",
        name="my_dog",
    )
    return folder


def test_commands_write_into_a_bucket_and_not_into_a_folder_named_gs(
    tiny_sd_folder: Path,
    bucket: str,
    concept_in_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_sd_folder)]
    out = f"{bucket}/out"

    assert main(["export", concept_in_bucket, "--output_dir", f"{out}/files"]) == 0
    assert load_concept(f"{out}/files/my_dog.safetensors").name == "my_dog"

    words = ["--format", "prompt_embeds", "--prompt", "a dog"]
    assert main(["export", concept_in_bucket, *words, *model, "--output_dir", f"{out}/baked"]) == 0
    assert as_path(f"{out}/baked/prompt_embeds.safetensors").is_file()

    drawn = ["generate", *model, "--concept", concept_in_bucket, "--prompt", "a dog"]
    for _ in range(2):  # the second call goes on counting
        code = main([*drawn, "--num_inference_steps", "1", "--output_dir", f"{out}/images"])
        assert code == 0
    names = sorted(path.name for path in as_path(f"{out}/images").iterdir())
    assert names == [
        "00000-a-dog-seed0.png",
        "00001-a-dog-seed0.png",
        "grid-00000.png",
        "grid-00001.png",
    ]

    adapter = Path(__file__).with_name("data") / "official_adapters"
    source = next(adapter.rglob("pytorch_adapter.bin")).parent
    imported = ["import", str(source), "--base_class", "teapot", "--name", "theirs"]
    assert main([*imported, "--output_dir", f"{out}/import"]) == 0
    assert load_concept(f"{out}/import/theirs").base_class == "teapot"

    assert main(["export", concept_in_bucket, "--format", "pipeline", *model,
                 "--output_dir", f"{out}/pipeline"]) == 2  # fmt: skip
    assert "must lie on this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_filling_stops_is_left_empty(bucket: str) -> None:
    folder = as_path(f"{bucket}/stopped")

    def fill() -> None:
        with emptied_if_stopped(folder):
            write_atomically(folder / "block.py", b"")
            write_atomically(folder / "catversion" / "tom.safetensors", b"")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert not folder.exists()
