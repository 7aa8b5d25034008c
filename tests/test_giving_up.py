"""Whatever reading one concept raises, that concept is given up and the others go on."""

import dataclasses
from pathlib import Path

import jax
import pytest

from catversion_jax.concepts import ConceptSpec, ImageSource, read_concepts
from catversion_jax.config import TrainConfig
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.training.preparation import concept_failure, describe_concepts


def test_one_of_four_concepts_can_be_described(one_block_sd_folder: Path, toys: Path) -> None:
    good = read_concepts(toys).concepts[0]
    bad = {
        "surrogate": dataclasses.replace(good, prompts=("a \udcff ball",)),
        "number": dataclasses.replace(good, prompts=(7,)),  # type: ignore[arg-type]
        "folder": dataclasses.replace(good, images=(ImageSource("x", toys),)),
        "nothing": ConceptSpec("nothing", None, ()),  # type: ignore[arg-type]
    }
    specs = [good, *(dataclasses.replace(spec, name=name) for name, spec in bad.items())]
    config = TrainConfig(concepts=str(toys))
    records, failures = describe_concepts(
        specs,
        load_backbone(one_block_sd_folder),
        config.data_options,
        config.method_options,
        seed=0,
        recorded={},
        networks={},
        masked=False,
    )
    assert good.name in records
    assert {"surrogate", "number", "folder"} <= set(failures)
    assert set(records) | set(failures) == {spec.name for spec in specs}
    assert all(len(reason.splitlines()) == 1 for reason in failures.values())
    assert all(reason.encode() for reason in failures.values())


def test_lack_of_memory_is_the_concepts_and_the_device_is_everybodys() -> None:
    assert "out of memory" in concept_failure("rex", MemoryError("Unable to allocate 9 GiB"))
    assert concept_failure("rex", ConceptError("rex: no image")) == "rex: no image"
    assert "rex" in concept_failure("rex", RecursionError())
    for error in (
        CatVersionError("resolution=9"),
        jax.errors.JaxRuntimeError("device"),
    ):
        with pytest.raises(type(error)):
            concept_failure("rex", error)
