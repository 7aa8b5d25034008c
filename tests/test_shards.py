"""Parts of a list, each trained by a process that knows nothing of the others."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from random_model import write_toy_concepts
from running import arguments, assert_close, final_files, run_here

from catversion_jax import load_concept
from catversion_jax.cli import main
from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.long_lists import LONG, open_configured_concepts, open_long_list
from catversion_jax.config import load_config, make_config
from catversion_jax.errors import CatVersionError, ConceptError
from catversion_jax.evaluation.subjects import read_run
from catversion_jax.runtime.shards import MOST_SHARDS, Shard, find_shard
from catversion_jax.training.run.reader import recorded_concepts, recorded_model
from catversion_jax.training.run.shards import check_same_shards
from catversion_jax.training.run.status import read_status

# ---- which shard

# printf teapot | sha256sum, as a whole number modulo n, by bc
KNOWN = [("teapot", 64, 11), ("purple_kite", 64, 3), ("Grüße", 7, 6)]


@pytest.mark.parametrize(("name", "count", "index"), KNOWN)
def test_the_name_alone_decides(name: str, count: int, index: int) -> None:
    assert [i for i in range(count) if Shard(i, count).holds(name)] == [index]


def test_accents_may_be_stored_either_way() -> None:
    assert Shard(6, 7).holds("Gru\u0308ße")
    assert Shard(6, 7).holds("Gr\u00fcße")


def test_shards_are_a_partition_of_about_equal_parts() -> None:
    names = [f"concept {number}" for number in range(4000)]
    parts = [[name for name in names if Shard(i, 8).holds(name)] for i in range(8)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    # 500 each, binomial: five standard deviations of 20.9
    assert all(abs(len(part) - 500) < 105 for part in parts)


def test_a_folder_names_its_shard() -> None:
    assert Shard(3, 64).folder == "00003-of-00064"
    assert Shard.of_folder("00003-of-00064") == Shard(3, 64)
    assert Shard.of_folder("00064-of-00064") is None
    assert Shard.of_folder("3-of-64") is None


SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MAX": "7"}
SKYPILOT = {"SKYPILOT_JOB_RANK": "5", "SKYPILOT_NUM_JOBS": "10"}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        (None, {}, "0/1"),
        (None, SLURM, "3/8"),
        (None, SKYPILOT, "5/10"),
        (None, {"JOB_COMPLETION_INDEX": "3"}, "0/1"),  # does not say of how many
        (None, {"SLURM_ARRAY_TASK_ID": "3"}, "0/1"),
        ("auto/64", {"JOB_COMPLETION_INDEX": "63"}, "63/64"),
        ("auto/64", {**SLURM, "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, "3/64"),
        ("1/2", SLURM, "1/2"),
        ("0/1", SLURM, "0/1"),
    ],
)
def test_engines_number_their_jobs(text: str | None, environment: dict, shard: str) -> None:
    assert str(find_shard(text, environment)) == shard


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("auto/64", {}, r"shard=auto/64: the environment does not number this job"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, r"JOB_COMPLETION_INDEX=4: must be below 4"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "x"}, r"JOB_COMPLETION_INDEX='x': must be a whole"),
        # --array=1-8, and --array=0,3 to start two again
        (None, {**SLURM, "SLURM_ARRAY_TASK_MAX": "8"}, "must be numbered from 0"),
        (None, {**SLURM, "SLURM_ARRAY_TASK_COUNT": "2"}, "give shard=auto/n to start single ones"),
    ],
)
def test_numbers_that_cannot_be(text: str | None, environment: dict, words: str) -> None:
    with pytest.raises(CatVersionError, match=words):
        find_shard(text, environment)


@pytest.mark.parametrize("text", ["64/64", "1/0", "-1/4", "3", "a/b", "1/100000", "1/2/3", ""])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(CatVersionError, match="must be i/n with 0 <= i < n <= 99999"):
        make_config({"concepts": "x", "shard": text})
    assert make_config({"concepts": "x", "shard": f"0/{MOST_SHARDS}"}).shard == f"0/{MOST_SHARDS}"


def test_codes_that_mean_something_else() -> None:
    for code in (1, 2, 75):
        with pytest.raises(CatVersionError, match="means something else already"):
            make_config({"concepts": "x", "quarantine_exit_code": code})


# ---- what a shard reads


def test_nothing_of_other_shards_is_looked_at(tmp_path: Path) -> None:
    write_toy_concepts(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    of_kite = next(i for i in range(64) if Shard(i, 64).holds("purple_kite"))
    for name in names:
        if not Shard(of_kite, 64).holds(name):
            for path in (tmp_path / name).glob("*.png"):
                path.write_bytes(b"no picture")
            (tmp_path / name / "concept.json").write_text("{broken")
    found = read_concepts(tmp_path, shard=Shard(of_kite, 64))
    assert [spec.name for spec in found.concepts] == ["purple_kite"]
    assert not found.problems
    empty = next(i for i in range(64) if not any(Shard(i, 64).holds(name) for name in names))
    assert read_concepts(tmp_path, shard=Shard(empty, 64)).concepts == ()


# ---- a run of shards

COUNT = 3  # shard 0 of the toys has no concept


@pytest.fixture(scope="module")
def divided(
    one_block_sd_folder: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose shards have ended, one after the other."""
    output = tmp_path_factory.mktemp("divided") / "out"
    for index in range(COUNT):
        code = run_here(one_block_sd_folder, toys, output, shard=f"{index}/{COUNT}")
        assert code == 0
    return output


