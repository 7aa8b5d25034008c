"""The files of configs/launch: valid for their tools, and what they start are options of ours."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from catversion_jax.config import load_config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "configs" / "launch"
# Writes down what it is asked, and knows whether a slice was made.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$STATE/calls"
case "$*" in
  *tpu-vm\\ describe*) cat "$STATE/slice" 2>/dev/null ;;
  *tpu-vm\\ create*) echo READY > "$STATE/slice" ;;
  *tpu-vm\\ delete*) rm "$STATE/slice" ;;
  *train_tpu.py*)
    code=$(head -1 "$STATE/codes"); sed -i 1d "$STATE/codes"
    echo "ended with $code"
    [ "$code" != preempted ] || { echo PREEMPTED > "$STATE/slice"; exit 255; }
    [ "$code" = 0 ] || [ "$code" = 3 ] ;;
esac
"""


def test_every_file_says_what_it_costs_and_what_to_edit() -> None:
    files = sorted(path.name for path in LAUNCH.iterdir())
    assert files == ["gke_xpk.sh", "skypilot.yaml", "tpu_vm.sh"]
    for path in LAUNCH.iterdir():
        for word in ("# Needs:", "# Machine:", "Cost:", "# Edit:", "Result:"):
            assert word in path.read_text(), path
    for path in LAUNCH.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("name", ["gke_xpk.sh", "skypilot.yaml", "tpu_vm.sh"])
def test_what_is_started_is_valid(name: str) -> None:
    command = re.search(r"train_tpu\.py (.*)", (LAUNCH / name).read_text())
    assert command is not None
    values = {"CONFIG": str(ROOT / "configs" / "sd15.yaml"), "BUCKET": "photos", "NAME": "mine"}
    text = re.sub(r"\$(\w+)", lambda match: values[match[1]], command[1].split("||")[0])
    flag, config, *overrides = shlex.split(text.rstrip('"'))
    assert flag == "--config"
    loaded = load_config(config, overrides)
    assert loaded.output_dir == "gs://photos/runs/mine"
    assert loaded.concepts_per_device == "auto"


def run_tpu_vm(folder: Path, codes: list[str]) -> tuple[int, list[str]]:
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    (folder / "codes").write_text("\n".join(codes) + "\n")
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STATE": str(folder),
        "BUCKET": "photos",
        "WAIT": "0",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_vm.sh"], cwd=ROOT, env=environment, timeout=60, check=False
    )
    calls = re.findall(r"^compute tpus tpu-vm (\w+)", (folder / "calls").read_text(), re.MULTILINE)
    return done.returncode, [call for call in calls if call != "describe"]


def test_a_preempted_slice_is_made_again(tmp_path: Path) -> None:
    code, calls = run_tpu_vm(tmp_path, ["75", "preempted", "3"])
    made = ["create", "scp", "ssh"]
    assert code == 0
    assert calls == [*made, "ssh", "ssh", "delete", *made, "ssh", "delete"]
    assert "--worker=all" in (tmp_path / "calls").read_text()


def test_wrong_options_do_not_run_for_ever(tmp_path: Path) -> None:
    code, calls = run_tpu_vm(tmp_path, ["2", "0"])
    assert (code, calls[-1]) == (2, "ssh")


def test_skypilot_reads_its_file() -> None:
    config = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert config["resources"]["use_spot"]
    sky = pytest.importorskip("sky", reason="SkyPilot's own validation: pip install skypilot[gcp]")
    task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "photos")])
    assert [resource.use_spot for resource in task.resources] == [True]
