"""What the PyTorch loader accepts: files, hub ids, fingerprints; every mistake by its message."""

import os
import subprocess
import sys
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


def test_another_text_encoder_is_an_error_unless_forced(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder)
    right = loader.text_encoder_sha256(pipe.text_encoder)
    loader.load_catversion(
        pipe, write(tmp_path, "right", "cat", make_residual(15), text_encoder_sha256=right)
    )
    wrong = write(
        tmp_path,
        "wrong",
        "cat",
        make_residual(15),
        text_encoder_sha256="0" * 64,
        base_model="some/model",
    )
    with pytest.raises(loader.CatVersionLoadError, match=r"000000000000 of some/model.*force=True"):
        loader.load_catversion(pipe, wrong)
    assert [c["name"] for c in loader.list_catversion(pipe)] == ["right"]
    assert loader.load_catversion(pipe, wrong, force=True) == "wrong"


def test_bfloat16_encoder_cannot_be_checked(tiny_sd_folder, tmp_path):
    pipe = load_pipe(tiny_sd_folder, dtype=torch.bfloat16)
    file = write(tmp_path, "tom", "cat", make_residual(16), text_encoder_sha256="0" * 64)
    with pytest.warns(UserWarning, match="cannot be checked in torch.bfloat16"):
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
from catversion_jax.integrations.diffusers import _resolve_file, CatVersionLoadError
for name in ("user/repo", "user/repo/rex", "user/repo/rex/catversion.safetensors"):
    print(_resolve_file(name, None).relative_to(CACHE).as_posix())
try:
    _resolve_file("user/other", None)
except CatVersionLoadError as error:
    print(error)
""".replace("CACHE", repr(str(snapshot)))
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
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
        "rex/catversion.safetensors",
        "rex/catversion.safetensors",
    ]
    assert message.startswith(
        "user/other: no such file here, and no catversion.safetensors in a hub repository"
    )
