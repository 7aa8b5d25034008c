"""One concept that cannot be read never stops the others, whatever is wrong with its files."""

import ast
import contextlib
import json
import os
import shutil
import struct
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from concept_folders import put_images
from PIL import Image, PngImagePlugin

import catversion_jax
from catversion_jax.cli import main
from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.latents import load_concept_images
from catversion_jax.errors import CatVersionError, ConceptError

DEEP = "[" * 100_000
DIGITS = "9" * 5000


def write(folder: Path, text: str) -> None:
    put_images(folder, "1.png")
    (folder / "concept.json").write_text(text)


def test_concept_files_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "good", '{"base_class": "cup"}')
    write(tmp_path / "deep", '{"base_class": ' + DEEP)
    write(tmp_path / "digits", '{"base_class": "cup", "seed": ' + DIGITS + "}")
    write(tmp_path / "twice", '{"base_class": "cup", "base_class": "dog"}')
    write(tmp_path / "half", r'{"base_class": "cup", "prompts": ["a cup \ud83d"]}')
    write(tmp_path / "number", "3")
    write(tmp_path / "names", json.dumps({"base_class": "cup", "name": "a/b"}))
    write(tmp_path / "long", json.dumps({"base_class": "cup", "images": ["x" * 5000]}))
    write(tmp_path / "nobody", json.dumps({"base_class": "cup", "images": ["~nosuchuser/1.png"]}))
    write(tmp_path / "zero", json.dumps({"base_class": "cup", "masks": "a\0b"}))
    put_images(tmp_path / "fifo", "1.png")
    os.mkfifo(tmp_path / "fifo" / "concept.json")  # a read of it would wait for ever
    found = read_concepts(tmp_path)
    assert [spec.name for spec in found.concepts] == ["good"]
    reasons = {problem.name: problem.message for problem in found.problems}
    expected = {
        "deep": "nested too deeply",
        "digits": "4300 digits",
        "twice": "the key 'base_class' appears twice",
        "half": "half of a character",
        "number": "must hold",
        "a_b": "concept name 'a/b': must not contain path separators",
        "long": "File name too long",
        "nobody": "there is no such user",
        "zero": "must be a folder",
        "fifo": "is no file that can be read",
    }
    assert reasons.keys() == expected.keys()
    for name, text in expected.items():
        assert text in reasons[name]
        assert len(reasons[name]) < 1000
    assert main(["check", str(tmp_path)]) == 3
    assert "11 concepts, 1 ready to train" in capsys.readouterr().out


def test_file_names_of_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inside a folder they are read; as the name of a concept they would be a folder's name."""
    write(tmp_path / "good", '{"base_class": "cup"}')
    for old, new in ((b"1.png", b"caf\xe9.png"), (b"", b"th\xe9.dat"), (b"", b"z\xe9.txt")):
        path = os.fsencode(tmp_path / "good") + b"/"
        (shutil.copy if old else lambda _, p: open(p, "w").close())(path + old, path + new)
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    (tmp_path / "bad.dat").touch()
    found = read_concepts(tmp_path)
    (spec,), (problem,) = found.concepts, found.problems
    assert [source.label for source in spec.images] == ["1.png", r"caf\udce9.png"]
    assert spec.skipped == (r"th\udce9.dat", r"z\udce9.txt")
    assert problem.name == "caf_udce9"
    assert len(load_concept_images(spec, resolution=8)) == 2
    for text in (problem.message, *spec.skipped):
        text.encode()  # can be printed and stored
    for form in ((), ("--json",)):
        assert main(["check", str(tmp_path), *form]) == 3
        assert r"caf\udce9" in capsys.readouterr().out.replace("\\\\", "\\")


