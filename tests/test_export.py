"""Concept files: the safetensors library reads what we write, bytes repeat, damage and strangers
are named.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import (
    Concept,
    load_concept,
    save_concept,
    write_concepts,
)
from catversion_jax.methods.residual import KVResidual
from catversion_jax.runtime.safetensors_bytes import serialize_safetensors

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = {
    "base_class": "toy car",
    "name": "räuber ümläut",
    "when": "always",
    "base_model": "some/model",
    "text_encoder_sha256": "ab" * 32,
    "step": 250,
    "config": {"resolution": 512, "learning_rate": 0.01, "seed": 3},
    "images": ("b.jpg", "a.jpg"),
    "metrics": {"loss": 0.25},
}


def make_residual(
    seed: int = 0, shape: tuple = (2, 3, 4, 8), layers: tuple = (3, 11), bias: float = 0.5
) -> KVResidual:
    rng = np.random.default_rng(seed)
    return KVResidual(
        rng.normal(size=shape).astype(np.float32),
        rng.normal(size=shape).astype(np.float32),
        layers,
        bias,
    )


def test_load_is_the_inverse_of_save(tmp_path: Path) -> None:
    residual = make_residual()
    path = save_concept(tmp_path / "new" / "folder" / "x.safetensors", residual, **DESCRIPTION)
    concept = load_concept(path)
    np.testing.assert_array_equal(concept.learned.key, residual.key)
    np.testing.assert_array_equal(concept.learned.value, residual.value)
    assert (concept.learned.layers, concept.learned.logit_bias) == ((3, 11), 0.5)
    for field in (
        "base_class",
        "name",
        "when",
        "base_model",
        "text_encoder_sha256",
        "step",
        "images",
        "metrics",
    ):
        assert getattr(concept, field) == DESCRIPTION[field]
    assert concept.train_config == DESCRIPTION["config"]
    again = concept.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    before = save_concept(tmp_path / "before.safetensors", residual=residual, **DESCRIPTION)
    assert before.read_bytes() == path.read_bytes()
    with pytest.raises(TypeError, match="learned"):
        save_concept(tmp_path / "nothing.safetensors", **DESCRIPTION)


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    residual = make_residual()
    path = save_concept(tmp_path / "x.safetensors", residual, **DESCRIPTION)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert set(tensors) == {"layers.3.key", "layers.3.value", "layers.11.key", "layers.11.value"}
    for index, layer in enumerate(residual.layers):
        np.testing.assert_array_equal(tensors[f"layers.{layer}.key"], residual.key[index])
        np.testing.assert_array_equal(tensors[f"layers.{layer}.value"], residual.value[index])
    assert metadata["format"] == "pt"
    assert metadata["catversion.layers"] == "[3,11]"
    assert metadata["catversion.num_positions"] == "3"
    assert metadata["catversion.logit_bias"] == "0.5"
    assert metadata["catversion.num_images"] == "2"
    assert metadata["catversion.name"] == "räuber ümläut"
    assert json.loads(metadata["catversion.train_config"]) == DESCRIPTION["config"]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.trigger_phrase"] == "toy car"
    assert metadata["modelspec.resolution"] == "512x512"
    data = path.read_bytes()
    # of all after the header
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert metadata["modelspec.hash_sha256"] == "0x" + digest


def test_no_last_axis_looks_like_a_word_embedding(tmp_path: Path) -> None:
    path = save_concept(
        tmp_path / "x.safetensors",
        make_residual(shape=(1, 1, 12, 64), layers=(9,)),
        base_class="cat",
    )
    assert all(tensor.shape == (1, 12, 64) for tensor in safetensors.numpy.load_file(path).values())
    assert load_concept(path).metadata["modelspec.architecture"] == "stable-diffusion-v1/catversion"


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests'); from test_export import *; "
        "save_concept(sys.argv[1], make_residual(), **DESCRIPTION)"
    )
    files = [tmp_path / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, file in enumerate(files):
        subprocess.run(
            [sys.executable, "-c", program, str(file)],
            cwd=ROOT,
            check=True,
            env={
                "PYTHONHASHSEED": str(seed),
                "PATH": "",
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
            },
        )
    assert len({file.read_bytes() for file in files}) == 1
    assert (
        files[0].read_bytes()
        == save_concept(tmp_path / "x", make_residual(), **DESCRIPTION).read_bytes()
    )


def test_odd_file_names_do_not_make_an_unreadable_file(tmp_path: Path) -> None:
    path = save_concept(
        tmp_path / "x.safetensors", make_residual(), base_class="cat", images=("bad\udcff.jpg",)
    )
    assert len(load_concept(path).images) == 1


def test_a_folder_is_accepted(tmp_path: Path) -> None:
    save_concept(tmp_path / "catversion.safetensors", make_residual(), base_class="cat")
    assert load_concept(tmp_path).base_class == "cat"


@pytest.mark.parametrize(
    ("residual", "kwargs", "message"),
    [
        (make_residual(shape=(2, 2, 1, 4, 8)), {}, "one concept"),
        (make_residual(layers=(1, 2, 3)), {}, "for 3 layers"),
        (
            KVResidual(np.full((1, 1, 1, 2), np.nan), np.zeros((1, 1, 1, 2)), (0,)),
            {},
            "NaN or infinite",
        ),
        (make_residual(bias=-np.inf), {}, "NaN or infinite"),
        (make_residual(), {"base_class": " "}, "base_class=' '"),
        (make_residual(), {"when": "never"}, "when='never': must be one of class_word, always"),
    ],
)
def test_what_is_not_written(
    tmp_path: Path, residual: KVResidual, kwargs: dict, message: str
) -> None:
    with pytest.raises(CatVersionError, match=message):
        save_concept(tmp_path / "x.safetensors", residual, **{"base_class": "cat", **kwargs})
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatVersionError, match=r"cannot be written.*writable folder"):
        save_concept(tmp_path / "file" / "x.safetensors", make_residual(), base_class="cat")


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = save_concept(tmp_path / "x.safetensors", make_residual(1), base_class="cat")
    before = path.read_bytes()
    program = """