def files_of(output: Path) -> dict[str, Path]:
    paths = output.glob("shards/*/concepts/*/catversion.safetensors")
    return {path.parent.name: path for path in paths}


def test_every_concept_is_trained_once_where_its_name_says(divided: Path, finished: Path) -> None:
    found = files_of(divided)
    assert len(found) == len([*divided.glob("shards/*/concepts/*")]) == 3
    for name, path in found.items():
        assert Shard.of_folder(path.parents[2].name).holds(name)
    shards = sorted(path.name for path in divided.glob("shards/*"))
    assert shards == [Shard(i, COUNT).folder for i in range(COUNT)]
    assert {name for shard in divided.glob("shards/*") for name in final_files(shard)} == set(found)
    for shard in divided.glob("shards/*"):
        assert (shard / "index.csv").exists()
        one = load_config(shard / "config.resolved.yaml")
        assert (one.output_dir, one.shard) == (str(divided), str(Shard.of_folder(shard.name)))
    for path in found.values():
        reference = finished / "concepts" / path.parent.name
        assert load_concept(path).train_config == load_concept(reference).train_config
    assert_close_by_name(found, finished)


def assert_close_by_name(found: dict[str, Path], reference: Path) -> None:
    """As ``assert_close``, of files that lie in several runs."""
    for root in {path.parents[2] for path in found.values()}:
        for name in final_files(reference):
            if name not in final_files(root):
                continue
            one = root.parent / f"only-{name}"
            shutil.copytree(reference / "concepts" / name, one / "concepts" / name)
            assert_close(root, one)
            shutil.rmtree(one)


