"""``catversion export``, ``import`` and ``inspect`` from the outside; exported things run in stock
pipelines.
"""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from catversion_jax.cli import main
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual

torch = pytest.importorskip("torch", reason="exports are checked in torch: pip install '.[test]'")
pytest.importorskip("diffusers", reason="exports are checked in diffusers: pip install '.[test]'")

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

LATENTS = np.random.default_rng(5).normal(size=(1, 4, 8, 8)).astype(np.float32)


def make_residual(seed: int, layers: tuple = (1, 2, 3)) -> KVResidual:
    rng = np.random.default_rng(seed)
    draw = lambda: rng.normal(size=(len(layers), 1, 4, 8)).astype(np.float32)  # noqa: E731
    return KVResidual(draw(), draw(), layers, 1.0)


@pytest.fixture
def run_folder(tmp_path: Path, tiny_sd_folder: Path) -> Path:
    """A run directory with two finished concepts and one that failed."""
    from catversion_jax.models.weights.fingerprint import text_encoder_sha256
    from catversion_jax.models.weights.safetensors_files import open_checkpoint

    digest = text_encoder_sha256(open_checkpoint(tiny_sd_folder / "text_encoder"))
    for seed, (name, word) in enumerate([("tom", "cat"), ("rex", "dog")]):
        save_concept(
            tmp_path / "run" / "concepts" / name / "catversion.safetensors",
            make_residual(seed),
            base_class=word,
            name=name,
            base_model=str(tiny_sd_folder),
            text_encoder_sha256=digest,
            step=7,
        )
    (tmp_path / "run" / "concepts" / "broken").mkdir()
    (tmp_path / "run" / "concepts" / "broken" / "FAILED.txt").write_text("NaN")
    return tmp_path / "run"