import resource, signal, sys
sys.path.insert(0, 'tests')
from test_export import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# no file may grow beyond: a write fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_concept(sys.argv[1], make_residual(2), base_class="cat")
except CatVersionError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in result.stdout
    assert "free some space" in result.stdout
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def with_metadata(path: Path, **changes: str | None) -> Path:
    """The same tensors with some metadata changed or removed."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    metadata |= {f"catversion.{key}": value for key, value in changes.items() if value is not None}
    for key in [key for key, value in changes.items() if value is None]:
        del metadata[f"catversion.{key}"]
    path.write_bytes(serialize_safetensors(safetensors.numpy.load_file(path), metadata))
    return path


def test_no_length_of_the_header_looks_like_a_pickle(tmp_path: Path) -> None:
    """The file starts with that length, a pickle with 0x80."""
    firsts = set()
    for length in range(0, 256, 8):
        path = save_concept(
            tmp_path / "x.safetensors", make_residual(), base_class="car", name="x" * (1 + length)
        )
        firsts.add(path.read_bytes()[0])
        load_concept(path)
    assert 0x80 in firsts


@pytest.mark.parametrize("version", [1, 2])
def test_only_what_an_older_reader_would_misread_has_the_newer_version(
    tmp_path: Path, version: int
) -> None:
    residual = dataclasses.replace(
        make_residual(), scope="all" if version == 1 else "from_class_word"
    )
    path = save_concept(tmp_path / "x.safetensors", residual, base_class="car")
    concept = load_concept(path)
    assert concept.metadata["catversion.format_version"] == str(version)
    assert concept.learned.scope == residual.scope


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "5"}, r"format version 5; this program reads up to 4.*Update"),
        ({"base_class": None}, r"damaged \(missing 'catversion|damaged \(missing 'base_class'"),
        ({"layers": "[3,4]"}, r"damaged \(missing 'layers.4.key'"),
        ({"layers": "three"}, "damaged"),
        ({"num_heads": "5"}, r"key is of shape \(3, 4, 8\), the header says \(3, 5, 8\)"),
        ({"when": "never"}, "when='never'"),
    ],
)
def test_inconsistent_header(tmp_path: Path, changes: dict, message: str) -> None:
    path = save_concept(tmp_path / "x.safetensors", make_residual(), base_class="cat")
    with pytest.raises(CatVersionError, match=message):
        load_concept(with_metadata(path, **changes))


def test_truncated_and_corrupt(tmp_path: Path) -> None:
    path = save_concept(tmp_path / "x.safetensors", make_residual(), base_class="cat")
    data = path.read_bytes()
    for length in (0, 7, 8, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(
            CatVersionError, match=r"damaged or incomplete|too short|something else"
        ):
            load_concept(path)
    flipped = bytearray(data)
    flipped[-3] ^= 16
    path.write_bytes(flipped)
    with pytest.raises(CatVersionError, match="checksum"):
        load_concept(path)
    path.write_bytes(data[:8] + b"{" + b"\xff" * 50 + data[59:])
    with pytest.raises(CatVersionError, match="damaged or incomplete"):
        load_concept(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"unet.up.lora_A.weight": (4, 8)}, "LoRA.*load_lora_weights"),
        ({"<my-cat>": (1, 768)}, "textual inversion.*load_textual_inversion"),
        ({"emb_params": (2, 768)}, "textual inversion"),
        (
            {"model.diffusion_model.x": (1, 1, 1), "cond_stage_model.y": (2,)},
            "whole Stable Diffusion checkpoint",
        ),
        ({f"text_model.encoder.layers.{i}.x": (2, 2) for i in range(6)}, "weights of a network"),
        ({"prompt_embeds": (1, 7, 8)}, "prompt embeddings"),
        ({"something": (1, 2, 3)}, "without catversion metadata .it holds something."),
    ],
)
def test_other_safetensors_are_recognised(tmp_path: Path, names: dict, message: str) -> None:
    tensors = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CatVersionError, match=f"not a concept file but .*{message}"):
        load_concept(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + b"x" * 50, "catversion import FILE"),
        (b"\x80\x02" + b"x" * 50, "old PyTorch"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "something else than safetensors"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CatVersionError, match=message):
        load_concept(tmp_path / "x")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CatVersionError, match=r"cannot be read.*catversion\.safetensors"):
        load_concept(tmp_path)


def test_write_concepts_names_files_safely(tmp_path: Path) -> None:
    concepts = [
        Concept(make_residual(i), "cat", name)
        for i, name in enumerate(("tom", "../up one", "käse"))
    ]
    files = write_concepts(concepts, tmp_path)
    assert [file.name for file in files] == [
        "tom.safetensors",
        "up_one.safetensors",
        "käse.safetensors",
    ]
    assert [load_concept(file).name for file in files] == ["tom", "../up one", "käse"]
    with pytest.raises(CatVersionError, match="would hold both 'a b' and 'a/b'"):
        write_concepts([Concept(make_residual(), "cat", name) for name in ("a b", "a/b")], tmp_path)
    with pytest.raises(CatVersionError, match="'Rex' and 'rex', at least where file names ignore"):
        write_concepts([Concept(make_residual(), "dog", name) for name in ("Rex", "rex")], tmp_path)
