"""The authors' adapters: published files, files torch writes in their layout, and files that must
be refused.
"""

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.official_adapter import import_official_concept

PUBLISHED = Path(__file__).resolve().parent / "data" / "official_adapters"
LAYER_KEY = (
    "text_model.encoder.layers.{}.self_attn.prefix_tuning.pool.prefix_tunings.prefix_tuning1."
    "clip_text_model_self_prefix.control_trans"
)
POOL_KEY = "prefix_tuning.prefix_tunings.prefix_tuning1.clip_text_model_self_prefix.control_trans"


@pytest.fixture
def torch():
    return pytest.importorskip(
        "torch", reason="the files are written by torch: pip install '.[test]'"
    )


def state_dict(vector, layers: tuple) -> dict:
    return {**{LAYER_KEY.format(i): vector for i in layers}, POOL_KEY: vector}


def config(prefix_length: int, hidden_size: int) -> str:
    return json.dumps(
        {"config": {"prefix_length": prefix_length, "flat": True}, "hidden_size": hidden_size}
    )


@pytest.mark.parametrize("name", ["teddybear", "colorful_teapot"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_published_concepts(name: str, as_folder: bool, torch) -> None:
    folder = PUBLISHED / name
    file = folder / "pytorch_adapter.bin"
    residual = import_official_concept(folder if as_folder else file)
    assert residual.key.shape == residual.value.shape == (3, 1, 12, 64)
    assert residual.key.dtype == residual.value.dtype == np.float32
    assert residual.layers == (9, 10, 11)
    assert residual.logit_bias == 1.0
    flat = torch.load(file, map_location="cpu", weights_only=True)[POOL_KEY]
    slots = flat.view(1, 6, 12, 64).numpy()
    for index in range(3):
        np.testing.assert_array_equal(residual.key[index], slots[:, 2 * index])
        np.testing.assert_array_equal(residual.value[index], slots[:, 2 * index + 1])


@pytest.mark.parametrize(
    ("positions", "heads", "head_dim", "layers"),
    [
        (1, 12, 64, (9, 10, 11)),
        (2, 16, 64, (20, 21, 22)),
        (5, 4, 8, (1, 2)),
        (1, 4, 8, (0,)),
        (3, 12, 64, (10, 11)),
    ],
)
def test_layout_is_the_authors_view(
    tmp_path: Path, torch, positions, heads, head_dim, layers
) -> None:
    width = heads * head_dim
    flat = torch.randn(positions * 2 * len(layers) * width)
    torch.save(state_dict(flat, layers), tmp_path / "pytorch_adapter.bin")
    (tmp_path / "adapter_config.json").write_text(config(positions, width))
    residual = import_official_concept(tmp_path, heads)
    # The authors' forward: control_trans.view(P, 2 L, heads, head_dim).permute(1, 2, 0, 3).split(2)
    pairs = flat.view(positions, 2 * len(layers), heads, head_dim).permute(1, 2, 0, 3).split(2)
    assert residual.layers == layers
    for index, pair in enumerate(pairs):
        # [P N H]
        np.testing.assert_array_equal(residual.key[index], pair[0].transpose(0, 1).numpy())
        np.testing.assert_array_equal(residual.value[index], pair[1].transpose(0, 1).numpy())


@pytest.mark.parametrize("positions", [1, 2, 5])
def test_positions_from_the_vector_when_there_is_no_config(
    tmp_path: Path, torch, positions: int
) -> None:
    torch.save(state_dict(torch.randn(positions * 6 * 768), (9, 10, 11)), tmp_path / "any_name.bin")
    assert import_official_concept(tmp_path / "any_name.bin").key.shape == (3, positions, 12, 64)
    torch.save(state_dict(torch.randn(6 * 32), (1, 2, 3)), tmp_path / "small.bin")
    assert import_official_concept(tmp_path / "small.bin", 4).key.shape == (3, 1, 4, 8)
    torch.save(state_dict(torch.randn(positions * 6 * 32), (1, 2, 3)), tmp_path / "told.bin")
    told = import_official_concept(tmp_path / "told.bin", 4, prefix_length=positions)
    assert told.key.shape == (3, positions, 4, 8)


def test_layers_in_any_order_of_keys(tmp_path: Path, torch) -> None:
    flat = torch.randn(6 * 768)
    entries = list(state_dict(flat, (9, 10, 11)).items())
    torch.save(collections.OrderedDict(reversed(entries)), tmp_path / "a.bin")
    residual = import_official_concept(tmp_path / "a.bin")
    assert residual.layers == (9, 10, 11)
    np.testing.assert_array_equal(residual.key[0], flat.view(1, 6, 12, 64)[:, 0].numpy())


def test_a_view_into_a_larger_storage(tmp_path: Path, torch) -> None:
    storage = torch.randn(2, 6 * 768)
    torch.save(state_dict(storage[1], (9, 10, 11)), tmp_path / "a.bin")
    residual = import_official_concept(tmp_path / "a.bin")
    np.testing.assert_array_equal(residual.value[2], storage[1].view(1, 6, 12, 64)[:, 5].numpy())


class Malicious:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_the_pickle_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    flag = tmp_path / "ran"
    data = pickle.dumps({LAYER_KEY.format(9): Malicious(flag)}, protocol=protocol)
    with zipfile.ZipFile(tmp_path / "pytorch_adapter.bin", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(
        CatVersionError, match=r"asks for (posix|os|nt)\.system.*refused, nothing was run"
    ):
        import_official_concept(tmp_path)
    assert not flag.exists()
    pickle.loads(data)  # the trap itself works
    assert flag.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch._utils _rebuild_parameter", "collections defaultdict"]
)
def test_every_other_name_is_refused(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CatVersionError, match=f"asks for {module}.{attribute}"):
        import_official_concept(tmp_path / "a.bin")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int64"])
def test_other_number_types_are_refused(tmp_path: Path, torch, dtype: str) -> None:
    torch.save(
        state_dict(torch.zeros(6 * 768, dtype=getattr(torch, dtype)), (9, 10, 11)),
        tmp_path / "a.bin",
    )
    with pytest.raises(CatVersionError, match=r"stored as torch\.\w+Storage; must be float32"):
        import_official_concept(tmp_path / "a.bin")


def test_old_torch_files_are_refused_with_the_remedy(tmp_path: Path, torch) -> None:
    vector = torch.zeros(6 * 768)
    torch.save(
        state_dict(vector, (9, 10, 11)), tmp_path / "a.bin", _use_new_zipfile_serialization=False
    )
    with pytest.raises(
        CatVersionError, match=r"before 1\.6.*torch\.save\(torch\.load\(file, weights_only=True"
    ):
        import_official_concept(tmp_path / "a.bin")


def test_truncated_and_damaged_archives(tmp_path: Path, torch) -> None:
    file = tmp_path / "a.bin"
    torch.save(state_dict(torch.randn(6 * 768), (9, 10, 11)), file)
    data = file.read_bytes()
    for length in (0, 3, 100, len(data) // 2, len(data) - 10):
        file.write_bytes(data[:length])
        with pytest.raises(CatVersionError, match="not a complete PyTorch zip file"):
            import_official_concept(file)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1  # inside the stored numbers: the archive's checksum sees it
    file.write_bytes(flipped)
    with pytest.raises(CatVersionError, match=r"not a complete PyTorch zip file.*CRC"):
        import_official_concept(file)


def test_a_missing_storage_and_a_cut_pickle(tmp_path: Path, torch) -> None:
    file = tmp_path / "a.bin"
    torch.save(state_dict(torch.randn(6 * 768), (9, 10, 11)), file)
    with zipfile.ZipFile(file) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", members["data.pkl"])
    with pytest.raises(CatVersionError, match="archive/data/0 is missing"):
        import_official_concept(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", members["data.pkl"][:-20])
    with pytest.raises(CatVersionError, match="its pickle is damaged"):
        import_official_concept(file)


def test_what_is_not_one_flat_adapter(tmp_path: Path, torch) -> None:
    vector, file = torch.randn(6 * 768), tmp_path / "a.bin"
    cases = [
        ({POOL_KEY: vector}, "must hold one flat"),
        (
            {**state_dict(vector, (9, 10, 11)), "gate.weight": torch.zeros(3)},
            r"holds gate\.weight; must hold one flat",
        ),
        (
            {**state_dict(vector, (9, 10, 11)), LAYER_KEY.format(10): vector + 1},
            "differs from that of",
        ),
        (state_dict(vector * float("nan"), (9, 10, 11)), "NaN or infinite"),
        (state_dict(vector[:-1].clone(), (9, 10, 11)), "a vector of 4607 numbers for 3 layers"),
        (vector, "not a table of named tensors"),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(CatVersionError, match=message):
            import_official_concept(file)
    torch.save(state_dict(vector, (9, 10, 11)), file)
    (tmp_path / "adapter_config.json").write_text(config(2, 768))
    with pytest.raises(CatVersionError, match="prefix_length=2, hidden_size=768, num_heads=12"):
        import_official_concept(file)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CatVersionError, match=r"adapter_config\.json: is not valid JSON"):
        import_official_concept(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CatVersionError, match=r"cannot be read.*pytorch_adapter\.bin"):
        import_official_concept(tmp_path)
