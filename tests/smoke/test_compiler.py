"""The TPU compiler that this jax brings: what it compiles, and how its refusals are told."""

import json
from pathlib import Path

import jax
import pytest
from commands import printed, start

from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import abstract_backbone
from catversion_jax.runtime.sharding import make_mesh
from catversion_jax.training.planning import compiled
from catversion_jax.training.planning.chips import parse_slice
from catversion_jax.training.start import planned_step

pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
CONFIG = make_config({"concepts": "x", "steps_per_dispatch": 10, "resolution": 64})


@pytest.mark.smoke
def test_a_tpu_that_is_not_here_is_planned_for(tmp_path: Path) -> None:
    options = ["concepts_per_device=2", "steps_per_dispatch=1"]
    arguments = ["plan", "--config", "quickstart", *options, "--tpu", "v5e:1x1", "--json"]
    plan = json.loads(printed(start(tmp_path, *arguments)))
    assert plan["compiles"] is True
    assert plan["largest_concepts_per_device"] >= 2


@pytest.mark.slow
def test_too_many_rows_are_said_not_to_fit() -> None:
    backbone = abstract_backbone("tiny-sd", dtype="bfloat16")
    mesh = compiled.tpu_mesh(parse_slice("v5e:1x1"))
    with pytest.raises(compiled.DoesNotFitError, match=r"500000 rows on a device: do not fit"):
        compiled.compile_step(planned_step(CONFIG, backbone), mesh, 500_000, max_images=5)


def test_an_option_that_the_compiler_refuses_is_not_taken_for_too_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "FAST_COMPILATION", {"hurry": True})
    backbone, mesh = abstract_backbone("tiny-sd"), make_mesh(1, jax.local_devices()[:1])
    with pytest.raises(CatVersionError, match="No such compile option: 'hurry'") as caught:
        compiled.compile_step(planned_step(CONFIG, backbone), mesh, 1, max_images=5)
    assert not isinstance(caught.value, compiled.DoesNotFitError)
    assert "concepts_per_device" not in str(caught.value)
