"""Model folders of strangers: every value of every configuration replaced by others, headers of
weights, names that are paths, tokenizers. A folder is used or refused with one message, soon.
"""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import transformers
from torch_reference import SDXL_UNET

from catversion_jax.diffusion import NoiseScheduleConfig
from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.pipeline_folder import export_pipeline
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.clip.text import CLIPTextConfig
from catversion_jax.models.clip.text_projection import CLIPTextWithProjectionConfig
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.clip.vision import CLIPConfig
from catversion_jax.models.lone_text_encoder import load_text_encoder
from catversion_jax.models.stable_diffusion import abstract_backbone
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.vae import VAEConfig
from catversion_jax.models.vit import ViTConfig
from catversion_jax.models.weights.hf_config import read_config
from catversion_jax.models.weights.hub import locate_model
from catversion_jax.models.weights.safetensors_files import open_checkpoint, read_header

SECONDS = 5
READERS = {
    "text_encoder": CLIPTextConfig.from_hf,
    "text encoder with projection": CLIPTextWithProjectionConfig.from_hf,
    "unet": UNetConfig.from_hf,
    "unet of XL": UNetConfig.from_hf,
    "vae": VAEConfig.from_hf,
    "clip": CLIPConfig.from_hf,
    "vit": ViTConfig.from_vit,
    "scheduler": lambda config, source: NoiseScheduleConfig.from_scheduler_config(config),
}
VALUES = [
    *(10**9, 10**400, -1, 0, 1, 2, 1.5, float("nan"), float("inf"), -float("inf")),
    *("x", "12", "", "x" * 10_000, True, False, None, [], [1], [1, 2, 3], ["x"], [[[1]]], [None]),
    *({}, {"a": 1}, [10**9] * 3, [-1, 0, 1], [True] * 3, ["CrossAttnDownBlock2D"] * 1000),
]


