"""Fixtures several test files share: a small random pipeline folder made of the real diffusers
classes.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from filelock import FileLock
from random_model import write_toy_concepts

from catversion_jax.assets import embedded_folder

# Eight virtual devices, so that meshes are tested on any machine; must be said before jax starts
# its backend.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# The tests compile for most of their time and compute for little: LLVM need optimize only lightly
# what it writes, and not unroll small shapes' loops in full. XLA's own passes stay as they are.
COMPILE_QUICKLY = (
    "--xla_backend_optimization_level=1 --xla_backend_extra_options=-unroll-threshold=30"
)
if COMPILE_QUICKLY not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_QUICKLY}".strip()
# Several tests compile the same program: once is enough, for all processes of pytest -n.
if "CATVERSION_TEST_COMPILATION_CACHE" not in os.environ:
    folder = tempfile.mkdtemp(prefix="catversion-xla-")
    os.environ["CATVERSION_TEST_COMPILATION_CACHE"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["CATVERSION_TEST_COMPILATION_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


from running import arguments, run_to_end  # noqa: E402  # reads where the cache is

# The files that take longest come first, so that no process of pytest -n works on alone at the end.
LONGEST = (
    "test_processes.py",
    "test_train_cli.py",
    "test_interruptions.py",
    "test_unet.py",
    "test_training_step.py",
    "test_evaluate_cli.py",
    "test_export.py",
)


def _seconds(text: str) -> float:
    """``45``, ``45s``, ``30m`` or ``2h``."""
    units = {"s": 1, "m": 60, "h": 3600}
    return float(text.rstrip("smh")) * units[text[-1] if text[-1] in units else "s"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--robustness-budget",
        type=_seconds,
        default=10.0,
        help="how long tests/robustness mutates inputs, such as 30m [10s]",
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """What came of the mutated inputs, also when other processes read them."""
    totals: dict[str, int] = {}
    for report in (r for found in terminalreporter.stats.values() for r in found):
        if getattr(report, "when", None) == "call":
            outcomes = dict(report.user_properties).get("robustness", {})
            for outcome, count in outcomes.items():
                totals[outcome] = totals.get(outcome, 0) + count
            if outcomes and config.get_verbosity() > 0:
                terminalreporter.write_line(f"{report.nodeid}: {outcomes}")
    if totals:
        terminalreporter.write_line(f"mutated inputs: {sum(totals.values())}, {totals}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))  # a stable sort


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder by name, once for all processes of ``pytest -n``; do not write into it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.made").exists():
                make(root / name)
                (root / f"{name}.made").touch()
        return root / name

    return folder


def _need_diffusers() -> None:
    pytest.importorskip(
        "diffusers", reason="the tiny pipeline is built with diffusers: pip install '.[test]'"
    )


@pytest.fixture(scope="session")
def tiny_sd_folder(made_once: Callable[..., Path]) -> Path:
    """A random pipeline folder: text 4 layers x 32, context 24, latents [8 8 4]."""
    _need_diffusers()
    from tiny_pipelines import save_tiny_sd

    return made_once("tiny-sd", save_tiny_sd)


@pytest.fixture(scope="session")
def one_block_sd_folder(made_once: Callable[..., Path]) -> Path:
    """As ``tiny_sd_folder`` with a UNet of one block, for tests that train through commands."""
    _need_diffusers()
    from tiny_pipelines import save_tiny_sd

    return made_once("one-block-sd", functools.partial(save_tiny_sd, blocks=1))


@pytest.fixture(scope="session")
def tiny_xl_folder(made_once: Callable[..., Path]) -> Path:
    """A random Stable Diffusion XL: texts 4 x 32 and 5 x 48, context 24, latents [16 16 4]."""
    _need_diffusers()
    from tiny_xl import save_tiny_xl

    return made_once("tiny-xl", save_tiny_xl)


@pytest.fixture(scope="session")
def one_block_xl_folder(made_once: Callable[..., Path]) -> Path:
    """As ``tiny_xl_folder`` with a UNet of one block, for tests that train."""
    _need_diffusers()
    from tiny_xl import save_tiny_xl

    return made_once("one-block-xl", functools.partial(save_tiny_xl, blocks=1))


@pytest.fixture(scope="session")
def toys(made_once: Callable[..., Path]) -> Path:
    """Three concepts of four images: with two rows, one of them is refilled."""
    return made_once("toys", write_toy_concepts)


@pytest.fixture(scope="session")
def finished(made_once: Callable[..., Path], one_block_sd_folder: Path, toys: Path) -> Path:
    """An uninterrupted run of :data:`running.OPTIONS`, with a grid and TensorBoard."""
    shown = {"validation_steps": 12, "validation_inference_steps": 2, "num_validation_images": 1}

    def train(output: Path) -> None:
        run_to_end(arguments(one_block_sd_folder, toys, output, **shown, report_to="tensorboard"))

    return made_once("finished", train)


@pytest.fixture(scope="session")
def one_block_inpainting_folder(made_once: Callable[..., Path]) -> Path:
    """Nine channels, as runwayml/stable-diffusion-inpainting."""
    _need_diffusers()
    from tiny_pipelines import save_tiny_sd

    save = functools.partial(save_tiny_sd, blocks=1, in_channels=9)
    return made_once("one-block-inpainting", save)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The folder of tiny-sd, the small trained model that ships with the package."""
    folder = embedded_folder("tiny-sd")
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def embedded_vocabulary(embedded_model: Path) -> int:
    """Number of tokens that its text encoder knows."""
    return json.loads((embedded_model / "text_encoder" / "config.json").read_text())["vocab_size"]
