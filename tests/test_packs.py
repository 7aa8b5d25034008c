"""All concepts of a run in one Arrow file: ``concepts.arrow#NAME`` is a concept."""

import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter

from catversion_jax import load_concept, save_concept
from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.residual import KVResidual
from catversion_jax.runtime.concept_packs import ConceptPack, PackError, split_packed
from catversion_jax.sampling.concept_shelf import ConceptShelf
from catversion_jax.training.run.index import COLUMNS, Index
from catversion_jax.training.run.packing import write_rows

# in the order of their UTF-8 bytes
NAMES = ["B", "a", "a b", "a.arrow", "a.arrow#b", "aa", "rex#2", "Ä", "茶壶", "🫖"]


def write_concept(path: Path, name: str) -> None:
    rng = np.random.default_rng(len(name))
    key, value = rng.standard_normal((2, 2, 1, 2, 4)).astype(np.float32)
    learned = KVResidual(key, value, layers=(0, 1))
    save_concept(path, learned, base_class="dog", name=name, step=3, base_model="tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two shards."""
    root = tmp_path_factory.mktemp("run")
    for number, name in enumerate(NAMES):
        folder = root / "shards" / f"0000{number % 2}-of-00002" / "concepts" / name
        write_concept(folder / "catversion.safetensors", name)
    return root


@pytest.fixture(scope="module")
def pack(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "concepts.arrow"
    assert main(["pack", str(run), "--out", str(path)]) == 0
    return path


def files(run: Path) -> dict[str, bytes]:
    paths = run.glob("shards/*/concepts/*/catversion.safetensors")
    return {path.parent.name: path.read_bytes() for path in paths}


def test_the_datasets_library_reads_it(run: Path, pack: Path) -> None:
    dataset = datasets.Dataset.from_file(str(pack))
    assert dataset["name"] == NAMES == sorted(NAMES, key=str.encode)
    assert dict(zip(dataset["name"], dataset["file"], strict=True)) == files(run)
    assert set(dataset["base_class"]) == {"dog"}
    assert set(dataset["step"]) == {3}
    assert set(dataset["base_model"]) == {"tiny"}


def test_every_concept_is_found_and_is_the_bytes_of_its_file(run: Path, pack: Path) -> None:
    read = ConceptPack(pack)
    assert [*read] == NAMES
    for name, data in files(run).items():
        assert read[name] == data
        assert load_concept(f"{pack}#{name}").name == name
    for name in ("", "A", "a.arrow#", "zz", "茶"):
        with pytest.raises(PackError, match="has no concept"):
            read[name]


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_batches_of_any_size(rows: int, tmp_path: Path) -> None:
    """Written by the library itself."""
    names = sorted({f"{random.Random(i).randrange(10**6)}" for i in range(200)})
    files = {name: name.encode() * int(name[-1]) for name in names}
    path = tmp_path / "x.arrow"
    with ArrowWriter(path=str(path), writer_batch_size=rows) as writer:
        for name, file in files.items():
            writer.write({"name": name, "file": file})
        writer.finalize()
    read = ConceptPack(path)
    assert [*read] == names
    assert {name: read[name] for name in names} == files


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("concepts.arrow#rex", ("concepts.arrow", "rex")),
        ("a/b.arrow/c.arrow#x.arrow#y", ("a/b.arrow/c.arrow", "x.arrow#y")),
        ("a.arrow#b/rex", None),
        ("concepts.arrow", None),
        (".arrow#x", None),
        ("user/repo", None),
    ],
)
def test_what_names_a_concept_of_a_pack(path: str, parts: tuple[str, str] | None) -> None:
    assert split_packed(path) == parts


