"""The block for diffusers' modular pipelines: an exported folder in diffusers' own hands, against
the ordinary pipeline with the loader.
"""

import ast
import json
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the block is for PyTorch: pip install '.[torch]'")
diffusers = pytest.importorskip(
    "diffusers", reason="the block is for diffusers: pip install '.[torch]'"
)
if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
    pytest.skip("modular pipelines as of diffusers 0.42", allow_module_level=True)

from diffusers import ClassifierFreeGuidance, ModularPipelineBlocks  # noqa: E402
from diffusers import StableDiffusionXLAutoBlocks as AutoBlocks  # noqa: E402
from tiny_pipelines import make_residual, write  # noqa: E402
from tiny_xl import load_xl, residuals  # noqa: E402

from catversion_jax import load_concept  # noqa: E402
from catversion_jax.cli import main  # noqa: E402
from catversion_jax.integrations import diffusers as loader  # noqa: E402
from catversion_jax.integrations.block_folder import export_block  # noqa: E402
from catversion_jax.integrations.modular_block import CatVersionTextEncoderStep  # noqa: E402

SETTINGS = {"num_inference_steps": 2, "output_type": "np"}
PROMPT = {
    "prompt": "a cat! a dog!",
    "negative_prompt": "an ugly cat",
    "negative_prompt_2": "no cat",
}
CLOSE = {"rtol": 0, "atol": 2e-5}  # diffusers calls the UNet once or twice


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts")
    return {
        name: write(folder, name, word, residuals(seed, logit_bias=1.0))
        for seed, (name, word) in enumerate([("tom", "cat"), ("rex", "dog"), ("tim", "cat")])
    }


@pytest.fixture(scope="module")
def block(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("block") / "out"
    assert main(["export", str(files["tom"]), "--format", "block", "--output_dir", str(out)]) == 0
    return out


def test_what_is_said_at_the_export_is_in_the_block(files, tmp_path):
    command = [
        "export",
        str(files["tom"]),
        "--format",
        "block",
        "--output_dir",
        str(tmp_path / "x"),
    ]
    assert main([*command, "--force", "--model", "me/fine-tuned"]) == 0
    assert "Step.force = True" in (tmp_path / "x" / "block.py").read_text()
    assert 'init_pipeline("me/fine-tuned")' in (tmp_path / "x" / "README.md").read_text()


def modular(folder, step):
    blocks = AutoBlocks()
    blocks.sub_blocks["text_encoder"] = step
    pipe = blocks.init_pipeline(str(folder))
    pipe.load_components()
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    return pipe


def latents():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def ordinary(pipe, **more):
    return pipe(**PROMPT, **SETTINGS, **more, latents=latents(), guidance_scale=5.0).images


def drawn(pipe, **more):
    return pipe(**PROMPT, **SETTINGS, **more, latents=latents(), output="images")


def test_pictures_are_the_ordinary_pipelines(tiny_xl_folder, block, files):
    step = ModularPipelineBlocks.from_pretrained(str(block), trust_remote_code=True)
    assert type(step).__module__.startswith("diffusers_modules")
    pipe, right = modular(tiny_xl_folder, step), load_xl(tiny_xl_folder)
    plain = ordinary(right)
    np.testing.assert_allclose(drawn(pipe, concepts={}), plain, **CLOSE)
    for file in files.values():
        loader.load_catversion(right, file)
    loader.set_catversion(right, "tom")
    with_tom = ordinary(right)
    assert np.abs(with_tom - plain).max() > 0.01
    np.testing.assert_allclose(drawn(pipe), with_tom, **CLOSE)  # what the block brings
    asked = {"tom": 0.5, files["rex"]: 2.0}  # its own, and a file
    for apart in (False, True):
        loader.set_catversion(right, ["tom", "rex"], [0.5, 2.0], keep_apart=apart)
        np.testing.assert_allclose(
            drawn(pipe, concepts=asked, keep_apart=apart), ordinary(right), **CLOSE
        )
    loader.set_catversion(right, "tim")
    np.testing.assert_allclose(drawn(pipe, concepts=[str(files["tim"])]), ordinary(right), **CLOSE)
    np.testing.assert_allclose(drawn(pipe), with_tom, **CLOSE)  # nothing of those calls is left
    np.testing.assert_allclose(drawn(pipe, concepts=()), plain, **CLOSE)


def test_the_folder_is_what_diffusers_writes(block, tmp_path):
    imports = [
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse((block / "block.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not any(name.startswith("catversion") for name in imports)
    step = ModularPipelineBlocks.from_pretrained(str(block), trust_remote_code=True)
    step.save_pretrained(tmp_path)
    ours, theirs = (
        json.loads((folder / "modular_config.json").read_text()) for folder in (block, tmp_path)
    )
    theirs.pop("_diffusers_version")
    assert ours == theirs
    assert (tmp_path / "block.py").read_text() == (block / "block.py").read_text()
    again = ModularPipelineBlocks.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert list(again.concepts) == ["tom"]
    assert "`concepts`" in again.doc or "concepts (" in again.doc
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipelineBlocks.from_pretrained(str(block))


@pytest.mark.parametrize("existed", [True, False])
def test_what_stops_the_export_leaves_nothing(files, tmp_path, monkeypatch, existed):
    replace, out = os.replace, tmp_path / "out"
    concept = load_concept(files["tom"])
    if existed:
        out.mkdir()

    def stopped(source, target):
        if Path(target).name == "README.md":  # the concept and block.py are written
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            export_block(out, [concept])
    assert [*tmp_path.rglob("*")] == ([out] if existed else [])
    assert export_block(out, [concept]) == out  # the same command again


def test_bad_requests(tiny_xl_folder, block, files, tmp_path, capsys):
    pipe = modular(tiny_xl_folder, CatVersionTextEncoderStep())
    for asked, message in (
        ({"tam": 1.0}, r"tam: no such file.*Concepts of this block: none"),
        ({files["tom"]: -1}, r"scale=-1: must be a finite number"),
        (3, r"concepts=3: must be scales by name"),
    ):
        with pytest.raises(loader.CatVersionLoadError, match=message):
            drawn(pipe, concepts=asked)
    one = write(tmp_path, "one", "cat", make_residual(0))
    for source, out, message in (
        (one, tmp_path / "out", "trained for a model with 1 text encoder"),
        (files["tom"], block, "exists and is not an empty folder"),
    ):
        command = ["export", str(source), "--format", "block", "--output_dir", str(out)]
        assert main(command) == 2
        assert message in capsys.readouterr().err
