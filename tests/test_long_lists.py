"""Lists of very many concepts: read in their turn, they are what a list read at once is."""

import json
from pathlib import Path

import pytest
from concept_folders import put_images
from running import final_files, run_here, steps_of

from catversion_jax.cli import main
from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.long_lists import open_long_list
from catversion_jax.errors import CatVersionError, ConceptError

LISTS = {
    "list.csv": "name;path;base_class;seed\nred cup;cups/red;cup;3\n;cat;cat;\nnul;cat;cat;\n"
    "gone;nowhere;cup;\ntwice;cat;cat;;;\n",
    "list.jsonl": '{"name": "red cup", "path": "cups/red", "base_class": "cup", "seed": 3}\n\n'
    '{"path": "cat", "base_class": "cat", "prompts": ["a {}", "the {}"]}\n{"name": }\n'
    '{"name": "one", "images": ["cat/2.png"], "base_class": "cat"}\n[1, 2]\n'
    '{"name": "vague", "path": "cat"}\n',
    "dataset.jsonl": '{"instance_data_dir": "cat", "class_prompt": "cat", "instance_prompt": '
    '"photo of a <new1> cat"}\n{"instance_data_dir": "cups/red", "class_prompt": "cup"}\n',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("catversion_jax.concepts.long_lists.LONG", 2)
    put_images(tmp_path / "cups" / "red", "1.png")
    put_images(tmp_path / "cat", "1.png", "2.png")
    for name, text in LISTS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", LISTS)
def test_a_long_list_says_the_same(folder: Path, name: str) -> None:
    at_once, long_list = read_concepts(folder / name), open_long_list(folder / name)
    assert long_list is not None
    problems = {problem.name: problem.message for problem in at_once.problems}
    assert set(long_list.names) == {spec.name for spec in at_once.concepts} | set(problems)
    for spec in at_once.concepts:
        assert long_list.read(spec.name) == spec
    for problem, message in problems.items():
        with pytest.raises(ConceptError) as found:
            long_list.read(problem)
        assert str(found.value) == message
    blocks = list(long_list.blocks(2))
    assert [spec for block in blocks for spec in block.concepts] == list(at_once.concepts)
    assert {p.name: p.message for block in blocks for p in block.problems} == problems
    assert long_list.notes == at_once.notes


def test_what_is_no_long_list(folder: Path) -> None:
    (folder / "short.csv").write_text("name,path,base_class\ncat,cat,cat\n")
    assert open_long_list(folder / "short.csv") is None
    assert open_long_list(folder) is None
    assert open_long_list("hf:owner/name") is None
    (folder / "twice.csv").write_text("name,path\ncat,cat\nCat,cat\n")
    with pytest.raises(CatVersionError, match=r"line 3: concept name 'Cat': appears twice"):
        open_long_list(folder / "twice.csv")


def test_check_reads_it_in_blocks(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("catversion_jax.cli.check._BLOCK", 3)
    assert main(["check", str(folder / "list.csv")]) == 3
    text = capsys.readouterr().out
    assert text.count("smallest side") == 2
    assert "nowhere' not found" in text
    assert "columns are separated by semicolons" in text
    assert text.endswith("5 concepts, 2 ready to train\n")
    assert main(["check", str(folder / "list.csv"), "--json"]) == 3
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["concepts"]) + len(line["problems"]) for line in lines] == [3, 2]


@pytest.mark.parametrize(
    ("count", "larger_from", "again"),
    [
        pytest.param(4, 0, False, marks=pytest.mark.slow),
        pytest.param(4, 0, True, marks=pytest.mark.slow),
        # the ninth, on eight devices, needs room for more pictures and prompts: compiled twice
        pytest.param(10, 9, False, marks=pytest.mark.slow),
    ],
)
def test_training_it_gives_the_same_files(
    one_block_sd_folder: Path,
    toys: Path,
    tmp_path: Path,
    monkeypatch,
    count: int,
    larger_from: int,
    again: bool,
) -> None:
    """One concept cannot be read, which shows in its turn. Going on believes the index."""
    entries = []
    for number in range(count):
        large = number >= larger_from
        pictures = [f"{toys}/striped_ball/{one}.png" for one in range(1, 5 if large else 2)]
        prompts = ["a {}", "the {}"] if large else ["a {}"]
        entry = {"name": f"ball {number}", "images": pictures, "prompts": prompts, "seed": number}
        entries.append({**entry, "base_class": "ball"})
    entries[2]["images"] = ["nowhere.png"]
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    few = {"max_train_steps": 2, "eval_steps": 2, "concepts_per_device": 1}
    assert run_here(one_block_sd_folder, file, tmp_path / "at once", **few) == 3
    monkeypatch.setattr("catversion_jax.concepts.long_lists.LONG", 2)
    assert run_here(one_block_sd_folder, file, tmp_path / "long", **few) == 3
    files = final_files(tmp_path / "long")
    assert len(files) == count - 1
    assert files == final_files(tmp_path / "at once")
    reason = (tmp_path / "long" / "concepts" / "ball 2" / "FAILED.txt").read_text()
    assert "nowhere.png" in reason
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("long/concepts/*/*.safetensors")}
    index = (tmp_path / "long" / "index.csv").read_text()
    assert run_here(one_block_sd_folder, file, tmp_path / "long", **few) == 3
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert (tmp_path / "long" / "index.csv").read_text() == index
    # what the index does not say is read from the files
    (tmp_path / "long" / "index.csv").unlink()
    (tmp_path / "long" / "index-changes.csv").unlink()
    assert run_here(one_block_sd_folder, file, tmp_path / "long", **few) == 3
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert (tmp_path / "long" / "index.csv").read_text() == index
    if not again:
        return
    # more updates for one that is finished, and for one that cannot be read
    gate = tmp_path / "gate.json"
    gate.write_text('{"failed": {"ball 1": {"updates": 2}, "ball 2": {"updates": 2}}}')
    more = {**few, "retrain": "failed", "gate_file": gate}
    assert run_here(one_block_sd_folder, file, tmp_path / "long", **more) == 3
    assert steps_of(tmp_path / "long") == {"ball 0": 2, "ball 1": 4, "ball 3": 2}
    now = {path: path.stat().st_mtime_ns for path in stamps}
    assert {path.parent.name for path in now if now[path] != stamps[path]} == {"ball 1"}
    assert run_here(one_block_sd_folder, file, tmp_path / "long", **more) == 3
    assert now == {path: path.stat().st_mtime_ns for path in stamps}  # nothing was left to do