def config_of(embedded_model: Path, component: str) -> dict:
    if component == "vit":
        sizes = {"hidden_size": 192, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
        counts = {"num_hidden_layers": 2, "num_attention_heads": 3, "num_channels": 3}
        rest = {"hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6}
        return {"model_type": "vit", **sizes, **counts, **rest}
    if component == "text encoder with projection":
        return config_of(embedded_model, "text_encoder") | {"projection_dim": 24}
    if component == "unet of XL":
        return SDXL_UNET
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return json.loads((embedded_model / component / name).read_text())


def read_or_refuse(read, config: dict) -> tuple[object, str]:
    try:
        return read(config, source="config.json"), ""
    except CatVersionError as error:
        return None, str(error)


def whole_numbers(value: object) -> list[int]:
    """All integers in a configuration and in the tuples and configurations inside it."""
    if isinstance(value, int):
        return [value]
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return [number for part in parts for number in whole_numbers(part)]


@pytest.mark.parametrize("component", READERS)
def test_every_value_is_used_or_refused(embedded_model, component):
    """What is used is small: no layer, channel or step count beyond what its range allows. Nothing
    large is made on the way to a refusal either.
    """
    good, read = config_of(embedded_model, component), READERS[component]
    read(good, source="config.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    for key in [*good, "a_key_that_nobody_knows"]:
        for value in VALUES:
            made, message = read_or_refuse(read, {**good, key: value})
            assert len(message) < 2000, (key, value)
            assert all(abs(number) <= 2**22 for number in whole_numbers(made)), (key, value)
    assert time.monotonic() - start < SECONDS
    # kB on Linux; a byte for each of 10**9 would be more
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


SIZES = {
    "text_encoder": {"num_hidden_layers": 10**9, "hidden_size": 10**9, "vocab_size": -1},
    "unet": {"layers_per_block": 10**9, "block_out_channels": [10**9] * 3, "sample_size": 10**9},
    "vae": {
        "layers_per_block": 10**9,
        "latent_channels": 10**9,
        "in_channels": 4,
        "scaling_factor": float("nan"),
    },
    "scheduler": {"num_train_timesteps": 10**9, "beta_start": float("nan"), "trained_betas": "x"},
}


@pytest.fixture
def model(embedded_model, tmp_path) -> Path:
    """A copy of a model's configurations, without weights."""
    ignore = shutil.ignore_patterns("*.safetensors", "clip")
    return Path(shutil.copytree(embedded_model, tmp_path / "model", ignore=ignore))


def rewrite(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("component", "key"), [(name, key) for name, values in SIZES.items() for key in values]
)
def test_a_folder_with_a_wrong_size_is_refused_at_once(model, component, key):
    (file,) = (model / component).glob("*config.json")
    rewrite(file, **{key: SIZES[component][key]})
    start = time.monotonic()
    with pytest.raises(CatVersionError, match=key):
        abstract_backbone(model)
    assert time.monotonic() - start < SECONDS


NOT_CONFIGURATIONS = {
    "empty": b"",
    "deep": b"[" * 1_000_000,
    "deep object": b'{"a":' * 200_000,
    "digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "latin": b'{"a": "\xe9"}',
    "array": b"[]",
    "null": b"null",
    "zeros": bytes(1000),
    "large": b'{"a": "' + b"x" * 20_000_000 + b'"}',
}


@pytest.mark.parametrize("case", NOT_CONFIGURATIONS)
def test_files_that_are_no_configuration(tmp_path, case):
    (tmp_path / "config.json").write_bytes(NOT_CONFIGURATIONS[case])
    with pytest.raises(CatVersionError, match=r"config\.json: ") as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 1000


def link_to_nothing(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_nothing])
def test_things_that_are_no_file(tmp_path, make):
    make(tmp_path / "config.json")
    make(tmp_path / "model.safetensors")
    with pytest.raises(CatVersionError, match=r"not a regular file|not found"):
        read_config(tmp_path)
    with pytest.raises(CatVersionError, match="not a regular file"):
        open_checkpoint(tmp_path)


# ---- model_index.json ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"../secret": ["diffusers", "X"]}, {"/etc": ["diffusers", "X"]}, {"..": ["a", "b"]},
        {"a/b": ["diffusers", "X"]}, {"a\\b": ["diffusers", "X"]}, {"": ["diffusers", "X"]},
        {"a\nb": [None, None]}, {"~": [None, None]}, {"x" * 5000: [None, None]},
        {"extra": ["../x", "X"]}, {"extra": ["diffusers"]}, {"extra": [1, 2]}, {"extra": []},
        {"extra": ["diffusers", {"a": 1}]}, {"unet": 5}, {"unet": "UNet2DConditionModel"},
        {"unet": {}}, {"text_encoder_2": 5}, {"text_encoder_2": []},
    ],
)  # fmt: skip
def test_names_in_model_index(model, entry):
    rewrite(model / "model_index.json", **entry)
    with pytest.raises(CatVersionError, match=r"model_index\.json: ") as caught:
        locate_model(model)
    assert len(str(caught.value)) < 1000


@pytest.fixture
def concept() -> Concept:
    pair = np.ones((2, 1, 1, 5, 32), np.float32)
    return Concept(KVResidual(*pair, (0,)), "cat", "tom")


