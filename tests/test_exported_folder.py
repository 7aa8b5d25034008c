"""The exported pipeline folder in diffusers' hands: it loads with its concepts or not at all, is
saved and loaded again, gives other pipelines, and shares no file with the model it was made from.
"""

import ast
import configparser
import hashlib
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="the folder is for PyTorch: pip install '.[torch]'")
diffusers = pytest.importorskip(
    "diffusers", reason="the folder is for diffusers: pip install '.[torch]'"
)

from diffusers import (  # noqa: E402
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from tiny_pipelines import load_pipe, make_residual, write  # noqa: E402

from catversion_jax.cli import main  # noqa: E402
from catversion_jax.errors import CatVersionError  # noqa: E402
from catversion_jax.integrations import diffusers as loader  # noqa: E402
from catversion_jax.integrations import pipeline_folder  # noqa: E402
from catversion_jax.integrations.pipeline_folder import export_pipeline  # noqa: E402
from catversion_jax.methods.concept_file import Concept, load_concept  # noqa: E402
from catversion_jax.models.weights.model_files import open_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["tom", "rex"]
# diffusers 0.35 to 0.37 run a local folder's code without asking
ASKS_FOR_TRUST = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 38)
UGLY = {"negative_prompt": "an ugly cat"}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def exported(tiny_sd_folder, tmp_path_factory) -> Path:
    concepts = [
        Concept(make_residual(0, bias=1.0), "cat", "tom"),
        Concept(make_residual(1, bias=1.0), "dog", "rex"),
    ]
    return export_pipeline(tmp_path_factory.mktemp("exported") / "out", tiny_sd_folder, concepts)


