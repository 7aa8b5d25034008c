"""What was learned, of ours and of others, and the books of a run."""

import functools
import shutil
from pathlib import Path

import mutations
import numpy as np
from inputs import MODEL, REFUSED, SUCCEEDED, Input, command, library
from running import ROOT, arguments, final_files

from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.training.run.packing import write_pack as write_concepts_of
from catversion_jax.training.run.reader import read_trained


def residual(seed: int = 0) -> KVResidual:
    key, value = np.random.default_rng(seed).normal(size=(2, 3, 1, 4, 8)).astype(np.float32)
    return KVResidual(key, value, (1, 2, 3))


def write_residual(folder: Path) -> None:
    save_concept(folder / "pot.safetensors", residual(), base_class="pot", name="pot", step=5)


def write_embeddings(folder: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    save_concept(
        folder / "pot.safetensors", TokenEmbeddings(vectors), base_class="pot", name="pot", step=5
    )


def read_concept(folder: Path) -> str:
    outcome = command("inspect", folder / "pot.safetensors")
    if outcome == SUCCEEDED:
        concept = load_concept(folder / "pot.safetensors")
        assert concept.base_class.strip()
        for numbers in vars(concept.learned).values():
            if isinstance(numbers, np.ndarray):
                assert np.isfinite(numbers).all()
    return outcome


def write_pack(folder: Path) -> None:
    for name in ("cat", "pot"):
        file = folder / "packed" / "concepts" / name / "catversion.safetensors"
        save_concept(file, residual(), base_class="pot", name=name, step=5)
    write_concepts_of(folder / "packed", folder / "concepts.arrow")


def write_adapter(folder: Path) -> None:
    shutil.copytree(ROOT / "tests/data/official_adapters/teddybear", folder / "adapter")


def read_adapter(folder: Path) -> str:
    target = ("--output_dir", folder / "out", "--name", "bear")
    outcome = command("import", folder / "adapter", "--base_class", "bear", *target)
    if outcome == SUCCEEDED:
        load_concept(folder / "out" / "bear")
    return outcome


LEARNED = [
    Input(
        "residual.safetensors",
        "pot.safetensors",
        write_residual,
        mutations.safetensors,
        read_concept,
    ),
    Input(
        "embedding.safetensors",
        "pot.safetensors",
        write_embeddings,
        mutations.safetensors,
        read_concept,
    ),
    Input(
        "pack.arrow",
        "concepts.arrow",
        write_pack,
        mutations.damaged,
        lambda folder: command("inspect", f"{folder}/concepts.arrow#pot"),
    ),
    Input(
        "adapter.bin",
        "adapter/pytorch_adapter.bin",
        write_adapter,
        mutations.damaged,
        read_adapter,
    ),
    Input(
        "adapter_config.json",
        "adapter/adapter_config.json",
        write_adapter,
        mutations.json_text,
        read_adapter,
    ),
]

# ---- a run ---------------------------------------------------------------------------------------

RUN = "finished"  # a fixture of tests/conftest.py


def read_run(folder: Path) -> str:
    """What looks at a run: status, inspect, and what draws with its concepts."""
    outcomes = {command("status", folder / RUN), command("inspect", folder / RUN)}
    outcomes.add(command("status", folder / RUN, "--json"))
    outcomes.add(library(lambda found: read_trained(found / RUN))(folder))
    return REFUSED if REFUSED in outcomes else SUCCEEDED


BOOKKEEPING = (
    ("index.csv", mutations.table),
    ("timeline.csv", mutations.table),
    ("metrics.jsonl", mutations.lines_of_json),
    ("run.json", mutations.json_text),
    ("config.resolved.yaml", mutations.yaml_text),
    ("concepts/teal_cup/metrics.csv", mutations.table),
    ("concepts/teal_cup/metrics.json", mutations.json_text),
)


def train_again(folder: Path, *, may_refuse: bool = False) -> str:
    """The command of a finished run once more: whatever its books say, nothing learned is lost."""
    run = folder / RUN
    before = final_files(run)
    args = arguments((folder / MODEL).resolve(), (folder / "toys").resolve(), run)
    outcome = command("train", *args)
    assert outcome == SUCCEEDED or may_refuse, "a damaged bookkeeping file has stopped a run"
    assert final_files(run) == before
    return outcome


RUNS = [
    *(
        Input(f"run/{file}", f"{RUN}/{file}", (RUN,), mutate, read_run)
        for file, mutate in BOOKKEEPING
    ),
    *(
        Input(
            f"again/{file}",
            f"{RUN}/{file}",
            (RUN, MODEL, "toys"),
            mutate,
            # where run.json is whole and says other options, the run was made with others
            functools.partial(train_again, may_refuse=file == "run.json"),
            RUN,
        )
        for file, mutate in BOOKKEEPING
        if file in ("index.csv", "run.json", "concepts/teal_cup/metrics.json")
    ),
]
