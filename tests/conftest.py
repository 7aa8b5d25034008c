"""Fixtures several test files share: a small random pipeline folder made of the real diffusers
classes.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

from catversion_jax.assets import embedded_folder

# Eight virtual devices, so that meshes are tested on any machine; must be said before jax starts
# its backend.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Several tests compile the same program: once is enough, for all processes of pytest -n.
if "CATVERSION_TEST_COMPILATION_CACHE" not in os.environ:
    folder = tempfile.mkdtemp(prefix="catversion-xla-")
    os.environ["CATVERSION_TEST_COMPILATION_CACHE"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["CATVERSION_TEST_COMPILATION_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline folder (do not write into it): text 4 layers x 32, context 24, latents [8 8
    4].
    """
    pytest.importorskip(
        "diffusers", reason="the tiny pipeline is built with diffusers: pip install '.[test]'"
    )
    from tiny_pipelines import save_tiny_sd

    return save_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The folder of tiny-sd, the small trained model that ships with the package."""
    folder = embedded_folder("tiny-sd")
    assert folder is not None
    return folder
