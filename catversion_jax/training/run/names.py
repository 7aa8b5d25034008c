"""The names of what lies in a run folder, for those who write it and for those who read it.

``directory.py`` shows the folder as a whole.
"""

from __future__ import annotations

import re
from pathlib import Path

from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME

RUN_FILE = "run.json"
CONFIG_FILE = "config.resolved.yaml"
INDEX_FILE = "index.csv"
TIMELINE_FILE = "timeline.csv"
RUN_METRICS_FILE = "metrics.jsonl"
STOP_FILE = "STOP"
CHECKPOINTS_FOLDER = "checkpoints"
LOGS_FOLDER = "logs"
EVALUATION_FOLDER = "evaluation"
GATE_FILE = "gate.json"
CONCEPTS_FOLDER = "concepts"
SHARDS_FOLDER = "shards"

# in the folder of a concept
METRICS_FILE = "metrics.csv"
SUMMARY_FILE = "metrics.json"
FAILED_FILE = "FAILED.txt"
SAMPLES_FOLDER = "samples"

_STEM, _SUFFIX = CONCEPT_FILE_NAME.rsplit(".", 1)
STEP_FILES = f"{_STEM}-*.{_SUFFIX}"
"""Glob pattern of the concept files of intermediate steps."""
_STEP_FILE = re.compile(rf"^{_STEM}-(\d+)\.{_SUFFIX}$")


def of_process(file: str, number: int) -> str:
    """The name of one process's own ``file``: ``index.csv`` is ``index-0001.csv`` of process 1.

    Process 0 keeps the plain name.
    """
    stem, dot, suffix = file.rpartition(".")
    return f"{stem}-{number:04d}{dot}{suffix}" if number else file


def process_folder(number: int) -> str:
    """The folder of one process's checkpoints; also the stem of its lock file."""
    return f"process-{number:04d}"


def step_file_name(step: int) -> str:
    """The concept file of an intermediate step, such as ``catversion-000250.safetensors``."""
    return f"{_STEM}-{step:06d}.{_SUFFIX}"


def step_of_file(path: Path) -> int | None:
    """The inverse of :func:`step_file_name`; None for every other file."""
    match = _STEP_FILE.match(path.name)
    return int(match[1]) if match else None
