"""What a server has promised is there after the worst."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catversion_jax.errors import CatVersionError
from catversion_jax.serving.keys import Keys
from catversion_jax.serving.store import Photo, Store

ROOT = Path(__file__).resolve().parents[1]


def test_every_job_that_was_answered_survives_sigkill(tmp_path):
    program = """
import sys
from pathlib import Path
from catversion_jax.serving.store import Store
store = Store(Path(sys.argv[1]))
while True:
    job = store.add_job("ada", "draw", {"prompt": "a cup"}, num_images=1)
    print(job.id, flush=True)
    store.begin(job.id)
"""
    path, told = tmp_path / "server.sqlite", set()
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, path],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        told |= {process.stdout.readline().strip() for _ in range(5)}
        time.sleep(0.02)
        process.kill()
        told |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
    store = Store(path)
    assert told
    assert told <= {job.id for job in store.open_jobs()}
    (mode,) = store._db.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = store._db.execute("PRAGMA synchronous").fetchone()
    assert (mode, synchronous) == ("wal", 2)  # 2 is FULL
    assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_job_ends_once(tmp_path):
    store = Store(tmp_path / "server.sqlite")
    job = store.add_job("ada", "draw", {"prompt": "a cup"}, num_images=2)
    assert (job.state, job.attempts) == ("queued", 0)
    store.begin(job.id)
    assert store.end(job.id, "canceled")
    assert not store.end(job.id, "succeeded")
    store.begin(job.id)
    after = store.job(job.id)
    assert (after.state, after.attempts, after.request) == ("canceled", 1, {"prompt": "a cup"})
    other = store.add_job("ada", "draw", {"prompt": "a cup"})
    store.begin(other.id)
    for job_id in (job.id, other.id):  # the server ends in order
        store.give_back(job_id)
    assert (store.job(job.id).state, store.job(job.id).attempts) == ("canceled", 1)
    assert (store.job(other.id).state, store.job(other.id).attempts) == ("queued", 0)
    lesson = store.add_job("ada", "teach", {})
    store.take_lesson(lesson.id)
    assert (store.job(lesson.id).state, store.job(lesson.id).attempts) == ("processing", 0)
    store.attempt(lesson.id)
    store.attempt(lesson.id)  # it was killed
    assert (store.job(lesson.id).state, store.job(lesson.id).attempts) == ("processing", 2)
    store.advanced(lesson.id)
    store.give_back(lesson.id)
    assert (store.job(lesson.id).state, store.job(lesson.id).attempts) == ("processing", 0)
    assert store.forget_drawings(time.time() + 1) == [job.id]
    assert store.job(job.id) is None


def test_a_concept_is_its_owners(tmp_path):
    store = Store(tmp_path / "server.sqlite")
    of_ada = store.put_concept("ada", "rex", {"base_class": "dog"})
    of_bo = store.put_concept("bo", "rex", {"base_class": "cat"})
    assert of_ada.folder != of_bo.folder
    assert "rex" not in of_ada.folder  # names on disk are the server's own
    assert store.put_concept("ada", "rex", {"base_class": "wolf"}).folder == of_ada.folder
    assert store.concept("bo", "rex").fields == {"base_class": "cat"}
    store.put_photo(of_ada.folder, Photo("1", "0001.png", "x", 64, 64))
    store.put_mask(of_ada.folder, "1", "0001.mask.png")
    store.put_photo(of_ada.folder, Photo("2", "0002.png", "y", 64, 64))
    store.put_photo(of_ada.folder, Photo("1", "0003.png", "z", 64, 64))
    assert [(p.name, p.file, p.mask) for p in store.photos(of_ada.folder)] == [
        ("1", "0003.png", None),
        ("2", "0002.png", None),
    ]
    job = store.add_job("ada", "teach", {}, concept=of_ada)
    assert store.delete_concept(of_ada) == [job.id]
    assert not store.photos(of_ada.folder)
    assert store.concept("ada", "rex") is None
    assert store.concept("bo", "rex") == of_bo


def test_a_strange_file_is_named(tmp_path):
    (tmp_path / "server.sqlite").write_bytes(b"no database at all, but long enough" * 40)
    with pytest.raises(CatVersionError, match="cannot be used as a database"):
        Store(tmp_path / "server.sqlite")
    store = Store(tmp_path / "newer.sqlite")
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(CatVersionError, match="another version of this program"):
        Store(tmp_path / "newer.sqlite")


def test_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# of the shop\nada 0123456789abcdef\n\nbo  fedcba9876543210\n")
    keys = Keys.read(path)
    assert keys.owner("Bearer 0123456789abcdef") == "ada"
    assert keys.owner("bearer fedcba9876543210") == "bo"
    for header in (
        None,
        "",
        "Bearer",
        "Bearer nobody",
        "Basic 0123456789abcdef",
        "0123456789abcdef",
    ):
        assert keys.owner(header) is None
    assert Keys.read(None).owner(None) == "local"
    for text, message in (
        ("ada short\n", "fewer than 16"),
        ("ada\n", "must be a name"),
        ("../ada 0123456789abcdef\n", "must be a name"),
        ("a 0123456789abcdef\na 0123456789abcdeg\n", "there twice"),
        ("# none\n", "has no key"),
    ):
        path.write_text(text)
        with pytest.raises(CatVersionError, match=message):
            Keys.read(path)
