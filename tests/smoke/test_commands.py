"""The commands of an installed package, one after the other: no torch, no file of the repository.

``.ci/installed`` runs this on the newest jax, against the wheel, in a folder of its own. The screen
is part of what is checked: libtpu, which the package ``plan`` brings, has nothing to say on it.
"""

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from commands import printed, start
from PIL import Image
from safetensors.numpy import load_file

from catversion_jax.assets import EXAMPLE_CONCEPTS, embedded_folder

pytestmark = pytest.mark.smoke
TRAIN = [
    "train",
    "--config",
    "quickstart",
    "concepts=photos",
    "concepts_per_device=2",
    "max_train_steps=40",
    "logging_steps=2",
    "checkpointing_steps=20",
    "validation_steps=null",
    "evaluate_after=false",
    "num_eval_samples=2",
    "compilation_cache_dir=cache",
    "report_to=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: two of the example concepts are in its folder ``photos``."""
    folder = tmp_path_factory.mktemp("elsewhere")
    examples = embedded_folder(EXAMPLE_CONCEPTS)
    assert examples is not None
    for name in ("golden_turtle", "navy_elephant"):
        shutil.copytree(examples / name, folder / "photos" / name)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that was stopped and continued."""
    process = start(folder, *TRAIN, "output_dir=run")
    # a step is done where its line follows the header and the evaluation before the first step
    while process.poll() is None and not any(
        len(path.read_text().splitlines()) > 2 for path in folder.glob("run/concepts/*/metrics.csv")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed(process, code=75)
    assert "resumed" in printed(start(folder, *TRAIN, "output_dir=run"))
    return folder / "run"


def test_a_stopped_run_learns_what_an_uninterrupted_one_learns(folder: Path, run: Path) -> None:
    printed(start(folder, *TRAIN, "output_dir=whole"))
    for name in ("golden_turtle", "navy_elephant"):
        file = Path("concepts") / name / "catversion.safetensors"
        continued, whole = load_file(run / file), load_file(folder / "whole" / file)
        assert continued.keys() == whole.keys()
        for key, tensor in whole.items():
            assert np.abs(tensor).max() > 0
            np.testing.assert_array_equal(continued[key], tensor)
    assert "2 done" in printed(start(folder, "status", "run"))


def test_a_concept_is_drawn(folder: Path, run: Path) -> None:
    pictures = []
    for scale in ("0", "1"):
        arguments = ["--prompt", "a turtle", "--num_inference_steps", "2", "--output_dir", scale]
        concept = f"{run / 'concepts' / 'golden_turtle'}:{scale}"
        printed(start(folder, "generate", "--model", "tiny-sd", "--concept", concept, *arguments))
        (picture,) = (folder / scale).glob("*turtle*.png")
        with Image.open(picture) as image:
            pictures.append(np.asarray(image, np.float32))
    plain, learned = pictures
    assert plain.std() > 0
    assert np.abs(learned - plain).max() > 0


def test_a_run_is_scored(folder: Path, run: Path) -> None:
    (folder / "prompts.txt").write_text("a {} in the snow\n")
    quick = ["--num_images_per_prompt", "1", "--num_inference_steps", "1"]
    quick += ["--num_prior_images", "0"]
    printed(start(folder, "evaluate", "run", "--prompts", "prompts.txt", *quick))
    assert "golden_turtle" in (run / "evaluation" / "report.html").read_text()


def test_a_concept_is_exported_and_inspected(folder: Path, run: Path) -> None:
    del run
    printed(start(folder, "export", "run", "--output_dir", "exported"))
    files = sorted((folder / "exported").rglob("*.safetensors"))
    assert len(files) == 2
    assert "turtle" in printed(start(folder, "inspect", str(files[0])))
