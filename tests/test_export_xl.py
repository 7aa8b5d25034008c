"""What concepts of Stable Diffusion XL become for diffusers: a pipeline folder, prompt embeddings,
embeddings for ``load_textual_inversion``.
"""

import ast
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the folder is for PyTorch: pip install '.[torch]'")
pytest.importorskip("diffusers", reason="the folder is for diffusers: pip install '.[torch]'")

from diffusers import (  # noqa: E402
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file  # noqa: E402
from tiny_pipelines import make_residual, write  # noqa: E402
from tiny_xl import WIDTHS, load_xl, residuals  # noqa: E402

from catversion_jax.cli import main  # noqa: E402
from catversion_jax.integrations import diffusers as loader  # noqa: E402
from catversion_jax.methods.concept_file import save_concept  # noqa: E402
from catversion_jax.methods.per_encoder import PerEncoder  # noqa: E402
from catversion_jax.methods.token_embeddings import TokenEmbeddings  # noqa: E402
from catversion_jax.models.stable_diffusion import load_backbone  # noqa: E402

UGLY = {"negative_prompt": "an ugly cat", "negative_prompt_2": "no cat!"}


@pytest.fixture(scope="module")
def stock(tiny_xl_folder):
    """The plain pipeline; tests leave it as it is."""
    return load_xl(tiny_xl_folder)


@pytest.fixture(scope="module")
def fingerprints(tiny_xl_folder) -> dict[str, str]:
    return load_backbone(tiny_xl_folder).fingerprints


@pytest.fixture
def tom(tiny_xl_folder, fingerprints, tmp_path) -> Path:
    facts = {"base_model": str(tiny_xl_folder), **fingerprints}
    return write(tmp_path, "tom", "cat", residuals(1, logit_bias=1.0), **facts)


@torch.no_grad()
def encoded(pipe, prompt="a cat!", **kwargs):
    return pipe.encode_prompt(prompt, device="cpu", **kwargs)


def draw(pipe, *args, **kwargs):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe(*args, latents=latents, num_inference_steps=2, output_type="np", **kwargs).images


def export(form, source, out, *more) -> int:
    command = ["export", str(source), "--format", form, "--output_dir", str(out), *map(str, more)]
    return main(command)


def test_the_pipeline_folder(tiny_xl_folder, stock, tom, tmp_path):
    out = tmp_path / "out"
    assert export("pipeline", tom, out) == 0
    imports = [
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse((out / "pipeline.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not any(name.startswith("catversion") for name in imports)
    index, before = (
        json.loads((folder / "model_index.json").read_text()) for folder in (out, tiny_xl_folder)
    )
    assert index | {"_class_name": ""} == before | {"_class_name": ""}  # no key is added or lost
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="diffusers_modules")
        pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert isinstance(pipe, StableDiffusionXLPipeline)
    assert [one["layers"] for one in loader.list_catversion(pipe)] == [((1, 2), (3, 4))]
    plain, found = encoded(stock, **UGLY), encoded(pipe, **UGLY)
    by_loader = load_xl(tiny_xl_folder)
    loader.load_catversion(by_loader, tom)
    for one, expected in zip(found, encoded(by_loader, **UGLY), strict=True):
        assert torch.equal(one, expected)
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[3], plain[3])
    with pipe.plain():
        assert torch.equal(encoded(pipe)[0], plain[0])
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert isinstance(other, StableDiffusionXLImg2ImgPipeline)
    assert torch.equal(encoded(other, **UGLY)[1], plain[1])
    back = AutoPipelineForText2Image.from_pipe(other)
    assert type(back).__name__ == "CatVersionXLPipeline"
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=str(tmp_path / "saved"), trust_remote_code=True
    )
    assert torch.equal(encoded(again, **UGLY)[0], found[0])


def test_the_pipeline_folder_needs_the_right_model(
    tiny_xl_folder, tiny_sd_folder, fingerprints, tom, tmp_path, capsys
):
    def refused(message, *arguments):
        assert export("pipeline", *arguments) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()

    one = write(tmp_path, "one", "cat", make_residual(0), base_model=str(tiny_sd_folder))
    model = ("--model", tiny_xl_folder, "--force")
    refused(
        r"'one': was trained for a model with 1 text enc.* has 2", one, tmp_path / "out", *model
    )
    model = ("--model", tiny_sd_folder, "--force")
    refused(
        r"'tom': was trained for a model with 2 text enc.* has 1", tom, tmp_path / "out", *model
    )
    changed = fingerprints | {"text_encoder_2_sha256": "0" * 64}
    file = write(tmp_path, "ann", "cat", residuals(), base_model=str(tiny_xl_folder), **changed)
    refused(r"'ann': trained with the text_encoder_2 000000000000", file, tmp_path / "out")


@pytest.mark.parametrize("negative", ["", "an ugly cat"])
def test_prompt_embeds_in_a_stock_pipeline(tiny_xl_folder, stock, tom, tmp_path, negative):
    prompts = ("--prompt", "a cat!", "--prompt", "a | dog")
    out = tmp_path / "out"
    assert export("prompt_embeds", tom, out, *prompts, "--negative_prompt", negative) == 0
    tensors = load_file(out / "prompt_embeds.safetensors")
    by_loader = load_xl(tiny_xl_folder)
    loader.load_catversion(by_loader, tom)
    readme = (out / "prompt_embeds.md").read_text()
    assert "| 0 | a cat! | tom |\n| 1 | a \\| dog | none |" in readme
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    code = code.replace('"prompt_embeds.safetensors"', repr(str(out / "prompt_embeds.safetensors")))
    code = code.replace("pipe(**embeds).images[0]", "images = draw(pipe, **embeds)")
    names = {"pipe": stock, "draw": draw}
    exec(code, names)
    expected = draw(by_loader, "a cat!", negative_prompt=negative or None)
    assert np.abs(names["images"] - expected).max() < 1e-3
    assert np.abs(draw(stock, "a cat!", negative_prompt=negative or None) - expected).max() > 0.01
    plain = encoded(stock, "a | dog", negative_prompt=negative or None)
    order = ("prompt_embeds", "negative_prompt_embeds")
    order += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, reference in zip(order, plain, strict=True):
        torch.testing.assert_close(tensors[name][1:], reference, atol=1e-4, rtol=1e-4)


def test_embeddings_are_for_diffusers_own_loader(stock, tmp_path, capsys):
    """What it does with them, tests/test_concepts_xl.py compares."""
    learned = PerEncoder(tuple(TokenEmbeddings(np.ones((2, width), "f4")) for width in WIDTHS))
    path = save_concept(tmp_path / "x.safetensors", learned, base_class="cat", name="tom")
    with pytest.raises(
        loader.CatVersionLoadError, match=r"clip_l and clip_g .* write <tom> in the"
    ):
        loader.load_catversion(stock, path)
    assert export("pipeline", path, tmp_path / "out") == 2
    assert "tensors clip_l and clip_g" in capsys.readouterr().err
