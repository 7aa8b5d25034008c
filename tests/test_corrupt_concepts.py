"""Concept files that are whole but wrong: refused by every reader, with the tensor or value named.

Each file is written by the safetensors library, with a checksum that fits, from a good concept in
which one thing is changed.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.methods.token_embeddings import TokenEmbeddings
from catversion_jax.training.run.reader import read_trained

SHAPE = (1, 4, 8)


def read_with_torch(path: Path) -> None:
    pytest.importorskip("torch", reason="the loader is a PyTorch one")
    from catversion_jax.integrations.loaded_concept import parse_concept

    parse_concept(path.read_bytes(), str(path))


READERS = {"file": load_concept, "run": read_trained, "torch": read_with_torch}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


def good_concept(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    rng = np.random.default_rng(0)
    pair = (rng.normal(size=(2, *SHAPE)).astype(np.float32) for _ in range(2))
    save_concept(path, KVResidual(*pair, (2, 3), 0.5), base_class="cat")
    return dict(safetensors.numpy.load_file(path)), load_concept(path).metadata


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
    data = safetensors.numpy.save(tensors)
    body = data[8 + int.from_bytes(data[:8], "little") :]
    digest = "0x" + hashlib.sha256(body).hexdigest()
    data = safetensors.numpy.save(tensors, {**metadata, "modelspec.hash_sha256": digest})
    path.write_bytes(data)
    return path


def changed(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[5] = value
    return array


TENSORS = {  # what is changed, and what the message must name
    "nan": (lambda t: {"layers.3.key": changed(t["layers.3.key"], np.nan)}, r"layers\.3\.key.*NaN"),
    "inf": (
        lambda t: {"layers.2.value": changed(t["layers.2.value"], -np.inf)},
        r"layers\.2\.value.*infinite",
    ),
    "int64": (lambda t: {"layers.3.value": np.ones(SHAPE, np.int64)}, r"layers\.3\.value.*int64"),
    "half": (lambda t: {"layers.2.key": t["layers.2.key"].astype(np.float16)}, r"layers\.2\.key"),
    "shape": (lambda t: {"layers.2.key": np.ones((1, 8, 4), np.float32)}, r"layers\.2\.key"),
    "empty": (lambda t: {"layers.2.key": np.ones((0, 4, 8), np.float32)}, r"layers\.2\.key"),
    "more": (lambda t: {"layers.9.key": np.ones(SHAPE, np.float32)}, r"layers\.9\.key"),
    "missing": (lambda t: {"layers.3.key": None}, r"layers\.3\.key"),
}
METADATA = {
    "layers": [
        "[3,2]",
        "[2,2]",
        "[]",
        "[-1,2]",
        "[2.0,3]",
        "[true,3]",
        '["2","3"]',
        "{}",
        "2",
        "nan",
        "[" * 100_000,
        "[2,3",
        "",
    ],
    "logit_bias": ["nan", "inf", "-inf", "1e999", "one", ""],
    "num_positions": ["0", "-1", "1.0", "9" * 5000, "one", "²", ""],
    "num_heads": ["0", "5", "null"],
    "base_class": ["", "  "],
    "name": [""],
    "when": ["never", ""],
    "scope": ["some", ""],
    "class_forms": ["cats", '{"a":1}', "[1]", '[""]', "[" * 100_000],
    "format_version": ["0", "-1", "²", "5", "9" * 5000, "1.0", ""],
}
NAMED = {  # a number that does not fit the tensors is named as the tensor that it does not fit
    "num_positions": r"num_positions|tensor layers",
    "num_heads": r"num_heads|tensor layers",
    "format_version": "format version",
}
ONLY_OURS = {  # what the loader for PyTorch has no use for
    "step": ["-1", "many", "1e3", "9" * 5000],
    "images": ["{}", "[1]", "a.jpg", "[" * 100_000],
    "train_config": ["[]", "null", "5", "{"],
    "metrics": ["[]", "{" * 100_000],
    "method": ["", "lora"],
}


def test_the_unchanged_file_is_read(tmp_path, read):
    path = tmp_path / "x.safetensors"
    read(write(path, *good_concept(path)))


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_is_named(tmp_path, read, case):
    path = tmp_path / "x.safetensors"
    change, named = TENSORS[case]
    tensors, metadata = good_concept(path)
    tensors = {k: v for k, v in {**tensors, **change(tensors)}.items() if v is not None}
    with pytest.raises(ValueError, match=named) as caught:
        read(write(path, tensors, metadata))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", METADATA)
def test_value_is_named(tmp_path, read, key):
    path = tmp_path / "x.safetensors"
    tensors, metadata = good_concept(path)
    for value in METADATA[key]:
        write(path, tensors, {**metadata, f"catversion.{key}": value})
        with pytest.raises(ValueError, match=NAMED.get(key, key)) as caught:
            read(path)
        assert len(str(caught.value)) < 600, value


@pytest.mark.parametrize("key", ONLY_OURS)
def test_value_that_only_we_read_is_named(tmp_path, key):
    path = tmp_path / "x.safetensors"
    tensors, metadata = good_concept(path)
    for value in ONLY_OURS[key]:
        write(path, tensors, {**metadata, f"catversion.{key}": value})
        with pytest.raises(CatVersionError, match=key) as caught:
            load_concept(path)
        assert len(str(caught.value)) < 600, value


NEEDED = set(METADATA) - {"scope", "class_forms"} | {"step", "images", "train_config", "base_model"}


@pytest.mark.parametrize("key", sorted(NEEDED))
def test_missing_value_is_named(tmp_path, key):
    path = tmp_path / "x.safetensors"
    tensors, metadata = good_concept(path)
    del metadata[f"catversion.{key}"]
    with pytest.raises(CatVersionError, match=rf"missing '{key}'|without catversion metadata"):
        load_concept(write(path, tensors, metadata))


@pytest.mark.parametrize(
    ("vectors", "named"),
    [
        (np.full((1, 32), np.nan, np.float32), "<cat>.*NaN"),
        (np.ones((1, 32), np.int32), "<cat>.*int32"),
        (np.ones((2, 32), np.float32), "<cat>.*shape"),
    ],
)
def test_token_embeddings(tmp_path, vectors, named):
    path = tmp_path / "x.safetensors"
    save_concept(path, TokenEmbeddings(np.ones((1, 32), np.float32)), base_class="cat")
    metadata = load_concept(path).metadata
    with pytest.raises(CatVersionError, match=named):
        load_concept(write(path, {"<cat>": vectors}, metadata))
    with pytest.raises(CatVersionError, match="missing '<cat>'"):
        load_concept(write(path, {"other": np.ones((1, 32), np.float32)}, metadata))


def test_layers_beyond_the_encoder(tmp_path, tiny_sd_folder):
    """The file is right in itself; the encoder it is used with has four layers."""
    from catversion_jax.models.stable_diffusion import abstract_backbone
    from catversion_jax.sampling.requests import ConceptUse, check_concept

    residual = KVResidual(*np.ones((2, 2, *SHAPE), np.float32), (2, 40))
    path = save_concept(tmp_path / "x.safetensors", residual, base_class="cat")
    backbone = abstract_backbone(tiny_sd_folder)
    with pytest.raises(CatVersionError, match=r"up to number 40.*layers 0\.\.3"):
        check_concept(backbone, ConceptUse.of(load_concept(path)), {})
    pytest.importorskip("diffusers", reason="the loader is for diffusers")
    from tiny_pipelines import load_pipe

    from catversion_jax.integrations.diffusers import load_catversion

    with pytest.raises(ValueError, match="at least 41 layers"):
        load_catversion(load_pipe(tiny_sd_folder), path)


def test_metadata_of_other_types(tmp_path, read):
    """The format allows strings only; the safetensors library refuses to write anything else."""
    path = tmp_path / "x.safetensors"
    good_concept(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for metadata in (
        None,
        [],
        "text",
        {**header["__metadata__"], "catversion.layers": [2, 3]},
        {**header["__metadata__"], "catversion.base_class": {"a": 1}},
        {**header["__metadata__"], "catversion.format_version": 1},
    ):
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        with pytest.raises(ValueError, match=r"x\.safetensors: "):
            read(path)


def test_a_layer_that_is_there_twice(tmp_path, read):
    """The library keeps one of two tensors of the same name."""
    path = tmp_path / "x.safetensors"
    good_concept(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)["layers.2.key"]).encode()
    twice = header[:-1] + b',"layers.2.key":' + entry + b"}"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    with pytest.raises(ValueError, match=r"layers\.2\.key.*twice"):
        read(path)


def test_neither_file_nor_folder_and_whole_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CatVersionError, match="neither a file nor a folder"):
        load_concept(tmp_path / "pipe")
    header = json.dumps(
        {
            "model.diffusion_model.x": {
                "dtype": "U8",
                "shape": [2**29, 1, 1],
                "data_offsets": [0, 2**29],
            }
        }
    ).encode()
    with (tmp_path / "large").open("wb") as file:  # sparse: nothing is written but the header
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**29)
    with pytest.raises(CatVersionError, match="whole Stable Diffusion checkpoint"):
        load_concept(tmp_path / "large")