def test_rows_of_every_kind(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", "1.png")
    rows = [
        '{"name": "good", "path": "cup", "base_class": "cup"}',
        '{"name": "cut", "path": ',
        DEEP,
        '["cup"]',
        '{"name": "nobody", "path": "~nosuchuser/cup", "base_class": "cup"}',
        json.dumps({"name": "long", "path": "x" * 5000, "base_class": "cup"}),
        json.dumps({"name": "long list", "images": ["x" * 5000], "base_class": "cup"}),
        json.dumps({"name": "x" * 5000, "path": "cup", "base_class": "cup"}),
        json.dumps({"name": ["a"], "path": "cup", "base_class": "cup"}),
        json.dumps({"name": "good", "path": "gone", "base_class": "cup"}),
        json.dumps({"name": "types", "path": {"a": 1}, "base_class": "cup"}),
        json.dumps({"name": "keys", "path": "cup", "base_class": "cup", "k" * 9999: 1, "seed": []}),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    found = read_concepts(tmp_path / "m.jsonl")
    assert [spec.name for spec in found.concepts] == ["good"]
    assert len(found.problems) == len(rows) - 1
    names = [problem.name for problem in found.problems]
    assert len(set(names)) == len(names)
    assert names[:3] == ["entry 2", "entry 3", "entry 4"]
    for problem in found.problems:
        assert len(problem.message) < 6000
        assert "m.jsonl line" in problem.message
    (tmp_path / "m.csv").write_text("name,path,base_class\ngood,cup,cup\nbad,cup,cup,small\n")
    found = read_concepts(tmp_path / "m.csv")
    assert [(p.name, "more fields" in p.message) for p in found.problems] == [("bad", True)]


@pytest.mark.parametrize(
    "source", ["~nosuchuser/photos", "x" * 5000, "a\0b", "\udce9", "hf:" + "y/" * 3000]
)
def test_a_source_that_is_no_path_is_one_line(source: str) -> None:
    with pytest.raises(CatVersionError) as caught:
        read_concepts(source)
    str(caught.value).encode()
    assert len(str(caught.value).splitlines()) == 1


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that everyone may enter, and a process that is not root, who may read anything."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))
    home.chmod(0o777)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield home
    finally:
        if root:
            os.seteuid(0)
        for path in home.rglob("*"):
            path.chmod(0o777)
        shutil.rmtree(home)


def test_folders_that_may_not_be_read() -> None:
    with as_nobody() as home:
        for name in ("good", "closed", "listed", "masked"):
            write(home / name, '{"base_class": "cup"}')
        put_images(home / "masked" / "masks", "1.png")
        (home / "closed").chmod(0)
        (home / "listed").chmod(0o444)
        (home / "masked" / "masks").chmod(0)
        found = read_concepts(home)
        assert [spec.name for spec in found.concepts] == ["good"]
        reasons = {problem.name: problem.message for problem in found.problems}
        assert reasons.keys() == {"closed", "listed", "masked"}
        assert all("Permission denied" in reason for reason in reasons.values())


def huge_png(width: int, height: int) -> bytes:
    """A picture of one colour, 16 bits per channel; compressed twice a thousandfold."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checked = name + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(2 * width + 1)) for _ in range(height)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_a_huge_picture_is_refused_from_its_header(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", "1.png")
    data = huge_png(13_300, 13_300)
    assert len(data) < 400_000
    (tmp_path / "cup" / "2.png").write_bytes(data)
    (tmp_path / "cup" / "1.mask.png").write_bytes(data)
    (spec,) = read_concepts(tmp_path / "cup", base_class="cup").concepts
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(ConceptError) as caught:
        load_concept_images(spec, resolution=8)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert time.monotonic() - start < 5
    for name in ("2.png", "1.mask.png"):
        assert f"{name}: too large: 13300 x 13300 are 177 megapixels" in str(caught.value)
    # The budget is the user's: these eight by eight pixels are above one that is set lower.
    (spec,) = read_concepts(tmp_path / "cup", base_class="cup", max_megapixels=5e-5).concepts
    with pytest.raises(ConceptError, match=r"1\.png: too large: 8 x 8"):
        load_concept_images(spec, resolution=8)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), ZeroDivisionError("x")])
def test_whatever_a_decoder_raises_is_a_problem_of_the_concept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    put_images(tmp_path / "cup", "1.png")
    (spec,) = read_concepts(tmp_path / "cup", base_class="cup").concepts

    def load(_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ConceptError, match=r"1\.png: cannot be decoded"):
        load_concept_images(spec, resolution=8)


def test_no_program_is_started_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow reads PostScript by running Ghostscript, whatever the file is called."""
    ran = tmp_path / "ran"
    fake = tmp_path / "bin" / "gs"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ntouch {ran}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    put_images(tmp_path / "cup", "1.png")
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for name in ("2.png", "1.mask.png"):
        (tmp_path / "cup" / name).write_bytes(text)
    with Image.open(tmp_path / "cup" / "2.png") as image:
        assert image.format == "EPS"  # else nothing is shown
    (spec,) = read_concepts(tmp_path / "cup", base_class="cup").concepts
    with pytest.raises(ConceptError, match=r"not an image of an allowed format"):
        load_concept_images(spec, resolution=8)
    assert not ran.exists()


def test_every_picture_is_opened_by_an_allow_list() -> None:
    """``Image.open`` without ``formats`` tries all of Pillow's formats, PostScript among them."""
    package = Path(catversion_jax.__file__).parent
    calls = [
        (path.relative_to(package), node)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    ]
    assert len(calls) > 1
    assert [str(p) for p, call in calls if "formats" not in {k.arg for k in call.keywords}] == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_concept_file_that_cannot_be_read_is_not_left_out(tmp_path: Path, make) -> None:
    """The command line names a base class; what else the file says would silently not count."""
    put_images(tmp_path / "cup", "1.png")
    make(tmp_path / "cup" / "concept.json")
    with pytest.raises(CatVersionError, match=r"concept\.json: is no file that can be read"):
        read_concepts(tmp_path / "cup", base_class="cup")


def test_a_list_that_is_a_link_to_nothing_is_not_left_out(tmp_path: Path) -> None:
    put_images(tmp_path / "cup", "1.png")
    (tmp_path / "cup" / "metadata.jsonl").symlink_to("nowhere")
    with pytest.raises(CatVersionError, match=r"metadata\.jsonl: is no file that can be read"):
        read_concepts(tmp_path / "cup", base_class="cup")


def test_photos_and_masks_that_link_to_nothing_are_named(tmp_path: Path) -> None:
    """As git-annex and DVC leave them where a file was not fetched."""
    put_images(tmp_path / "cup", "1.png")
    (tmp_path / "cup" / "masks").mkdir()
    for name in ("2.png", "1.mask.png", "masks/1.png"):
        (tmp_path / "cup" / name).symlink_to("nowhere")
    (spec,) = read_concepts(tmp_path / "cup", base_class="cup").concepts
    (warning,) = spec.warnings
    assert warning.endswith("missing: 1.mask.png, 2.png, masks/1.png")