def test_merge_and_status_read_all_shards(divided: Path, capsys) -> None:
    assert main(["merge", str(divided)]) == 0
    said = capsys.readouterr().out
    assert "3 done" in said
    assert "shards: 3 of 3 have begun, 3 are done, 0 are at work" in said
    with (divided / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["purple_kite", "striped_ball", "teal_cup"]
    assert {row["name"]: divided / row["file"] for row in rows} == files_of(divided)
    assert json.loads((divided / "run.json").read_text())["concepts"]["done"] == 3
    before = (divided / "index.csv").read_bytes()
    assert main(["merge", str(divided)]) == 0
    assert (divided / "index.csv").read_bytes() == before
    assert main(["status", str(divided)]) == 0
    assert "shards: 3 of 3 have begun" in capsys.readouterr().out
    assert read_status(divided)["shards"] == {"expected": 3, "begun": 3, "ended": 3, "locked": 0}


def test_what_reads_a_run_reads_its_shards(
    divided: Path, toys: Path, tmp_path: Path, capsys
) -> None:
    assert recorded_model(divided) == recorded_model(divided / "shards" / Shard(0, COUNT).folder)
    names = {spec.name for spec in recorded_concepts(divided).concepts}
    assert names == set(files_of(divided))
    own = files_of(divided)["teal_cup"].parents[2]
    assert {spec.name for spec in recorded_concepts(own).concepts} == set(final_files(own))
    subjects, left_out = read_run(divided, None)
    assert {one.name: one.folder for one in subjects} == {
        name: path.parent for name, path in files_of(divided).items()
    }
    assert not left_out
    assert main(["inspect", str(divided)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert main(["export", str(divided), "--output_dir", str(tmp_path / "all")]) == 0
    for name, path in files_of(divided).items():
        assert (tmp_path / "all" / f"{name}.safetensors").read_bytes() == path.read_bytes()


def test_push_sends_the_concepts_of_all_shards(divided: Path, capsys) -> None:
    assert main(["push", str(divided), "--repo_id", "ada/toys", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for name, path in files_of(divided).items():
        size = f"{path.stat().st_size:,}"
        assert f"{size:>9}  {name}/catversion.safetensors" in shown
    given = [f"concepts={divided}", "shard=1/3", "push_to_hub=true", "hub_model_id=ada/toys"]
    assert main(["train", *given]) == 2
    assert "push_to_hub=true: this process trains shard 1/3 only" in capsys.readouterr().err


@pytest.mark.slow  # a training, an evaluation and three more trainings
def test_what_fails_the_gate_is_trained_on_in_its_shard(
    divided: Path, one_block_sd_folder: Path, toys: Path, tmp_path: Path, capsys
) -> None:
    """One evaluation of all shards; each takes from its gate what is its own."""
    pytest.importorskip("torch", reason="the test's CLIP is one of transformers")
    from tiny_pipelines import save_clip

    copy = tmp_path / "out"
    shutil.copytree(divided, copy)
    save_clip(tmp_path / "clip", one_block_sd_folder / "tokenizer")
    (tmp_path / "prompts.txt").write_text("a {} in the snow")
    command = ["evaluate", copy, "--clip", tmp_path / "clip", "--prompts", tmp_path / "prompts.txt"]
    command += ["--gate", "--num_inference_steps", "1", "--num_images_per_prompt", "1"]
    assert main(list(map(str, command))) in (0, 4)
    path = copy / "evaluation" / "gate.json"
    gate = json.loads(path.read_text())
    assert sorted([*gate["failed"], *gate["passed"]]) == sorted(files_of(copy))

    updates = max(load_concept(files_of(copy)["teal_cup"]).train_config["max_train_steps"], 1)
    path.write_text(json.dumps({**gate, "failed": {"teal_cup": {"updates": updates}}}))
    before = {name: file.read_bytes() for name, file in files_of(copy).items()}
    for index in range(COUNT):
        options = {"shard": f"{index}/{COUNT}", "retrain": "failed"}
        assert run_here(one_block_sd_folder, toys, copy, **options) == 0
    now = {name: file.read_bytes() for name, file in files_of(copy).items()}
    assert {name for name in now if now[name] != before[name]} == {"teal_cup"}
    trained = load_concept(files_of(copy)["teal_cup"]).train_config
    assert (trained["max_train_steps"], trained["failed_at"]) == (2 * updates, updates)
    assert main(["merge", str(copy)]) == 0
    assert "3 done" in capsys.readouterr().out
    steps = {name: load_concept(file).step for name, file in files_of(copy).items()}
    assert steps.pop("teal_cup") == 2 * updates
    assert set(steps.values()) == {updates}


def test_a_shard_that_has_work_to_do(divided: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "out"
    shutil.copytree(divided, copy)
    own = files_of(copy)["teal_cup"].parents[2]
    shutil.rmtree(own)
    assert main(["merge", str(copy)]) == 75
    assert "shards: 2 of 3 have begun, 2 are done" in capsys.readouterr().out
    own.mkdir()
    assert main(["status", str(copy)]) == 0
    assert "shards: 2 of 3 have begun, 2 are done" in capsys.readouterr().out


def test_shards_that_do_not_belong_together(divided: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "out"
    shutil.copytree(divided, copy)
    folder = files_of(copy)["purple_kite"].parents[2]
    manifest = json.loads((folder / "run.json").read_text())
    manifest["options"]["learning_rate"] = 0.5
    (folder / "run.json").write_text(json.dumps(manifest))
    assert main(["merge", str(copy)]) == 2
    assert "are not of one run: learning_rate: 0.01 and 0.5" in capsys.readouterr().err
    shutil.rmtree(folder)
    folder = files_of(copy)["teal_cup"].parents[2]
    other = next(path for path in (copy / "shards").iterdir() if path != folder)
    shutil.copytree(folder, other, dirs_exist_ok=True)
    assert main(["merge", str(copy)]) == 2
    assert "lie in two shards, the first is" in capsys.readouterr().err
    shutil.copytree(folder, copy / "shards" / Shard(0, 2).folder)
    assert main(["merge", str(copy)]) == 2
    assert "holds shards of 2 and of 3" in capsys.readouterr().err


def test_a_shard_counts_once_whatever_leads_to_it(divided: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "out"
    shutil.copytree(divided, copy)
    (copy / "shards" / Shard(0, 4).folder).symlink_to(copy, target_is_directory=True)
    first = copy / "shards" / Shard(0, COUNT).folder
    (copy / "shards" / Shard(1, 4).folder).symlink_to(first, target_is_directory=True)
    shutil.copytree(first, first / "shards" / Shard(0, COUNT).folder)
    assert main(["status", str(copy)]) == 0
    assert "3 done" in capsys.readouterr().out
    assert main(["merge", str(copy)]) == 0


def test_a_run_keeps_its_division(divided: Path, finished: Path, toys: Path, capsys) -> None:
    for shard, words in (("0/2", "shard=0/2"), ("0/1", "shard=0/1")):
        options = [f"concepts={toys}", f"output_dir={divided}", f"shard={shard}"]
        assert main(["train", *options]) == 2
        said = capsys.readouterr().err
        assert f"{words}: output_dir={divided} holds shards of 3" in said
    with pytest.raises(CatVersionError, match="holds an undivided run"):
        check_same_shards(finished, Shard(0, 2))
    assert main(["merge", str(finished)]) == 2
    assert "has no shards to merge" in capsys.readouterr().err


def test_the_environment_numbers_a_shard_and_says_the_exit_code(
    one_block_sd_folder: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(toys, photos)
    for path in photos.glob("*/*.png"):
        path.write_bytes(b"no picture")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    args = arguments(one_block_sd_folder, photos, tmp_path / "out", shard="auto/1")
    assert main(["train", *args]) == 3
    assert main(["train", *args, "quarantine_exit_code=0"]) == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    empty = arguments(one_block_sd_folder, photos, tmp_path / "other")
    assert main(["train", *empty, "quarantine_exit_code=0"]) == 0
    assert "(shard 1/2)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "other" / "shards").iterdir()] == ["00001-of-00002"]


def test_a_long_list_is_divided_by_its_names(tmp_path: Path) -> None:
    """A list that is opened by its names, none of whose concepts is there."""
    names = [f"concept {number}" for number in range(LONG)]
    rows = [f"{name},pot,nowhere" for name in names]
    (tmp_path / "list.csv").write_text("\n".join(["name,base_class,path", *rows]))
    whole = open_long_list(tmp_path / "list.csv")
    parts = [whole.part(Shard(i, 8)).names for i in range(8)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert parts[3] == [name for name in names if Shard(3, 8).holds(name)]
    config = make_config({"concepts": str(tmp_path / "list.csv"), "shard": "3/8"})
    assert open_configured_concepts(config.data_options, config.when).names == parts[3]
    with pytest.raises(ConceptError, match="nowhere"):
        whole.part(Shard(3, 8)).read(parts[3][0])
