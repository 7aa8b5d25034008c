"""index.csv and its changes: what is read was said last, whenever the process was killed."""

import csv
from pathlib import Path

import pytest

from catversion_jax.training.run.index import Index, changes_file, read_index
from catversion_jax.training.run.status import read_status

NAMES = [f"concept_{i}" for i in range(50)]


def states(path: Path) -> dict[str, str]:
    return {row["name"]: row["state"] for row in read_index(path)}


@pytest.fixture
def index(tmp_path: Path) -> Index:
    index = Index(tmp_path / "index.csv")
    for name in NAMES:
        index.set({"name": name, "state": "queued"})
    index.write()
    return index


def test_a_change_is_one_line_and_read_at_once(tmp_path: Path, index: Index) -> None:
    path = tmp_path / "index.csv"
    whole, before = path.read_bytes(), changes_file(path).stat().st_size
    index.change({"name": NAMES[7], "state": "running"})
    line = "concept_7,running,,,,\n"
    assert changes_file(path).stat().st_size == before + len(line)
    assert path.read_bytes() == whole
    index.change({"name": NAMES[7], "state": "quarantined", "reason": "=1+1, no photo"})
    assert states(path) == {**dict.fromkeys(NAMES, "queued"), NAMES[7]: "quarantined"}
    assert read_status(tmp_path)["counts"] == {"queued": 49, "quarantined": 1}
    assert read_status(tmp_path)["concepts"][7]["reason"] == "=1+1, no photo"
    assert index.reason(NAMES[7]) == "=1+1, no photo"
    index.write()
    with path.open(newline="") as file:  # as any other program reads it
        rows = {row["name"]: row["state"] for row in csv.DictReader(file)}
    assert rows == states(path)
    assert list(rows) == NAMES  # in the order of the list
    with changes_file(path).open(newline="") as file:
        assert list(csv.DictReader(file)) == []


def test_killed_at_any_byte(tmp_path: Path, index: Index) -> None:
    """What is read is the state after one of the changes, at least the last whole one."""
    path = tmp_path / "index.csv"
    after = [dict.fromkeys(NAMES, "queued")]
    ends = [changes_file(path).stat().st_size]
    for number, name in enumerate([*NAMES[:5], *NAMES[:5]]):
        state = "running" if number < 5 else "done"
        index.change({"name": name, "state": state, "file": f"concepts/{name}/x"})
        after.append({**after[-1], name: state})
        ends.append(changes_file(path).stat().st_size)
    changes = changes_file(path).read_bytes()
    for length in range(len(changes) + 1):
        changes_file(path).write_bytes(changes[:length])
        whole = sum(end <= length for end in ends[1:])
        assert states(path) == after[whole]
        files = {row["file"] for row in read_index(path)}
        assert files <= {"", *(f"concepts/{name}/x" for name in NAMES)}
    # index.csv was written and the old changes are still there
    changes_file(path).write_bytes(changes)
    index.write()
    changes_file(path).write_bytes(changes)
    assert states(path) == after[-1]


def test_changes_of_another_list_count_for_nothing(tmp_path: Path, index: Index) -> None:
    index.change({"name": "somebody_else", "state": "done"})
    assert list(states(tmp_path / "index.csv")) == NAMES
    (tmp_path / "index.csv").unlink()
    assert read_index(tmp_path / "index.csv") == []


def test_other_processes_have_theirs(tmp_path: Path, index: Index) -> None:
    other = Index(tmp_path / "index-0001.csv")
    for name in NAMES:
        other.set({"name": name, "state": "queued"})
    other.write(but=set(NAMES[:25]))
    assert list(states(tmp_path / "index-0001.csv")) == NAMES[25:]
    other.change({"name": NAMES[30], "state": "done"})
    assert changes_file(tmp_path / "index-0001.csv").name == "index-changes-0001.csv"
    assert read_status(tmp_path)["counts"] == {"queued": 49, "done": 1}
