"""``catversion export`` from the outside; exported things run in stock pipelines."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch", reason="exports are checked in torch: pip install '.[test]'")
pytest.importorskip("diffusers", reason="exports are checked in diffusers: pip install '.[test]'")

from exporting import (  # noqa: E402
    LATENTS,
    catversion,
    draw,
    draw_with_loader,
    stock_pipe,
    write_run,
)
from tiny_pipelines import make_residual  # noqa: E402

from catversion_jax.integrations.pipeline_folder import table_rows  # noqa: E402
from catversion_jax.methods.concept_file import Concept, load_concept  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture
def run_folder(tmp_path: Path, tiny_sd_folder: Path) -> Path:
    return write_run(tmp_path / "run", tiny_sd_folder)


def test_export_concept_files(run_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "files"
    code, text = catversion(capsys, "export", run_folder, "--output_dir", out)
    assert code == 0
    assert text.split() == [str(out / "rex.safetensors"), str(out / "tom.safetensors")]
    for name in ("tom", "rex"):
        original = run_folder / "concepts" / name / "catversion.safetensors"
        assert (out / f"{name}.safetensors").read_bytes() == original.read_bytes()
    code, text = catversion(capsys, "export", out, "--output_dir", tmp_path / "again")
    assert [Path(line).name for line in text.split()] == ["rex.safetensors", "tom.safetensors"]
    code, text = catversion(
        capsys, "export", run_folder, "--concept", "tom", "--output_dir", tmp_path / "one"
    )
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["tom.safetensors"]


def test_export_from_a_checkpoint_is_what_training_would_write(tmp_path: Path, capsys) -> None:

    from catversion_jax.training.run.checkpoint import Checkpoints, SavedRow
    from catversion_jax.training.run.records import ConceptRecord
    from catversion_jax.training.state import TrainState

    records = [
        ConceptRecord(
            name=name,
            base_class="cat",
            when="class_word",
            base_model="some/model",
            text_encoder_sha256="ab",
            images=("1.png",),
            prompts=("a cat",),
            random_flip=0.5,
            seed=3,
            config={"resolution": 16},
        )
        for name in ("tom", "ill")
    ]
    residuals = [make_residual(seed, bias=1.0) for seed in (0, 1)]
    rows = [
        SavedRow(
            record,
            TrainState(
                step=np.int32(4),
                learned=residual,
                opt_state=(),
                failed_step=np.int32(failed),
            ),
            evaluations=((0, 0.5),),
        )
        for record, residual, failed in zip(records, residuals, (-1, 2), strict=True)
    ]
    with Checkpoints(tmp_path / "run" / "checkpoints" / "process-0000", keep=2) as checkpoints:
        checkpoints.save(4, rows)
    code, text = catversion(capsys, "export", tmp_path / "run", "--output_dir", tmp_path / "out")
    assert code == 2
    step = tmp_path / "run" / "checkpoints" / "process-0000" / "4"
    assert f"It has checkpoints: export {step}" in text
    code, _ = catversion(capsys, "export", step, "--output_dir", tmp_path / "out")
    assert code == 0
    # the other one had failed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tom.safetensors"]
    records[0].save(tmp_path / "expected.safetensors", residuals[0], 4)
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "out" / "tom.safetensors").read_bytes() == expected


def test_prompt_embeds_work_in_a_stock_pipeline(
    run_folder: Path, tiny_sd_folder: Path, tmp_path: Path, capsys, caplog
) -> None:
    out = tmp_path / "embeds"
    code, text = catversion(
        capsys, "export", run_folder, "--format", "prompt_embeds", "--output_dir", out,
        "--prompt", "a cat", "--prompt", "a red cab", "--negative_prompt", "blurry",
    )  # fmt: skip
    assert code == 0, text
    tensors = safetensors.numpy.load_file(out / "prompt_embeds.safetensors")
    pipe = stock_pipe(tiny_sd_folder)
    with torch.no_grad():
        plain, negative = pipe.encode_prompt("a red cab", "cpu", 1, True, negative_prompt="blurry")
    np.testing.assert_allclose(
        tensors["prompt_embeds"][1:], plain.numpy(), atol=1e-4 * float(plain.abs().max())
    )
    np.testing.assert_allclose(tensors["negative_prompt_embeds"][:1], negative.numpy(), atol=1e-3)
    assert caplog.messages == [m for m in caplog.messages if "a red cab" in m]
    concept = run_folder / "concepts" / "tom"
    from catversion_jax.integrations.diffusers import load_catversion

    load_catversion(pipe, concept)
    expected = draw(pipe, "a cat", negative_prompt="blurry")
    got = draw(
        stock_pipe(tiny_sd_folder),
        None,
        prompt_embeds=torch.tensor(tensors["prompt_embeds"][:1]),
        negative_prompt_embeds=torch.tensor(tensors["negative_prompt_embeds"][:1]),
    )
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_prompt_embeds_warn_of_plain_and_cut_off_prompts(
    run_folder: Path, tmp_path: Path, capsys, caplog
) -> None:
    long = "a cat upon a very long kitchen table"  # 22 letters fit
    code, text = catversion(
        capsys, "export", run_folder, "--format", "prompt_embeds", "--output_dir", tmp_path / "out",
        "--prompt", "a cat", "--prompt", "a dog", "--prompt", long, "--prompt", "a house",
    )  # fmt: skip
    assert code == 0, text
    cut, *uncalled = caplog.messages
    assert cut.startswith(f"prompt {long!r}: longer than")
    assert cut.endswith("cut off: 'en table'")
    assert len(uncalled) == 2
    for message, name in zip(sorted(uncalled), ("rex", "tom"), strict=True):
        assert message.startswith(f"prompt 'a house': never names concept {name!r}")


def test_whole_image_equals_our_sampler(run_folder: Path, tiny_sd_folder: Path) -> None:
    from catversion_jax.config.sampling import SamplingSettings
    from catversion_jax.models.stable_diffusion import load_backbone
    from catversion_jax.sampling.denoising import draw_requests
    from catversion_jax.sampling.requests import ConceptUse, ImageRequest

    path = run_folder / "concepts" / "tom" / "catversion.safetensors"
    concept = load_concept(path)
    use = ConceptUse(concept.name, concept.base_class, concept.learned)
    settings = SamplingSettings(sampler="ddim", num_inference_steps=3, guidance_scale=5.0)
    ours = draw_requests(
        load_backbone(tiny_sd_folder), [ImageRequest("a cat", (use,))], settings, latents=LATENTS
    )
    theirs = draw_with_loader(tiny_sd_folder, path, "a cat")
    # the concept is seen
    assert np.abs(theirs - draw(stock_pipe(tiny_sd_folder), "a cat")).max() > 0.01
    assert np.abs(ours.pixels[0] - theirs).max() < 1e-3


def test_pipeline_folder_needs_no_package_of_ours(
    run_folder: Path, tiny_sd_folder: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "pipeline"
    code, text = catversion(
        capsys, "export", run_folder, "--format", "pipeline", "--output_dir", out
    )
    assert code == 0, text
    program = """