@pytest.fixture
def expected(tiny_sd_folder, tmp_path) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of a prompt with the concept and of a negative prompt without it."""
    pipe = load_pipe(tiny_sd_folder)
    _, plain = encoded(pipe)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", make_residual(0, bias=1.0)))
    return encoded(pipe)[0], plain


@torch.no_grad()
def encoded(pipe, prompt="a cat") -> tuple[torch.Tensor, torch.Tensor]:
    return pipe.encode_prompt(prompt, "cpu", 1, True, **UGLY)


def names_without_trust(kind, folder, **options) -> list[str]:
    """The concepts of what is loaded without ``trust_remote_code``, where diffusers lets one."""
    if ASKS_FOR_TRUST:
        with pytest.raises(ValueError, match="trust_remote_code"):
            kind.from_pretrained(folder, **options)
        return NAMES
    pipe = kind.from_pretrained(folder, **options)
    return [concept["name"] for concept in loader.list_catversion(pipe)]


def check(pipe, expected) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the text encoder was called")
        got = encoded(pipe)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_saving_into_the_folder_changes_no_file_of_the_model(tiny_sd_folder, exported, tmp_path):
    before = digests(tiny_sd_folder)
    inodes = {path.stat().st_ino for path in tiny_sd_folder.rglob("*")}
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or path.stat().st_ino in inodes for path in files)
    out = export_pipeline(tmp_path / "out", tiny_sd_folder, [Concept(make_residual(0), "cat", "x")])
    for path in out.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                file.write(b"written through")
    assert digests(tiny_sd_folder) == before


@pytest.mark.parametrize("existed", [True, False])
def test_what_stops_the_export_leaves_nothing(tiny_sd_folder, tmp_path, monkeypatch, existed):
    def stopped(*args: object, **options: object) -> str:
        raise KeyboardInterrupt

    output, concepts = tmp_path / "out", [Concept(make_residual(0), "cat", "x")]
    if existed:
        output.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_folder, "pipeline_source", stopped)
        with pytest.raises(KeyboardInterrupt):
            export_pipeline(output, tiny_sd_folder, concepts)
    assert [*tmp_path.iterdir()] == ([output] if existed else [])
    assert not existed or not [*output.iterdir()]
    assert export_pipeline(output, tiny_sd_folder, concepts) == output  # the same command again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("conv_in.weight"), r"1 missing:\n +conv_in\.weight"),
        (
            lambda tensors: tensors.update({"conv_in.bias": np.zeros(3, np.float32)}),
            r"1 misshaped:\n +conv_in\.bias",
        ),
        (
            lambda tensors: tensors.update(
                {"conv_in.bias": tensors["conv_in.bias"].astype(np.uint8)}
            ),
            "conv_in.bias holds uint8",
        ),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_exported(
    tiny_sd_folder, tmp_path, capsys, change, message
):
    shutil.copytree(tiny_sd_folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    file = Concept(make_residual(0), "cat", "x").save(tmp_path / "x.safetensors")
    command = ["export", str(file), "--format", "pipeline", "--model", str(tmp_path / "model")]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_readme_s_code_runs_no_class_word(tiny_sd_folder, tmp_path):
    word = 'x"); raise SystemExit #'
    export_pipeline(tmp_path / "out", tiny_sd_folder, [Concept(make_residual(0), word, "x")])
    code = (tmp_path / "out" / "README.md").read_text().split("```")[1].removeprefix("python")
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert f"a photo of a {word}" in texts


def test_a_hub_cache_is_copied_too(tiny_sd_folder, tmp_path):
    """Its snapshot holds links to blobs elsewhere."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    blobs.mkdir()
    for path in tiny_sd_folder.rglob("*"):
        if path.is_file():
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            link = snapshot / path.relative_to(tiny_sd_folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    before = digests(blobs)
    out = export_pipeline(tmp_path / "out", snapshot, [Concept(make_residual(0), "cat", "x")])
    pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.save_pretrained(out)
    assert digests(blobs) == before


@pytest.mark.parametrize("kind", [DiffusionPipeline, StableDiffusionPipeline])
def test_it_loads_with_its_concepts_or_not_at_all(exported, expected, kind):
    for options in ({}, {"custom_pipeline": str(exported)}):
        assert names_without_trust(kind, exported, **options) == NAMES
        pipe = kind.from_pretrained(exported, **options, trust_remote_code=True)
        assert [concept["name"] for concept in loader.list_catversion(pipe)] == NAMES
        check(pipe, expected)
    for automatic in (AutoPipelineForText2Image, AutoPipelineForImage2Image):
        with pytest.raises(ValueError, match="CatVersionPipeline"):
            automatic.from_pretrained(exported)


def test_where_a_model_is_wanted_its_concepts_are_said_not_to_act(exported, caplog):
    """Given as the model it is the plain one; given as a concept it is said which to give."""
    open_model(exported)
    (said,) = caplog.messages
    assert "only the plain model is used here" in said
    assert str(exported / "catversion" / "rex.safetensors") in said
    with pytest.raises(CatVersionError, match=r"Give one of its concepts, such as .*rex"):
        load_concept(exported)


def test_save_and_load_again(exported, expected, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="save_pretrained")
        pipe.save_pretrained(tmp_path / "saved")
    assert names_without_trust(DiffusionPipeline, tmp_path / "saved") == NAMES
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    check(again, expected)
    again.save_pretrained(tmp_path / "twice")
    check(DiffusionPipeline.from_pretrained(tmp_path / "twice", trust_remote_code=True), expected)


def test_what_is_loaded_and_chosen_survives(tiny_sd_folder, exported, tmp_path):
    """Saved and loaded, and handed on by ``from_pipe``, against a plain one with the loader."""
    pipe = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    file = write(tmp_path, "new", "house", make_residual(2))
    assert pipe.load_catversion(file) == "new"
    pipe.unload_catversion("rex")
    pipe.set_catversion(["tom", "new"], [0.5, 2.0], keep_apart=True)
    right = load_pipe(tiny_sd_folder)
    for one in (write(tmp_path, "tom", "cat", make_residual(0, bias=1.0)), file):
        loader.load_catversion(right, one)
    loader.set_catversion(right, ["tom", "new"], [0.5, 2.0], keep_apart=True)
    pipe.save_pretrained(tmp_path / "saved")
    saved = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    text = "a cat, a dog and a house"
    for one in (
        pipe,
        saved,
        type(pipe).from_pipe(pipe),
        AutoPipelineForImage2Image.from_pipe(pipe),
    ):
        assert [(c["name"], c["scale"]) for c in one.list_catversion()] == [
            ("tom", 0.5),
            ("new", 2.0),
        ]
        for found, expected in zip(encoded(one, text), encoded(right, text), strict=True):
            assert torch.equal(found, expected)
        with one.chosen("new"), loader.chosen(right, "new"):
            assert torch.equal(encoded(one, text)[0], encoded(right, text)[0])
    saved.disable_catversion()
    plain = encoded(load_pipe(tiny_sd_folder), text)
    assert torch.equal(encoded(saved, text)[0], plain[0])
    saved.save_pretrained(tmp_path / "resting")
    resting = DiffusionPipeline.from_pretrained(tmp_path / "resting", trust_remote_code=True)
    assert torch.equal(encoded(resting, text)[0], plain[0])
    resting.enable_catversion()
    assert torch.equal(encoded(resting, text)[0], encoded(right, text)[0])
    resting.unload_catversion()
    assert type(resting).from_pipe(resting).list_catversion() == []  # they stay unloaded
    resting.save_pretrained(tmp_path / "none")
    none = DiffusionPipeline.from_pretrained(tmp_path / "none", trust_remote_code=True)
    assert none.list_catversion() == []
    assert none.load_catversion(file) == "new"


def test_a_stock_pipeline_made_of_it(exported, expected):
    pipe = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    pipe.enable_catversion(other)
    check(other, expected)
    # a block of this package has no effect on the copy of its code in the folder, and says so
    with pytest.raises(loader.CatVersionLoadError, match=r"Use the methods of its pipeline"):
        loader.plain(pipe).__enter__()
    with pytest.raises(loader.CatVersionLoadError, match=r"pipe\.chosen"):
        loader.chosen(pipe, "tom").__enter__()


def test_two_folders_in_one_process(tiny_sd_folder, exported, expected, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    other = [Concept(make_residual(5), "cat", "other")]
    out = export_pipeline(tmp_path / "other", tiny_sd_folder, other)
    second = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert [concept["name"] for concept in loader.list_catversion(second)] == ["other"]
    check(pipe, expected)
    assert not torch.equal(encoded(second)[0], expected[0])
    pipe.save_pretrained(tmp_path / "saved")
    check(DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True), expected)


def test_pipelines_made_of_it_spare_negative_prompts(exported, expected):
    pipe = DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert isinstance(other, StableDiffusionImg2ImgPipeline)
    assert other.text_encoder is pipe.text_encoder
    check(other, expected)
    check(AutoPipelineForInpainting.from_pipe(other), expected)
    pipe.set_catversion("tom", 0.5)
    back = AutoPipelineForText2Image.from_pipe(other)
    assert type(back).__name__ == "CatVersionPipeline"
    assert [(c["name"], c["scale"]) for c in loader.list_catversion(back)] == [
        ("tom", 0.5),
        ("rex", None),
    ]
    with back.scaled(1.0):
        check(back, expected)
    with back.plain():
        assert torch.equal(encoded(back)[1], expected[1])
        assert not torch.equal(encoded(back)[0], expected[0])


def test_older_transformers_find_the_text_encoder(tiny_sd_folder, exported):
    """transformers before 5.6 knows its tensors as ``text_model.*``; others get random weights."""
    from safetensors.torch import load_file

    file = Path("text_encoder") / "model.safetensors"
    copied, original = load_file(exported / file), load_file(tiny_sd_folder / file)
    names = {f"text_model.{name.removeprefix('text_model.')}": name for name in original}
    assert copied.keys() == names.keys()
    assert all(torch.equal(copied[name], original[old]) for name, old in names.items())


def test_the_readme_says_the_oldest_versions(exported):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extra = setup["options.extras_require"]["torch"] + setup["options"]["install_requires"]
    readme = (exported / "README.md").read_text()
    for name in ("torch", "diffusers", "transformers"):
        version = re.search(rf"^{name}>=([\d.]+)$", extra, re.MULTILINE)[1]
        assert f"{name} {version}" in readme