def test_export_reads_no_path_from_model_index(model, concept, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    rewrite(model / "model_index.json", **{"../secret": ["diffusers", "X"]})
    with pytest.raises(CatVersionError, match="must be a plain name"):
        export_pipeline(tmp_path / "out", model, [concept])
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


def test_export_says_which_links_leave_the_model(model, concept, tmp_path, caplog):
    outside, shared = tmp_path / "outside", model / "shared.json"
    outside.write_text("secret")
    shared.write_text("{}")
    (model / "unet/notes.json").symlink_to(outside)
    (model / "vae/shared.json").symlink_to(shared)
    (model / "vae/broken.json").symlink_to(tmp_path / "nowhere")
    export_pipeline(tmp_path / "out", model, [concept])
    assert f"unet/notes.json -> {outside}" in caplog.text
    assert "vae" not in caplog.text
    for copy in ("unet/notes.json", "vae/shared.json"):
        assert (tmp_path / "out" / copy).is_file()
        assert not (tmp_path / "out" / copy).is_symlink()
    assert not os.path.lexists(tmp_path / "out/vae/broken.json")


def test_export_of_a_hub_cache_has_nothing_to_say(embedded_model, concept, tmp_path, caplog):
    """Every file of a snapshot is a link to its blob."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for file in sorted(embedded_model.rglob("*.json")):
        blob, link = (
            blobs / str(len(list(blobs.iterdir()))),
            snapshot / file.relative_to(embedded_model),
        )
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    export_pipeline(tmp_path / "out", snapshot, [concept])
    assert not caplog.records


def test_export_of_a_link_to_a_whole_disk_ends(model, concept, tmp_path):
    many = tmp_path / "disk"
    for number in range(1100):
        (many / str(number % 10)).mkdir(parents=True, exist_ok=True)
        (many / str(number % 10) / str(number)).touch()
    shutil.rmtree(model / "vae")
    (model / "vae").symlink_to(many)
    with pytest.raises(CatVersionError, match="more than 1000 files"):
        export_pipeline(tmp_path / "out", model, [concept])


# ---- headers of weights --------------------------------------------------------------------------


def with_header(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


GOOD = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
HEADERS = {
    "list": [], "text": "x", "number": 5, "entry": {"a": []}, "entry text": {"a": "x"},
    "null": {"a": None}, "empty": {"a": {}}, "no dtype": {"a": {**GOOD, "dtype": None}},
    "dtype list": {"a": {**GOOD, "dtype": ["F32"]}}, "dtype": {"a": {**GOOD, "dtype": "F4"}},
    "negative": {"a": {**GOOD, "shape": [-4, -4]}}, "float": {"a": {**GOOD, "shape": [4.0, 4]}},
    "bool": {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    "nested": {"a": {**GOOD, "shape": [[4], 4]}}, "shape text": {"a": {**GOOD, "shape": "44"}},
    "overflow": {"a": {**GOOD, "shape": [2**32, 2**32, 0x10], "data_offsets": [0, 0]}},
    "overflow of bytes": {"a": {"dtype": "F64", "shape": [2**61], "data_offsets": [0, 0]}},
    "before": {"a": {**GOOD, "data_offsets": [-64, 0]}},
    "reversed": {"a": {**GOOD, "data_offsets": [64, 0]}},
    "after": {"a": {**GOOD, "data_offsets": [64, 128]}},
    "one offset": {"a": {**GOOD, "data_offsets": [64]}},
    "three offsets": {"a": {**GOOD, "data_offsets": [0, 64, 64]}},
    "text offsets": {"a": {**GOOD, "data_offsets": ["0", "64"]}},
    "twice": b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2),
    "deep": b"[" * 500_000, "digits": b'{"a":' + b"9" * 5000 + b"}", "latin": b'{"\xe9":1}',
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path, case):
    path = with_header(tmp_path / "model.safetensors", HEADERS[case])
    with pytest.raises(CatVersionError, match=r"model\.safetensors: ") as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000
    if case != "twice":  # of which the library keeps one
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(path)


def test_good_headers_are_read(tmp_path):
    tensors = {
        "a": np.ones((4, 4), np.float32),
        "b": np.zeros((0, 3), np.float16),
        "c": np.int64(3),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({k: np.asarray(v) for k, v in tensors.items()}, path)
    read = {name: np.asarray(stored) for name, stored in read_header(path).items()}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_weights_that_are_no_floats(embedded_model, tmp_path, dtype):
    folder = Path(shutil.copytree(embedded_model / "text_encoder", tmp_path / "text_encoder"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("fc1.weight"))
    tensors[name] = tensors[name].astype(dtype)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CatVersionError, match=rf"fc1\.weight holds {np.dtype(dtype)}"):
        load_text_encoder(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63 - 1, 2**64 - 1])
def test_lengths_of_headers(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(CatVersionError, match="not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    "weight_map",
    [
        None, [], "x", {}, {"a": 5}, {"a": ["x.safetensors"]}, {"a": None}, {"a": ""},
        {"a": "../outside.safetensors"}, {"a": "/outside.safetensors"}, {"a": "x.bin"},
        {"a": "b/x.safetensors"}, {"a": "..\\outside.safetensors"}, {"a": ".safetensors"},
    ],
)  # fmt: skip
def test_shards_are_plain_names(tmp_path, weight_map):
    folder = tmp_path / "unet"
    folder.mkdir()
    with_header(tmp_path / "outside.safetensors", {"a": GOOD})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CatVersionError, match="not an index of shards"):
        open_checkpoint(folder)


# ---- tokenizers ----------------------------------------------------------------------------------

TOKENIZERS = {
    "empty vocabulary": ("vocab.json", "{}"),
    "list": ("vocab.json", "[]"),
    "texts": ("vocab.json", '{"a": "b"}'),
    "negative ids": ("vocab.json", '{"a</w>": -1, "<|startoftext|>": -2, "<|endoftext|>": -3}'),
    "huge ids": ("vocab.json", '{"a</w>": 1e9, "<|startoftext|>": 1, "<|endoftext|>": 2}'),
    "no specials": ("vocab.json", '{"a</w>": 0}'),
    "beyond": ("vocab.json", '{"a</w>": 4000000, "<|startoftext|>": 1, "<|endoftext|>": 2}'),
    "no merges": ("merges.txt", "one two three four\nx"),
    "length text": ("tokenizer_config.json", '{"model_max_length": "77"}'),
    "length list": ("tokenizer_config.json", '{"model_max_length": [77]}'),
    "length 0": ("tokenizer_config.json", '{"model_max_length": 0}'),
    "length -1": ("tokenizer_config.json", '{"model_max_length": -1}'),
    "length NaN": ("tokenizer_config.json", '{"model_max_length": NaN}'),
    "length too large": ("tokenizer_config.json", '{"model_max_length": 999}'),
    "length true": ("tokenizer_config.json", '{"model_max_length": true}'),
    "tokens": ("tokenizer_config.json", '{"eos_token": 5, "bos_token": {"a": 1}}'),
    "array": ("tokenizer_config.json", "[]"),
    "deep": ("tokenizer_config.json", "[" * 100_000),
    "special tokens": ("special_tokens_map.json", "[" * 100_000),
    "tokenizer.json": ("tokenizer.json", '{"version": "9", "model": {"type": "BPE"}}'),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(embedded_model, embedded_vocabulary, tmp_path, case):
    folder = Path(shutil.copytree(embedded_model / "tokenizer", tmp_path / "tokenizer"))
    name, text = TOKENIZERS[case]
    (folder / name).write_text(text)
    start = time.monotonic()
    with pytest.raises(CatVersionError, match="tokenizer") as caught:
        Tokenizer.from_folder(folder, context=32, vocab_size=embedded_vocabulary)
    assert time.monotonic() - start < SECONDS
    assert len(str(caught.value)) < 1000


def test_merges_that_were_not_downloaded_to_the_end(embedded_model, tmp_path):
    """What is left is a file in order, and every prompt would be other tokens."""
    folder = Path(shutil.copytree(embedded_model / "tokenizer", tmp_path / "tokenizer"))
    lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(lines[: len(lines) * 9 // 10]))
    loaded = transformers.CLIPTokenizer.from_pretrained(folder)
    assert loaded("a teapot").input_ids  # nobody else says anything
    with pytest.raises(CatVersionError, match=r"merges\.txt is cut off"):
        Tokenizer.from_folder(folder, context=32)