def test_it_is_taken_wherever_a_concept_is(run: Path, pack: Path, tmp_path: Path, capsys) -> None:
    shelf = ConceptShelf([f"{pack}#rex#2:0.5", (f"{pack}#B", 0.7)])
    (one, other) = shelf._all
    assert (one.name, one.scale, other.name, other.scale) == ("rex#2", 0.5, "B", 0.7)
    assert shelf._find(f"{pack}#aa:2").scale == 2
    assert main(["inspect", f"{pack}#Ä"]) == 0
    assert "Ä" in capsys.readouterr().out
    assert main(["inspect", str(pack)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    assert main(["export", f"{pack}#rex#2", "--output_dir", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "rex_2.safetensors").read_bytes() == files(run)["rex#2"]
    names = [argument for name in NAMES[:3] for argument in ("--concept", name)]
    assert main(["export", str(pack), *names, "--output_dir", str(tmp_path / "some")]) == 0
    assert (tmp_path / "some" / "a_b.safetensors").read_bytes() == files(run)["a b"]


def test_pytorch_takes_it(run: Path, pack: Path) -> None:
    pytest.importorskip("torch")
    from catversion_jax.integrations.concept_source import read_concept
    from catversion_jax.integrations.loaded_concept import CatVersionLoadError

    (part,), source = read_concept(f"{pack}#茶壶")
    assert (part.name, source) == ("茶壶", f"{pack}#茶壶")
    np.testing.assert_array_equal(part.key.numpy(), load_concept(f"{pack}#茶壶").learned.key)
    with pytest.raises(
        CatVersionLoadError, match=r"has no concept 'x'; there are B, a, a b and so on"
    ):
        read_concept(f"{pack}#x")
    with pytest.raises(CatVersionLoadError, match=r"concepts\.arrow#NAME"):
        read_concept(pack)


def test_a_name_that_is_a_folder_too_is_the_folder(pack: Path) -> None:
    folder = pack.parent / f"{pack.name}#aa"
    write_concept(folder / "catversion.safetensors", "another")
    assert load_concept(f"{pack}#aa").name == "another"
    shutil.rmtree(folder)
    assert load_concept(f"{pack}#aa").name == "aa"


def test_what_cannot_be_packed_is_left_out_and_named(tmp_path: Path, run: Path, capsys) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (damaged,) = copy.glob("shards/*/concepts/aa/catversion.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(["pack", str(copy), "--out", str(tmp_path / "x.arrow")]) == 3
    assert f"left out: {damaged}: the file is damaged" in capsys.readouterr().err
    assert [*ConceptPack(tmp_path / "x.arrow")] == [name for name in NAMES if name != "aa"]
    first, second = (copy / "shards" / f"0000{i}-of-00002" / "concepts" / "B" for i in (0, 1))
    shutil.copytree(first, second)
    before = (tmp_path / "x.arrow").read_bytes()
    assert main(["pack", str(copy), "--out", str(tmp_path / "x.arrow")]) == 2
    assert "B: lies both in" in capsys.readouterr().err
    assert (tmp_path / "x.arrow").read_bytes() == before
    assert main(["pack", str(run), "--out", str(tmp_path / "x.bin")]) == 2
    assert "whose name ends in .arrow" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "x.arrow"), "--out", str(tmp_path / "y.arrow")]) == 2
    assert "has no finished concept" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.arrow"]


def test_a_damaged_pack_gives_one_line(pack: Path, tmp_path: Path) -> None:
    data, moments = pack.read_bytes(), random.Random(0)
    path = tmp_path / "x.arrow"
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(moments.randint(1, 8)):
            damaged[moments.randrange(len(data))] = moments.randrange(256)
        path.write_bytes(damaged[: moments.choice([len(data), moments.randrange(len(data))])])
        try:
            concept = load_concept(f"{path}#{moments.choice(NAMES)}")
        except CatVersionError as error:
            refused += 1
            lines = str(error).splitlines()
            if len(lines) != 1 or not lines[0].startswith(str(path)):
                raise
        else:
            np.testing.assert_equal(concept.step, 3)
    assert refused > 100


def test_a_row_holds_the_concept_that_it_names(tmp_path: Path) -> None:
    """Packs that the pack command would not write."""
    paths = [tmp_path / name / "catversion.safetensors" for name in ("a", "b")]
    for path in paths:
        write_concept(path, path.parent.name)
    one, other = map(load_concept, paths)
    data = [path.read_bytes() for path in paths]
    write_rows(tmp_path / "x.arrow", iter([(one, data[1]), (other, data[0])]))
    with pytest.raises(CatVersionError, match="the row 'a' holds concept 'b'"):
        load_concept(f"{tmp_path}/x.arrow#a")
    write_rows(tmp_path / "y.arrow", iter([(one, data[0]), (one, data[0]), (other, data[1])]))
    with pytest.raises(CatVersionError, match="two rows are called 'a'"):
        load_concept(f"{tmp_path}/y.arrow#a")
    assert load_concept(f"{tmp_path}/y.arrow#b").name == "b"


def test_accents_may_be_typed_either_way(pack: Path) -> None:
    assert load_concept(f"{pack}#A\u0308").name == "\u00c4"


def test_a_missing_shard_is_said(run: Path, tmp_path: Path, caplog) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "shards" / "00001-of-00002")
    source, out = str(tmp_path / "run"), str(tmp_path / "out")
    for command in (
        ["pack", source, "--out", f"{out}.arrow"],
        ["export", source, "--output_dir", out],
    ):
        caplog.clear()
        assert main(command) == 0
        assert "1 of its 2 shards are missing" in caplog.text


def test_concepts_of_an_earlier_list_are_not_taken_along_in_silence(tmp_path, caplog) -> None:
    """``pack``, ``export`` and ``push`` read the folders; the list may have changed since."""
    for name in ("kept", "renamed", "spoilt"):
        write_concept(tmp_path / "run" / "concepts" / name / "catversion.safetensors", name)
    index = Index(tmp_path / "run" / "index.csv")
    for name, state in (("kept", "done"), ("spoilt", "quarantined")):
        index.set({**dict.fromkeys(COLUMNS, ""), "name": name, "state": state})
    index.write()
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    for command in (
        ["pack", run, "--out", f"{out}.arrow"],
        ["export", run, "--output_dir", out],
        ["push", run, "--repo_id", "me/them", "--dry_run"],
    ):
        caplog.clear()
        assert main(command) == 0
        (said,) = caplog.messages
        assert "no longer in the run's list or were given up since: renamed, spoilt." in said
