"""JAX does not start libtpu where there is no TPU, and does where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from catversion_jax.runtime.libtpu import has_tpu_chips

PROGRAM = """
from catversion_jax.runtime.libtpu import leave_out_libtpu
leave_out_libtpu()
import os, jax
print(os.environ.get("JAX_PLATFORMS"), jax.default_backend())
"""


@pytest.mark.parametrize("name", ["accel0", "vfio/0"])
def test_a_tpu_is_known_by_its_device_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # there on any machine that passes devices on
    assert not has_tpu_chips(tmp_path)
    (tmp_path / name).touch()
    assert has_tpu_chips(tmp_path)


@pytest.mark.skipif(has_tpu_chips(), reason="this machine has a TPU")
@pytest.mark.parametrize("said", [None, ""])
def test_libtpu_is_left_out_unless_the_user_says_what_jax_shall_try(said: str | None) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
    variables = {name: text for name, text in os.environ.items() if name != "JAX_PLATFORMS"}
    variables |= {} if said is None else {"JAX_PLATFORMS": said}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [*(["cpu"] if said is None else []), "cpu"]
    if said is None:
        assert "libtpu" not in done.stderr