def catversion(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def stock_pipe(folder: Path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str | None = "a cat", **kwargs) -> np.ndarray:
    kwargs |= {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
    return pipe(prompt, latents=torch.tensor(LATENTS), **kwargs).images[0]


def draw_with_loader(folder: Path, concept: Path, prompt: str, **kwargs) -> np.ndarray:
    from catversion_jax.integrations.diffusers import load_catversion

    pipe = stock_pipe(folder)
    load_catversion(pipe, concept)
    return draw(pipe, prompt, **kwargs)


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
    residuals = [make_residual(seed) for seed in (0, 1)]
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


@pytest.mark.parametrize("form", ["pipeline", "prompt_embeds"])
def test_export_for_another_text_encoder_is_refused(
    run_folder: Path, tmp_path: Path, capsys, form: str
) -> None:
    from tiny_pipelines import save_tiny_sd

    other = save_tiny_sd(tmp_path / "other", seed=1)
    arguments = ("export", run_folder, "--format", form, "--model", other, "--prompt", "a cat")
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


def write_official(folder: Path, width: int = 32, positions: int = 2) -> torch.Tensor:
    flat = torch.randn(positions * 4 * width)
    folder.mkdir()
    keys = [f"text_model.encoder.layers.{i}.self_attn.prefix_tuning.control_trans" for i in (2, 3)]
    torch.save({key: flat for key in keys}, folder / "pytorch_adapter.bin")
    adapter_config = {"config": {"prefix_length": positions}, "hidden_size": width}
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    return flat


def test_import_an_official_adapter(tmp_path: Path, tiny_sd_folder: Path, capsys) -> None:
    flat = write_official(tmp_path / "my_teapot")
    code, text = catversion(
        capsys, "import", tmp_path / "my_teapot", "--base_class", "teapot", "--num_heads", 4,
        "--model", tiny_sd_folder, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, text
    concept = load_concept(tmp_path / "out" / "my_teapot")
    assert (concept.name, concept.base_class, concept.when) == ("my_teapot", "teapot", "class_word")
    assert concept.learned.logit_bias == 1.0
    assert len(concept.text_encoder_sha256) == 64
    np.testing.assert_array_equal(concept.learned.key[1], flat.view(2, 4, 4, 8)[:, 2].numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_with_loader(tiny_sd_folder, tmp_path / "out" / "my_teapot", "a teapot")


@pytest.mark.parametrize(
    ("name", "rule"),
    [("a/b", "path separators"), ("a:b", "':'"), ("", "no name"), ("nul", "device name")],
)
def test_import_refuses_names_that_make_no_folder(tmp_path: Path, capsys, name, rule) -> None:
    write_official(tmp_path / "teapot")
    code, text = catversion(
        capsys, "import", tmp_path / "teapot", "--base_class", "x", f"--name={name}",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert rule in text
    assert "Give another --name" in text
    assert not (tmp_path / "out").exists()


def test_import_says_where_the_fingerprint_comes_from(
    tmp_path: Path, tiny_sd_folder: Path, capsys, caplog
) -> None:
    import shutil

    from catversion_jax.models.weights.fingerprint import text_encoder_sha256
    from catversion_jax.models.weights.safetensors_files import open_checkpoint

    write_official(tmp_path / "teapot")
    half = tmp_path / "half" / "text_encoder"  # fp16 weights only
    half.mkdir(parents=True)
    shutil.copy(
        tiny_sd_folder / "text_encoder" / "model.safetensors", half / "model.fp16.safetensors"
    )
    expected = text_encoder_sha256(open_checkpoint(tiny_sd_folder / "text_encoder"))

    def run(*model):
        arguments = ("--base_class", "x", "--num_heads", 4, "--output_dir", tmp_path / "out")
        code, text = catversion(capsys, "import", tmp_path / "teapot", *arguments, *model)
        return code, text, caplog.text

    code, text, _ = run("--model", tmp_path / "half")
    assert code == 2
    assert "variant='fp16'" in text
    code, text, logged = run("--model", tmp_path / "half", "--variant", "fp16")
    assert (code, logged) == (0, ""), text
    assert load_concept(tmp_path / "out" / "teapot").text_encoder_sha256 == expected
    code, _, logged = run("--model", "some/hub-id")
    assert code == 0
    assert "--model some/hub-id: not here, so the concept file states no finger" in logged
    concept = load_concept(tmp_path / "out" / "teapot")
    assert (concept.base_model, concept.text_encoder_sha256) == ("some/hub-id", "")


def test_inspect_names_a_damaged_concept_and_lists_the_others(
    run_folder: Path, tmp_path: Path, capsys
) -> None:
    run = shutil.copytree(run_folder / "concepts", tmp_path / "concepts")
    bad = tmp_path / "concepts" / "bad" / "catversion.safetensors"
    bad.parent.mkdir()
    bad.write_bytes(b"{" * 100)
    code, text = catversion(capsys, "inspect", run)
    assert code == 2
    assert f"{bad}: " in text
    assert str(tmp_path / "concepts" / "tom") in text


def test_inspect(run_folder: Path, tmp_path: Path, capsys) -> None:
    code, text = catversion(capsys, "inspect", run_folder / "concepts" / "tom")
    assert code == 0
    shown = dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)
    assert shown["what"] == "CatVersion concept"
    assert shown["layers"] == "1, 2, 3"
    assert shown["step"] == "7"
    code, text = catversion(
        capsys, "inspect", run_folder / "concepts" / "tom" / "catversion.safetensors", "--json"
    )
    facts = json.loads(text)
    residual = load_concept(run_folder / "concepts" / "tom").learned
    expected = [float(torch.tensor(residual.key[i]).norm(dim=-1).mean()) for i in range(3)]
    np.testing.assert_allclose(facts["key_norms"], expected, atol=1e-4)
    assert (facts["base_class"], facts["num_parameters"], facts["logit_bias"]) == ("cat", 192, 1.0)
    code, text = catversion(capsys, "inspect", run_folder)
    assert code == 0
    header, *rows = text.splitlines()
    assert header.split() == ["name", "base", "class", "when", "step", "folder"]
    folders = [run_folder / "concepts" / name for name in ("rex", "tom")]
    assert [row.split() for row in rows] == [
        ["rex", "dog", "class_word", "7", str(folders[0])],
        ["tom", "cat", "class_word", "7", str(folders[1])],
    ]
    code, text = catversion(capsys, "inspect", run_folder, "--json")
    assert json.loads(text)[str(folders[1])] == facts
    write_official(tmp_path / "official")
    code, text = catversion(capsys, "export", tmp_path / "official")
    assert code == 2
    assert f"`catversion import {tmp_path / 'official'} --base_class WORD`" in text
    for path in (tmp_path / "official", tmp_path / "official" / "pytorch_adapter.bin"):
        code, text = catversion(capsys, "inspect", path, "--json", "--num_heads", 4)
        assert code == 0, text
        assert json.loads(text)["layers"] == [2, 3]
    (tmp_path / "noise.safetensors").write_bytes(b"0" * 100)
    code, text = catversion(capsys, "inspect", tmp_path / "noise.safetensors")
    assert code == 2
    assert "not a concept file" in text
