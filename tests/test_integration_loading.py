"""What the PyTorch loader accepts: files, hub ids, fingerprints; every mistake by its message."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the loader is a PyTorch one: pip install '.[torch]'")

from tiny_pipelines import load_pipe, make_residual, write  # noqa: E402

from catversion_jax.integrations import diffusers as loader  # noqa: E402
from catversion_jax.methods.residual import KVResidual  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def test_fingerprint_equals_the_one_of_the_jax_side(tiny_sd_folder):
    from safetensors.numpy import load_file

    from catversion_jax.models.weights.fingerprint import text_encoder_sha256

    expected = text_encoder_sha256(load_file(tiny_sd_folder / "text_encoder" / "model.safetensors"))
    for dtype in (torch.float32, torch.float16):
        pipe = load_pipe(tiny_sd_folder, dtype=dtype)
        assert loader.text_encoder_sha256(pipe.text_encoder) == expected
        pipe.text_encoder.resize_token_embeddings(600)  # textual inversion does so
        assert loader.text_encoder_sha256(pipe.text_encoder) == expected


@torch.no_grad()
def changed(pipe, share: float, size: float):
    """Change a share of the text encoder's numbers by so much of their size."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipe.text_encoder.named_parameters():
        if "token_embedding" not in name:
            chosen = torch.rand(parameter.shape, generator=generator) < share
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
            parameter += chosen * size * noise
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_fine_tuned_text_encoder_is_taken_with_its_number_of_changes(
    tiny_sd_folder, tmp_path, share
):
    trained = loader.text_encoder_sha256(load_pipe(tiny_sd_folder).text_encoder)
    facts = {"text_encoder_sha256": trained, "base_model": str(tiny_sd_folder)}
    file = write(tmp_path, "tom", "cat", make_residual(15), **facts)
    pipe = changed(load_pipe(tiny_sd_folder), share, 0.3)
    with pytest.warns(UserWarning, match="fine-tuned text encoder, ") as caught:
        assert loader.load_catversion(pipe, file) == "tom"
    percent = float(re.search(r"encoder, ([\d.]+) % of numbers changed", str(caught[0].message))[1])
    before, after = (
        np.concatenate([p.half().ravel() for n, p in weights if "token_embedding" not in n])
        for weights in (
            load_pipe(tiny_sd_folder).text_encoder.named_parameters(),
            pipe.text_encoder.named_parameters(),
        )
    )
    assert percent == pytest.approx(100 * np.mean(before != after), rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_catversion(pipe, file, "again")  # said once


def test_an_unrelated_text_encoder_is_an_error_unless_forced(tiny_sd_folder, tmp_path):
    trained = loader.text_encoder_sha256(load_pipe(tiny_sd_folder).text_encoder)
    facts = {"text_encoder_sha256": trained, "base_model": str(tiny_sd_folder)}
    file = write(tmp_path, "tom", "cat", make_residual(15), **facts)
    pipe = changed(load_pipe(tiny_sd_folder), 1.0, 3.0)
    with pytest.raises(loader.CatVersionLoadError, match=r"no fine-tune of it \(.*force=True"):
        loader.load_catversion(pipe, file)
    assert loader.list_catversion(pipe) == []
    assert loader.load_catversion(pipe, file, force=True) == "tom"


def test_the_model_of_the_concept_is_not_here(tiny_sd_folder, tmp_path):
    facts = {"text_encoder_sha256": "0" * 64, "base_model": "some/model"}
    file = write(tmp_path, "tom", "cat", make_residual(15), **facts)
    with pytest.warns(UserWarning, match=r"000000000000 of some/model.*cannot be said"):
        loader.load_catversion(load_pipe(tiny_sd_folder), file)


@pytest.mark.parametrize(
    ("dtype", "sure"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]
)
def test_a_concept_of_a_bfloat16_copy(tiny_sd_folder, tmp_path, dtype, sure):
    """The number of its text encoder is ours, of the weights as torch rounds them."""
    from catversion_jax.models.weights.fingerprint import text_encoder_sha256

    pipe = load_pipe(tiny_sd_folder, dtype=torch.bfloat16)
    weights = {k: v.float().numpy() for k, v in pipe.text_encoder.state_dict().items()}
    trained = loader.text_encoder_sha256(pipe.text_encoder)
    assert trained == text_encoder_sha256(weights)
    assert trained.startswith("bfloat16:")
    file = write(tmp_path, "tom", "cat", make_residual(16), text_encoder_sha256=trained)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader.load_catversion(load_pipe(tiny_sd_folder, dtype=dtype), file)
    assert any("cannot be checked" in str(w.message) for w in caught) is not sure


def test_bfloat16_encoder_cannot_be_checked(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder, dtype=torch.bfloat16)
    file = write(tmp_path, "tom", "cat", make_residual(16), text_encoder_sha256="0" * 64)
    with pytest.warns(
        UserWarning, match="cannot be checked, because one of the two is in bfloat16"
    ):
        loader.load_catversion(pipe, file)


@pytest.mark.parametrize(
    ("residual", "force"),
    [
        (
            KVResidual(
                np.zeros((1, 1, 12, 64), np.float32), np.zeros((1, 1, 12, 64), np.float32), (1,)
            ),
            True,
        ),
        (make_residual(17, layers=(3, 4)), True),
        (make_residual(17, layers=(3, 4)), False),
    ],
)
def test_wrong_shape_is_an_error_even_when_forced(tiny_sd_folder, tmp_path, residual, force):
    pipe = load_pipe(tiny_sd_folder)
    with pytest.raises(
        loader.CatVersionLoadError, match="this pipeline's has 4 heads of 8 and 4 layers"
    ):
        loader.load_catversion(pipe, write(tmp_path, "tom", "cat", residual), force=force)
    assert pipe.text_encoder.config._attn_implementation == "sdpa"


def test_bad_requests(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    with pytest.raises(loader.CatVersionLoadError, match="load_catversion first"):
        loader.set_catversion(pipe, "tom")
    with pytest.raises(loader.CatVersionLoadError, match="no such file"):
        loader.load_catversion(pipe, tmp_path / "nothing.safetensors")
    with pytest.raises(loader.CatVersionLoadError, match=r"no catversion\.safetensors in it"):
        loader.load_catversion(pipe, tmp_path)
    file = write(tmp_path, "tom", "cat", make_residual(18))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-5])
    with pytest.raises(loader.CatVersionLoadError, match="not a complete safetensors file"):
        loader.load_catversion(pipe, tmp_path / "cut.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(loader.CatVersionLoadError, match="checksum"):
        loader.load_catversion(pipe, tmp_path / "damaged.safetensors")
    with pytest.raises(loader.CatVersionLoadError, match="not a concept file"):
        loader.load_catversion(pipe, tiny_sd_folder / "text_encoder" / "model.safetensors")
    loader.load_catversion(pipe, file)
    with pytest.raises(loader.CatVersionLoadError, match="'rex' is not loaded; loaded: tom"):
        loader.set_catversion(pipe, "rex")
    with pytest.raises(loader.CatVersionLoadError, match=r"scale=-1.*>= 0"):
        loader.set_catversion(pipe, "tom", -1)
    with pytest.raises(loader.CatVersionLoadError, match="one scale per name"):
        loader.set_catversion(pipe, ["tom"], [1, 2])


def test_what_is_loaded_while_all_rests(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    loader.load_catversion(pipe, write(tmp_path, "tom", "cat", make_residual(18)))
    loader.disable_catversion(pipe)
    rex = write(tmp_path, "rex", "dog", make_residual(19))
    with pytest.warns(UserWarning, match="'rex' rests like all.*enable_catversion"):
        loader.load_catversion(pipe, rex)
    assert [one["active"] for one in loader.list_catversion(pipe)] == [False, False]
    loader.enable_catversion(pipe)
    assert [one["active"] for one in loader.list_catversion(pipe)] == [True, True]


@pytest.mark.parametrize(
    "source", [None, 5, b"x", [], ("a", "b"), object(), "x" * 5000, "a\0b", {1: 2}, {"a": "b"}]
)
def test_what_is_no_source(tiny_sd_folder, source):
    pipe = load_pipe(tiny_sd_folder)
    with pytest.raises(loader.CatVersionLoadError):
        loader.load_catversion(pipe, source, local_files_only=True)
    with pytest.raises(loader.CatVersionLoadError):
        loader.load_catversion(pipe, source, metadata={"catversion.format_version": 1})


def test_tensors_and_arguments_of_other_types(tiny_sd_folder, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    pipe = load_pipe(tiny_sd_folder)
    file = write(tmp_path, "cup", "cup", make_residual(0))
    metadata = safe_open(file, "pt").metadata()
    for change in (lambda t: t.to("meta"), torch.Tensor.to_sparse, torch.Tensor.numpy):
        tensors = {name: change(tensor) for name, tensor in load_file(file).items()}
        with pytest.raises(loader.CatVersionLoadError, match="no tensor that holds its numbers"):
            loader.load_catversion(pipe, tensors, metadata=metadata)
    for name in (5, b"x", True, ["cup"]):
        with pytest.raises(loader.CatVersionLoadError, match=r"adapter_name=.*must be text"):
            loader.load_catversion(pipe, file, adapter_name=name)
    loader.load_catversion(pipe, file)
    for name in (None, 5, b"cup", [None]):
        with pytest.raises(loader.CatVersionLoadError, match=r"name=.*must be text"):
            loader.set_catversion(pipe, name)
        if name is not None:
            with pytest.raises(loader.CatVersionLoadError, match=r"plain_prompts=.*must be text"):
                loader.set_catversion(pipe, "cup", plain_prompts=name)
    with pytest.raises(loader.CatVersionLoadError, match="give each name once"):
        loader.set_catversion(pipe, ["cup", "cup"], [0.1, 0.9])
    for scale in (10**400, "1", None, np.array([1, 2]), torch.ones(2)):
        with pytest.raises(loader.CatVersionLoadError, match="scale="):
            loader.set_catversion(pipe, "cup", scale)
    assert [one["scale"] for one in loader.list_catversion(pipe)] == [1.0]


def test_needs_no_jax():
    program = """
import importlib.abc, sys
class NoJax(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("jax", "flax"):
            raise ImportError(name)
sys.meta_path.insert(0, NoJax())
import catversion_jax.integrations.diffusers
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_hub_ids(tmp_path):
    repository = tmp_path / "cache" / "models--user--repo"  # as a download leaves it
    snapshot = repository / "snapshots" / ("0" * 40)
    write(snapshot.parent, snapshot.name, "cat", make_residual(23))
    write(snapshot, "rex", "dog", make_residual(24))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    program = """
import pathlib
from catversion_jax.integrations.concept_source import read_concept
from catversion_jax.integrations.diffusers import CatVersionLoadError
for name, *inside in (
    ["user/repo"], ["user/repo/rex"], ["user/repo/rex/catversion.safetensors"],
    ["user/repo", "rex"], ["user/repo", "rex", "catversion.safetensors"],
    ["user/repo", None, "rex/catversion.safetensors"],
):
    file = read_concept(name, *inside, cache_dir=FOLDER, local_files_only=True)[1]
    print(pathlib.Path(file).relative_to(CACHE).as_posix())
try:
    read_concept("user/other", cache_dir=FOLDER, local_files_only=True)
except CatVersionLoadError as error:
    print(error)
""".replace("CACHE", repr(str(snapshot))).replace("FOLDER", repr(str(tmp_path / "cache")))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    *found, message = result.stdout.splitlines()
    assert found == [
        "catversion.safetensors",
        *["rex/catversion.safetensors"] * 5,
    ]
    assert message.startswith(
        "user/other: no such file here, and no catversion.safetensors in a hub repository"
    )
