"""The plan of Stable Diffusion 1.5 for a TPU slice, from its published configuration alone."""

import json
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("torch", reason="the folder is made with torch: pip install '.[test]'")
pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
from full_size_models import write_sd15_configs  # noqa: E402

from catversion_jax.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def test_the_plan_of_sd15_takes_less_than_ten_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sd15_configs(tmp_path / "sd15")
    arguments = ["plan", "--config", str(ROOT / "configs" / "sd15.yaml"), "--tpu", "v5e:4x4"]
    arguments += [f"pretrained_model_name_or_path={tmp_path / 'sd15'}", "--concepts", "10000"]
    started = time.monotonic()
    assert main([*arguments, "--price-per-chip-hour", "1.2", "--json"]) == 0
    assert time.monotonic() - started < 600
    plan = json.loads(capsys.readouterr().out)
    assert plan["collectives"] == {}
    assert plan["largest_concepts_per_device"] >= 1
    # the UNet alone: 1,670 GFLOP per sample at least, two samples a step
    assert plan["flops_per_concept_step"] > 2 * 1.67e12
