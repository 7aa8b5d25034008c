"""``catversion plan``: the real step compiled for TPUs that are not here, and the arithmetic."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import pytest

from catversion_jax.cli import main
from catversion_jax.concepts import read_concepts
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import abstract_backbone, load_backbone
from catversion_jax.runtime.sharding import make_mesh
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.planning.chips import TPUS, Slice, parse_slice
from catversion_jax.training.planning.compiled import (
    CompiledStep,
    compile_step,
    count_collectives,
    counted_flops,
    tpu_mesh,
)
from catversion_jax.training.planning.estimate import USABLE_MEMORY, MemoryModel, job, step_seconds
from catversion_jax.training.planning.fitting import find_fit, whole_tiles
from catversion_jax.training.start import planned_step, resolve_auto

CONFIG = make_config({"concepts": "x", "steps_per_dispatch": 10, "resolution": 64})


# .ci/installed compiles such a step on the newest jax.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:4x4", "v5p:2x2x4", "v6e:1x1", "tpu7x:2x2x1"])
def test_the_embedded_model_compiles_without_a_collective(name: str) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
    backbone = abstract_backbone("tiny-sd", dtype="bfloat16")
    planned = planned_step(CONFIG, backbone)
    target = parse_slice(name)
    mesh = tpu_mesh(target)
    assert mesh.devices.size == target.num_devices
    found = compile_step(planned, mesh, 2, max_images=5)
    assert found.collectives == {}
    assert 0 < found.total_bytes < target.chip.device_memory_bytes
    # of one chip, and nothing else for several
    assert found.flops == pytest.approx(2 * counted_flops(planned, max_images=5))


def test_the_abstract_step_has_the_shapes_of_the_real_one() -> None:
    """Nothing is planned for but what training makes."""
    real, shapes = load_backbone("tiny-sd"), abstract_backbone("tiny-sd")
    for part in ("text_encoder", "unet", "vae"):
        pairs = zip(
            jax.tree.leaves(getattr(real, part)),
            jax.tree.leaves(getattr(shapes, part)),
            strict=True,
        )
        assert all(one.shape == other.shape and one.dtype == other.dtype for one, other in pairs)
    mesh = make_mesh(1, jax.devices()[:1])
    state, data, *_ = abstract_arguments(
        planned_step(CONFIG, shapes), mesh, num_rows=3, max_images=5
    )
    assert state.learned.key.shape == (3, 3, 1, real.num_heads, real.head_dim)
    assert data.latent_mean.shape == (3, 5, 2, 16, 16, 4)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves((state, data)))


def test_collectives_are_found_in_a_program() -> None:
    hlo = """
  %all-reduce.1 = f32[8]{0} all-reduce(f32[8]{0} %x), replica_groups={}
  %ag = (f32[8]{0}, f32[64]{0}) all-gather-start(f32[8]{0} %y), dimensions={0}
  %fusion = f32[8]{0} fusion(f32[8]{0} %all-reduce.1), kind=kLoop
"""
    assert count_collectives(hlo) == {"all-reduce": 1, "all-gather": 1}


def test_memory_is_a_line_through_two_compilations() -> None:
    def compiled(rows: int, temporary: float) -> CompiledStep:
        return CompiledStep(rows, 2e9, 1e6 * rows, temporary, 1e12 * rows, 1e9, {}, 1.0)

    memory = MemoryModel.of(compiled(1, 1.5e9), compiled(5, 3.5e9))
    assert memory.temporary_per_row == pytest.approx(0.5e9)
    assert memory.temporary_once == pytest.approx(1e9)
    most = memory.largest(16e9)
    assert memory.bytes_of(most) <= 16e9 < memory.bytes_of(most + 1)
    assert MemoryModel(20e9, 1e6, 0, 1e9).largest(16e9) == 0


@pytest.mark.slow
def test_auto_finds_how_many_rows_fit(tiny_sd_folder: Path) -> None:
    backbone, mesh = load_backbone(tiny_sd_folder), make_mesh(1, jax.devices()[:1])
    config = dataclasses.replace(CONFIG, resolution=16, steps_per_dispatch=1)
    planned = planned_step(config, backbone)
    six = compile_step(planned, mesh, 6, max_images=4)
    memory = six.total_bytes / USABLE_MEMORY
    found = find_fit(planned, mesh, memory, enough=1, most=9, max_images=4)
    assert found.largest in (5, 6)  # not quite a line, but never more than fit


def test_packs_fill_the_tiles_of_a_tpu() -> None:
    """Eight images: four concepts of two, eight of one, any number of sixteen."""
    for batch, data_parallel, used in (
        (2, 1, {3: 3, 4: 4, 11: 8, 13: 12}),
        (1, 1, {7: 7, 9: 8, 17: 16}),
        (4, 2, {5: 4}),
        (16, 1, {5: 5}),
        (3, 1, {9: 8}),
    ):
        images = batch // data_parallel
        assert {most: whole_tiles(most, images) for most in used} == used


def test_a_number_stays_and_a_device_without_a_limit_gets_four(tiny_sd_folder: Path) -> None:
    backbone, mesh = load_backbone(tiny_sd_folder), make_mesh(1, jax.devices()[:2])
    for wanted, rows in ((3, 3), ("auto", 4)):
        asked = dataclasses.replace(CONFIG, concepts_per_device=wanted)
        config = resolve_auto(asked, backbone, mesh, [])
        assert (config.concepts_per_device, config.gradient_checkpointing) == (rows, "none")
    with pytest.raises(CatVersionError, match="concepts_per_device='most': must be int or auto"):
        dataclasses.replace(CONFIG, concepts_per_device="most")


@pytest.mark.slow
def test_computing_again_saves_memory_and_costs_flops() -> None:
    """On a TPU; on CPUs the compiler undoes it."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
    backbone, mesh = (
        abstract_backbone("tiny-sd", dtype="bfloat16"),
        tpu_mesh(parse_slice("v5e:1x1")),
    )
    steps = [
        compile_step(
            planned_step(dataclasses.replace(CONFIG, gradient_checkpointing=recompute), backbone),
            mesh,
            4,
            max_images=5,
        )
        for recompute in ("none", "attention", "blocks")
    ]
    assert steps[0].temporary_bytes > steps[1].temporary_bytes > steps[2].temporary_bytes
    assert steps[0].flops < steps[1].flops < steps[2].flops


