"""Adapters of the authors' code made to cost memory or time, or of the wrong types: refused within
bounds that the size of the file gives.
"""

import json
import pickle
import re
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.official_adapter import import_official_concept

PUBLISHED = Path(__file__).resolve().parent / "data" / "official_adapters" / "teddybear"
KEY = "layers.{}.control_trans"
MEMORY, SECONDS = 150e6, 5


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(key: str, storage: str, count: int, offset: int = 0) -> bytes:
    identity = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(storage)
    identity += text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"
    shape = b"J" + struct.pack("<i", count) + b"\x85"
    arguments = (
        b"(" + identity + b"J" + struct.pack("<i", offset) + shape + b"K\x01\x85\x89" + b"}t"
    )
    return text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def table(*entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", program)
        for name, data in (storages or {}).items():
            file.writestr(f"a/data/{name}", data)
    return path


# A tuple of two times itself, forty times over: 2**40 leaves for who hashes, compares or prints it.
DOUBLED = b")" + b"".join(b"q\x05h\x05\x86" for _ in range(40))
HOSTILE = {
    "memo index": b"\x80\x02}" + put(2**31 - 1) + put(2**32 - 1) + b".",
    "key": b"\x80\x02}" + DOUBLED + b"Ns.",
    "persistent id": b"\x80\x02" + DOUBLED + b"Q.",
    "persistent id in a tuple": b"\x80\x02(" + text("storage") + DOUBLED + DOUBLED + b"tQ.",
    "name": b"\x80\x04" + DOUBLED + DOUBLED + b"\x93.",
    "function": b"\x80\x02" + DOUBLED + DOUBLED + b"R.",
    "arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + DOUBLED + b"R.",
    "ordered dict": b"\x80\x02ccollections\nOrderedDict\n" + DOUBLED + b"\x85R.",
    "content": b"\x80\x02" + DOUBLED + b".",
    "nesting": b"\x80\x02" + b")" + b"\x85" * 200_000 + b".",
    "marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "length": b"\x80\x02X\xff\xff\xff\xff.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 200_000) + b"\x7f" * 200_000 + b".",
    "decimal number": b"\x80\x02L" + b"9" * 200_000 + b"L\n.",
    "frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "no end": b"\x80\x02" + b"}" * 200_000,
    "too long": b"\x80\x02" + b"}0" * 2_000_000 + b".",
    "shape": table(tensor(KEY.format(1), "0", 2**31 - 1)),
    "negative offset": table(tensor(KEY.format(1), "0", 4, -4)),
    "extension": b"\x80\x02\x82\x01.",
    "instance": b"(ios\nsystem\n.",
    "empty": b"",
}


def test_the_makers_of_these_files_make_good_ones(tmp_path):
    """The same pieces give a file that torch reads and that is imported."""
    torch = pytest.importorskip("torch", reason="the file is read by torch too")
    numbers = np.arange(2 * 768, dtype=np.float32)
    program = table(
        tensor(KEY.format(1), "0", numbers.size), tensor("control_trans", "0", numbers.size)
    )
    path = archive(tmp_path / "a.bin", program, {"0": numbers.tobytes(), "version": b"3\n"})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a/version", "3\n")
    loaded = torch.load(path, weights_only=True)
    np.testing.assert_array_equal(loaded["control_trans"].numpy(), numbers)
    np.testing.assert_array_equal(import_official_concept(path).key.ravel(), numbers[:768])


def refused_within_bounds(path: Path, **options) -> str:
    tracemalloc.start()
    start = time.process_time()  # a busy machine is no fault
    try:
        with pytest.raises(CatVersionError) as caught:
            import_official_concept(path, **options)
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak / 1e6:.0f} MB"
    assert seconds < SECONDS * 4, f"{seconds:.1f} s"  # tracing takes its time
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_pickles(tmp_path, case):
    message = refused_within_bounds(archive(tmp_path / "a.bin", HOSTILE[case]))
    assert message.startswith(str(tmp_path / "a.bin"))


def test_one_storage_under_many_names_and_many_storages(tmp_path):
    zeros = bytes(8 * 2**20)
    names = [KEY.format(i) for i in range(512)]
    many = table(*(tensor(name, "0", 2 * 2**20, 0) for name in names))
    path = archive(tmp_path / "read-often.bin", many, {"0": zeros})
    start = time.process_time()  # a busy machine is no fault
    assert len(import_official_concept(path, prefix_length=2, num_heads=1).layers) == 512
    assert time.process_time() - start < SECONDS
    distinct = table(*(tensor(name, str(i), 2 * 2**20) for i, name in enumerate(names)))
    storages = {str(i): zeros for i in range(12)}
    message = refused_within_bounds(archive(tmp_path / "bomb.bin", distinct, storages))
    assert "Not an adapter file" in message
    views = table(*(tensor(name, "0", 2**20, i) for i, name in enumerate(names)))
    refused_within_bounds(archive(tmp_path / "views.bin", views, {"0": zeros}))
    small = table(*(tensor(name, str(i), 1) for i, name in enumerate(names)))
    refused_within_bounds(archive(tmp_path / "larger-than-said.bin", small, storages))


@pytest.mark.parametrize(
    "config",
    [
        [], 5, None, "text", {"config": 5}, {"config": []},
        {"hidden_size": "768"}, {"hidden_size": -768}, {"hidden_size": 0}, {"hidden_size": 768.0},
        {"hidden_size": True}, {"hidden_size": 10**30}, {"hidden_size": [768]},
        {"hidden_size": float("nan")}, {"config": {"prefix_length": "1"}}, {"prefix_length": -1},
        {"prefix_length": 0}, {"config": {"prefix_length": 10**9}}, {"prefix_length": {}},
    ],
)  # fmt: skip
def test_types_in_adapter_config(tmp_path, config):
    (tmp_path / "pytorch_adapter.bin").write_bytes((PUBLISHED / "pytorch_adapter.bin").read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CatVersionError, match=r"adapter_config\.json: .*(must be|is no number)"):
        import_official_concept(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '"\ud800"', ""])
def test_adapter_config_that_is_no_json(tmp_path, text):
    (tmp_path / "pytorch_adapter.bin").write_bytes((PUBLISHED / "pytorch_adapter.bin").read_bytes())
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CatVersionError, match=r"adapter_config\.json: "):
        import_official_concept(tmp_path)


@pytest.mark.parametrize("option", ["num_heads", "prefix_length"])
@pytest.mark.parametrize("value", [0, -1, 10**30, 7])
def test_sizes_on_the_command_line(tmp_path, capsys, option, value):
    arguments = ["import", str(PUBLISHED), "--base_class", "bear", "--output_dir", str(tmp_path)]
    assert main([*arguments, f"--{option}", str(value)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{option}[= ]{value}\b.*must be", error)
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_archives_that_are_damaged_elsewhere(tmp_path):
    """Every byte of the archive's own tables turned over, one at a time."""
    good = archive(tmp_path / "a.bin", pickle.dumps({}, protocol=2)).read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        (tmp_path / "b.bin").write_bytes(damaged)
        with pytest.raises(CatVersionError):
            import_official_concept(tmp_path / "b.bin")
