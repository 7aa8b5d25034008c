"""The files of configs/launch: valid for their tools, and what they start are options of ours."""

import argparse
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from catversion_jax.cli import serve
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
  *train_tpu.py*|*"catversion serve"*)
    code=$(head -1 "$STATE/codes"); sed -i 1d "$STATE/codes"
    echo "ended with $code"
    [ "$code" != preempted ] || { echo PREEMPTED > "$STATE/slice"; exit 255; }
    [ "$code" = 0 ] ;;
esac
"""


def test_every_file_says_what_it_costs_and_what_to_edit() -> None:
    files = sorted(path.name for path in LAUNCH.iterdir())
    assert files == [
        "gke_xpk.sh",
        "indexed_job.yaml",
        "jobset.yaml",
        "kueue_queue.yaml",
        "serve.Dockerfile",
        "serve_tpu.sh",
        "skypilot.yaml",
        "skypilot_pool.yaml",
        "skypilot_shards.yaml",
        "slurm.sbatch",
        "tpu_vm.sh",
    ]
    for path in LAUNCH.iterdir():
        for word in ("# Needs:", "# Machine:", "Cost:", "# Edit:", "Result:"):
            assert word in path.read_text(), path
    for path in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"):
        subprocess.run(["bash", "-n", path], check=True)


# What stands in place of the variables, which the users or their engine set.
VALUES = {
    "CONFIG": str(ROOT / "configs" / "sd15.yaml"),
    "BUCKET": "photos",
    "NAME": "mine",
    "IMAGE": "registry/catversion",
    "SHARDS": "64",
    "SLICE": "7",
    "CONCEPTS": "photos/products.csv",
    "OUT": "gs://photos/runs/mine",
    "SLURM_ARRAY_TASK_ID": "3",
}
SHARDS = {
    "indexed_job.yaml": "auto/64",
    "jobset.yaml": "7/64",
    "skypilot_shards.yaml": None,  # both numbers from the environment
    "slurm.sbatch": "3/64",
}


@pytest.mark.parametrize(
    "name", ["gke_xpk.sh", "skypilot.yaml", "tpu_vm.sh", *SHARDS], ids=lambda name: name
)
def test_what_is_started_is_valid(name: str) -> None:
    text = (LAUNCH / name).read_text().replace("${OPTIONS:-} &", "")
    command = re.search(r"(?:train_tpu\.py|exec catversion train) (.*(?:\n +shard=.*)?)", text)
    assert command is not None
    text = re.sub(r"\$(\w+)", lambda match: VALUES[match[1]], command[1].replace("\\\n", " "))
    flag, config, *overrides = shlex.split(text.rstrip('"'))
    assert flag == "--config"
    loaded = load_config(config, overrides)
    assert loaded.output_dir == "gs://photos/runs/mine"
    assert str(loaded.concepts).endswith("photos/products.csv")
    assert loaded.concepts_per_device == "auto"
    assert loaded.quarantine_exit_code == 0
    assert loaded.shard == SHARDS.get(name)


def kubernetes_objects(name: str) -> list[dict]:
    text = re.sub(r"\$(\w+)", lambda match: VALUES[match[1]], (LAUNCH / name).read_text())
    return list(yaml.safe_load_all(text))


def test_kubernetes_takes_its_files() -> None:
    """The jobs by the API server's own schemas, strictly; the slices' job is one too."""
    (job,) = kubernetes_objects("indexed_job.yaml")
    (jobset,) = kubernetes_objects("jobset.yaml")
    (shards,) = jobset["spec"]["replicatedJobs"]
    of_slice = {"apiVersion": "batch/v1", "kind": "Job", **shards["template"]}
    for one in (job, of_slice):
        spec = one["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        rules = spec["podFailurePolicy"]["rules"]
        by_code = {
            code: rule["action"]
            for rule in rules
            if "onExitCodes" in rule
            for code in rule["onExitCodes"]["values"]
        }
        again = "Ignore" if one is job else "FailJob"
        assert by_code == {2: "FailJob", 75: again, 143: again}
        assert {
            rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule
        } == {container["name"]}
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert shards["replicas"] == job["spec"]["completions"] == 64
    flavor, queue, local = kubernetes_objects("kueue_queue.yaml")
    (group,) = queue["spec"]["resourceGroups"]
    assert [one["name"] for one in group["flavors"]] == [flavor["metadata"]["name"]]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    for one in (job, jobset):
        assert one["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    validator = pytest.importorskip(
        "kubernetes_validate", reason="Kubernetes' schemas: pip install kubernetes-validate"
    )
    for one in (job, of_slice):
        validator.validate(one, "1.34", strict=True)


def run_tpu_vm(folder: Path, codes: list[str], name: str = "tpu_vm.sh") -> tuple[int, list[str]]:
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
        ["bash", LAUNCH / name], cwd=ROOT, env=environment, timeout=60, check=False
    )
    calls = re.findall(r"^compute tpus tpu-vm (\w+)", (folder / "calls").read_text(), re.MULTILINE)
    return done.returncode, [call for call in calls if call != "describe"]


def test_a_preempted_slice_is_made_again(tmp_path: Path) -> None:
    code, calls = run_tpu_vm(tmp_path, ["75", "preempted", "0"])
    made = ["create", "scp", "ssh"]
    assert code == 0
    assert calls == [*made, "ssh", "ssh", "delete", *made, "ssh", "delete"]
    assert "--worker=all" in (tmp_path / "calls").read_text()


def test_a_server_goes_on_on_the_next_host(tmp_path: Path) -> None:
    code, calls = run_tpu_vm(tmp_path, ["1", "preempted", "0"], "serve_tpu.sh")
    made = ["create", "scp", "ssh"]
    assert code == 0
    assert calls == [*made, "ssh", "ssh", "delete", *made, "ssh"]
    told = (tmp_path / "calls").read_text()
    assert told.count("-state,mode=read-write") == 2
    assert told.count("-L 8188:127.0.0.1:8188") == 3


def test_the_container_starts_what_there_is() -> None:
    text = (LAUNCH / "serve.Dockerfile").read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)", text, re.MULTILINE)[1])
    more = json.loads(re.search(r"^CMD (.*)", text, re.MULTILINE)[1])
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    given = parser.parse_args([*entry[2:], *more])
    assert (given.host, given.model, str(given.output_dir)) == ("0.0.0.0", "tiny-sd", "/data")
    lines = re.findall(r"^COPY (.*)", text, re.MULTILINE)
    copied = [path for line in lines for path in line.split()]
    assert all((ROOT / path).exists() for path in copied if not path.startswith("/src"))


# In place of the training, and of what Slurm is told; `wait` lets the test send a signal first.
TRAINING = """#!/usr/bin/env bash
[ "$1" = train_tpu.py ] || exit 99
trap 'exit 75' TERM
echo "$*" > "$STATE/started"
[ "$CODE" != wait ] || while true; do sleep 0.05; done
exit "$CODE"
"""


@pytest.mark.parametrize(
    ("code", "restarts", "ended", "again"),
    [
        ("0", "0", 0, False),
        ("75", "99", 75, True),
        ("143", "99", 143, True),
        ("2", "0", 2, False),
        ("1", "9", 1, True),
        ("1", "10", 1, False),
        ("wait", "0", 75, True),
        ("early", "0", 143, True),  # told before the process has begun, or may listen
    ],
)
def test_slurm_queues_a_task_again(
    code: str, restarts: str, ended: int, again: bool, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    told_early = "kill -TERM $$; CODE=wait\n" if code == "early" else ""
    (tmp_path / "bin" / "activate").write_text(told_early)
    for name, text in (
        ("python", TRAINING),
        ("scontrol", '#!/bin/sh\necho "$*" > "$STATE/told"\n'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STATE": str(tmp_path),
            "VENV": str(tmp_path),
            "CODE": code,
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_ARRAY_TASK_COUNT": "8",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": restarts,
        },
    )
    if code == "wait":
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        process.terminate()
    assert process.wait(60) in ({75, 143} if code == "early" else {ended})
    if code != "early":
        assert "shard=3/8" in (tmp_path / "started").read_text()
    told = tmp_path / "told"
    assert (told.read_text() if told.exists() else "") == ("requeue 7_3\n" if again else "")


def test_wrong_options_do_not_run_for_ever(tmp_path: Path) -> None:
    code, calls = run_tpu_vm(tmp_path, ["2", "0"])
    assert (code, calls[-1]) == (2, "ssh")


@pytest.mark.parametrize("name", ["skypilot.yaml", "skypilot_pool.yaml", "skypilot_shards.yaml"])
def test_skypilot_reads_its_files(name: str) -> None:
    config = yaml.safe_load((LAUNCH / name).read_text())
    assert config["resources"]["use_spot"]
    if "run" in config:
        assert config["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 143]
    else:
        jobs = yaml.safe_load((LAUNCH / "skypilot_shards.yaml").read_text())
        assert jobs["resources"]["accelerators"] == config["resources"]["accelerators"]
    sky = pytest.importorskip("sky", reason="SkyPilot's own validation: pip install skypilot[gcp]")
    task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "photos")])
    assert [resource.use_spot for resource in task.resources] == [True]