def fitting_case(tiny_sd_folder: Path):
    options = dataclasses.replace(
        CONFIG, concepts_per_device=2, resolution=16, steps_per_dispatch=1
    )
    specs = read_concepts("tiny-sd-examples").concepts[:2]
    backbone, mesh = load_backbone(tiny_sd_folder), make_mesh(1, jax.devices()[:1])
    return options, functools.partial(resolve_auto, backbone=backbone, mesh=mesh, specs=specs)


@pytest.mark.slow
def test_as_little_is_computed_again_as_the_memory_allows(tiny_sd_folder: Path) -> None:
    options, fit = fitting_case(tiny_sd_folder)
    enough = fit(options, memory_bytes=1e9)
    assert (enough.gradient_checkpointing, enough.concepts_per_device) == ("none", 2)
    given = dataclasses.replace(options, gradient_checkpointing="blocks")
    assert fit(given, memory_bytes=1e3) == given


@pytest.mark.slow
def test_what_does_not_fit_is_said(tiny_sd_folder: Path) -> None:
    options, fit = fitting_case(tiny_sd_folder)
    with pytest.raises(CatVersionError, match=r"concepts_per_device=2: needs .* GB, a device has"):
        fit(options, memory_bytes=1e3)
    auto = dataclasses.replace(options, concepts_per_device="auto")
    with pytest.raises(CatVersionError, match="not one concept fits"):
        fit(auto, memory_bytes=1e3)


def test_hours_and_cost() -> None:
    chip = TPUS["v5e"]
    assert step_seconds(197e12, 0, chip, utilization=0.5) == pytest.approx(2)
    assert step_seconds(0, 819e9, chip) == pytest.approx(1)
    # Two TensorCores of a TPU7x together are what is published of the chip.
    assert step_seconds(2307e12 / 2, 0, TPUS["tpu7x"], utilization=1) == pytest.approx(1)
    assert TPUS["tpu7x"].device_memory_bytes == 96e9
    found = job(
        1000, 100, chips=16, concepts_at_once=128, seconds_per_step=0.9, price_per_chip_hour=2.0
    )
    assert found.hours == pytest.approx(math.ceil(1000 / 128) * 100 * 0.9 / 3600)
    assert found.cost == pytest.approx(found.hours * 32)


@pytest.mark.parametrize("name", [f"{chip.name}:{chip.slices[0]}" for chip in TPUS.values()])
def test_the_compiler_knows_every_chip_by_as_many_devices(name: str) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
    target = parse_slice(name)
    assert tpu_mesh(target).devices.size == target.num_devices


@pytest.mark.slow
def test_several_devices_on_one_concept_hold_fewer_concepts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = ["--gpu", "h100", "pretrained_model_name_or_path=tiny-sd", "--json"]
    found = []
    for data_parallel in (1, 2):
        assert main(["plan", *model, f"data_parallel={data_parallel}"]) == 0
        jobs = json.loads(capsys.readouterr().out)["jobs"]
        found.append({one["slice"]: one["concepts_at_once"] for one in jobs})
    assert found[1] == {name: found[0][name] // 2 for name in ("2", "4", "8")}


def test_slices_are_read_and_compared() -> None:
    assert parse_slice("v5e:4x4").num_chips == 16
    assert parse_slice("v5p").topology == "2x2x1"
    assert [one.num_chips for one in Slice(TPUS["v5e"], "4x4").others()] == [1, 4, 8, 16, 32, 64]
    for text in ("v7x:2x2", "v5e:4", "v5p:2x2", "v5e:axb"):
        with pytest.raises(CatVersionError, match="--tpu"):
            parse_slice(text)


def test_a_gpu_is_estimated_and_the_estimate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--gpu", "h100", "pretrained_model_name_or_path=tiny-sd", "--json"]
    assert main([*arguments, "--price-per-chip-hour", "3", "--concepts", "100"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "Not compared with a real GPU" in plan["estimate"]
    one, two = plan["jobs"][:2]
    assert one["cost"] == pytest.approx(3 * one["hours"])
    assert two["hours"] <= one["hours"]
    assert main(["plan", "--gpu", "h900", "pretrained_model_name_or_path=tiny-sd"]) == 2
    assert "must be one of a100, h100" in capsys.readouterr().err


def test_a_plan_needs_no_weights(tiny_sd_folder: Path, tmp_path: Path) -> None:
    for path in tiny_sd_folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            target = tmp_path / path.relative_to(tiny_sd_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    backbone = abstract_backbone(tmp_path)
    assert counted_flops(planned_step(CONFIG, backbone), max_images=3) > 1e6