import importlib.abc, sys, warnings
class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "catversion_jax":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
import numpy as np, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
folder, latents, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
draw = lambda prompt, negative=None: pipe(prompt, num_inference_steps=3, guidance_scale=5.0,
    latents=torch.tensor(np.load(latents)), output_type="np", negative_prompt=negative).images[0]
images = [draw("a cat"), draw("a dog"), draw("a red cab")]
images += [draw("a red cab", "an ugly cat"), draw("a cat", "an ugly cat")]
pipe.set_catversion("tom", 0.0)
images.append(draw("a cat"))
file = folder + "/pipeline.py"
by_file = DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)
assert type(by_file).__name__ == "CatVersionPipeline"
np.save(result, np.stack(images))
"""
    np.save(tmp_path / "latents.npy", LATENTS)
    arguments = [out, tmp_path / "latents.npy", tmp_path / "images.npy"]
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=tmp_path,
        env={
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    images = np.load(tmp_path / "images.npy")
    plain = stock_pipe(tiny_sd_folder)
    for image, name, prompt in ((images[0], "tom", "a cat"), (images[1], "rex", "a dog")):
        expected = draw_with_loader(tiny_sd_folder, run_folder / "concepts" / name, prompt)
        np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(images[2], draw(plain, "a red cab"))
    ugly = {"negative_prompt": "an ugly cat"}
    np.testing.assert_array_equal(images[3], draw(plain, "a red cab", **ugly))
    expected = draw_with_loader(tiny_sd_folder, run_folder / "concepts" / "tom", "a cat", **ugly)
    np.testing.assert_array_equal(images[4], expected)
    assert not np.array_equal(images[4], images[0])
    np.testing.assert_array_equal(images[5], draw(plain, "a cat"))
    assert load_concept(out / "catversion" / "tom.safetensors").base_class == "cat"
    code, text = catversion(
        capsys, "export", run_folder, "--format", "pipeline", "--output_dir", out
    )
    assert code == 2
    assert "not an empty folder" in text


def test_export_says_what_is_wrong(run_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    cases = [
        (("export", tmp_path / "no"), "no such file or folder"),
        (("export", tmp_path), "no finished concept in it"),
        (
            ("export", run_folder, "--concept", "max"),
            "--concept max: not in .* which holds rex, tom",
        ),
        (("export", run_folder, "--format", "prompt_embeds"), "at least one --prompt"),
        (
            ("export", run_folder, "--format", "pipeline", "--model", tmp_path),
            "is not a diffusers folder",
        ),
    ]
    for arguments, message in cases:
        code, text = catversion(capsys, *arguments, "--output_dir", out)
        assert code == 2
        assert __import__("re").search(message, text), text
    assert not out.exists()


@pytest.mark.parametrize(
    ("form", "given", "remedy"),
    [
        ("safetensors", ["--model", "x"], "prompt_embeds, pipeline, block"),
        ("safetensors", ["--force"], "prompt_embeds, pipeline, block"),
        ("pipeline", ["--scale", "0.3"], "prompt_embeds"),
        ("pipeline", ["--prompt", "a cat"], "prompt_embeds"),
        ("block", ["--negative_prompt", "a dog"], "prompt_embeds"),
        ("block", ["--revision", "main"], "prompt_embeds, pipeline"),
    ],
)
def test_what_a_format_has_no_use_for_is_refused(form, given, remedy, run_folder, capsys) -> None:
    code, text = catversion(capsys, "export", run_folder, "--format", form, *given)
    assert code == 2
    assert f"{given[0]}: says nothing of --format {form}." in text
    assert text.rstrip().endswith(f"it is for: {remedy}.")


@pytest.mark.parametrize("form", ["pipeline", "prompt_embeds"])
def test_export_for_another_text_encoder_is_refused(
    run_folder: Path, tmp_path: Path, capsys, form: str
) -> None:
    from tiny_pipelines import save_tiny_sd

    other = save_tiny_sd(tmp_path / "other", seed=1)
    prompt = ("--prompt", "a cat") if form == "prompt_embeds" else ()
    arguments = ("export", run_folder, "--format", form, "--model", other, *prompt)
    code, text = catversion(capsys, *arguments, "--output_dir", tmp_path / "out")
    assert code == 2
    assert "--force" in text
    code, text = catversion(capsys, *arguments, "--output_dir", tmp_path / "out", "--force")
    assert code == 0, text
    if form == "pipeline":
        from diffusers import DiffusionPipeline

        out = str(tmp_path / "out")
        pipe = DiffusionPipeline.from_pretrained(out, custom_pipeline=out, trust_remote_code=True)
        assert type(pipe).__name__ == "CatVersionPipeline"


def test_the_table_of_an_export_says_which_concept_acts() -> None:
    concepts = [
        Concept(make_residual(0), word, name, when)
        for name, word, when in (
            ("fido", "Dog", "class_word"),
            ("rex", "dog", "class_word"),
            ("tom", "cat", "class_word"),
            ("mood", "dog", "always"),
        )
    ]
    assert table_rows(concepts).splitlines() == [
        "| fido | Dog, once it is chosen in place of rex |",
        "| rex | dog |",
        "| tom | cat |",
        "| mood | every prompt |",
    ]
