"""What a server has promised, in SQLite: concepts, photos and jobs.

The journal is written ahead and every commit reaches the disk (``synchronous=FULL``): what a client
was told is there after SIGKILL. Files lie in folders whose names the server makes up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from catversion_jax.errors import CatVersionError

State = Literal["queued", "starting", "processing", "succeeded", "failed", "canceled"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "canceled")
Kind = Literal["draw", "teach"]
FORMAT = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS concepts (
  owner TEXT NOT NULL, id TEXT NOT NULL, folder TEXT NOT NULL UNIQUE, fields TEXT NOT NULL,
  taught_by TEXT, created REAL NOT NULL, PRIMARY KEY (owner, id));
CREATE TABLE IF NOT EXISTS photos (
  folder TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, file TEXT NOT NULL,
  sha256 TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, mask TEXT,
  PRIMARY KEY (folder, name));
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, kind TEXT NOT NULL,
  concept TEXT, folder TEXT, request TEXT NOT NULL, num_images INTEGER NOT NULL,
  state TEXT NOT NULL, attempts INTEGER NOT NULL, error TEXT, created REAL NOT NULL,
  started REAL, finished REAL, idempotency_key TEXT, body_sha256 TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_key ON jobs (owner, idempotency_key)
  WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
"""


@dataclasses.dataclass(frozen=True)
class Photo:
    """One photo of a concept; its width and height are in pixels.

    Attributes:
      name: what the client calls it.
      file: name of its file.
      sha256: SHA-256 of the file, in hexadecimal.
      width, height: pixels.
      mask: name of its mask's file; None where it has none.
    """

    name: str
    file: str
    sha256: str
    width: int
    height: int
    mask: str | None = None


@dataclasses.dataclass(frozen=True)
class StoredConcept:
    """A concept of one owner.

    Attributes:
      owner: name of the key.
      id: what the client calls it.
      folder: what the server calls it on disk.
      fields: base class and the like, as the client gave them.
      taught_by: id of the job whose file it has, if there is one.
      created: seconds since 1970.
    """

    owner: str
    id: str
    folder: str
    fields: Mapping[str, Any]
    taught_by: str | None
    created: float


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that was asked for: drawing, or teaching a concept.

    Attributes:
      number: jobs in the order in which they came.
      id: its name, also that of its files.
      owner: name of the key.
      kind: ``draw`` or ``teach``.
      concept: id of the concept that is taught.
      folder: of that concept's photos.
      request: what was asked for, as JSON values.
      num_images: pictures that are drawn.
      state: see :data:`State`.
      attempts: how often it was begun; of a lesson since its training was last saved.
      error: why it failed.
      created, started, finished: seconds since 1970.
      body_sha256: of the request, where it came with an idempotency key.
    """

    number: int
    id: str
    owner: str
    kind: Kind
    concept: str | None
    folder: str | None
    request: Mapping[str, Any]
    num_images: int
    state: State
    attempts: int
    error: str | None
    created: float
    started: float | None
    finished: float | None
    body_sha256: str | None

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in ENDED


_JOB_COLUMNS = ", ".join(field.name for field in dataclasses.fields(Job))


class Store:
    """The database of one server; any thread may call.

    Args:
      path: of the file, made where it is missing.

    Raises:
      CatVersionError: the file is no database of ours, or cannot be written.
    """

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(path, timeout=30, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise CatVersionError(
                    f"{path}: was written by another version of this program (format {version}, "
                    f"this one reads {FORMAT}). Give another output_dir."
                )
            with self._db:
                self._db.executescript(_TABLES)
                self._db.execute(f"PRAGMA user_version={FORMAT}")
        except sqlite3.Error as error:
            raise CatVersionError(
                f"{path}: cannot be used as a database ({error}). Give another output_dir, or move "
                "the file away."
            ) from error

    def close(self) -> None:
        """Close the database; nothing may be asked afterwards."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:
            yield self._db

    def _rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # ------------------------------------------------------------------ concepts

    def put_concept(self, owner: str, id: str, fields: Mapping[str, Any]) -> StoredConcept:
        """Make a concept, or say anew what it is; its photos stay."""
        text = json.dumps(dict(fields), sort_keys=True)
        with self._change() as db:
            db.execute(
                "INSERT INTO concepts VALUES (?, ?, ?, ?, NULL, ?) "
                "ON CONFLICT (owner, id) DO UPDATE SET fields = excluded.fields",
                (owner, id, f"c{secrets.token_hex(8)}", text, time.time()),
            )
        found = self.concept(owner, id)
        assert found is not None
        return found

    def concept(self, owner: str, id: str) -> StoredConcept | None:
        """One concept; None where the owner has none by that name."""
        rows = self._rows("SELECT * FROM concepts WHERE owner = ? AND id = ?", owner, id)
        return _concept(rows[0]) if rows else None

    def concepts(self, owner: str) -> list[StoredConcept]:
        """All concepts of an owner, the newest first."""
        query = "SELECT * FROM concepts WHERE owner = ? ORDER BY created DESC, id"
        return [_concept(row) for row in self._rows(query, owner)]

    def count_concepts(self, owner: str) -> int:
        """How many concepts an owner keeps."""
        return self._rows("SELECT count(*) FROM concepts WHERE owner = ?", owner)[0][0]

    def folders(self) -> set[str]:
        """Folders of the photos of all concepts."""
        return {row[0] for row in self._rows("SELECT folder FROM concepts")}

    def set_taught(self, job: Job) -> None:
        """Note that a job has made the file of its concept."""
        with self._change() as db:
            db.execute(
                "UPDATE concepts SET taught_by = ? WHERE owner = ? AND id = ? AND folder = ?",
                (job.id, job.owner, job.concept, job.folder),
            )

    def delete_concept(self, concept: StoredConcept) -> list[str]:
        """Forget a concept, its photos and its jobs; returns the ids of these jobs."""
        with self._change() as db:
            query = "SELECT id FROM jobs WHERE folder = ?"
            jobs = [row[0] for row in db.execute(query, (concept.folder,))]
            for table in ("photos", "jobs", "concepts"):
                db.execute(f"DELETE FROM {table} WHERE folder = ?", (concept.folder,))
        return jobs

    # ------------------------------------------------------------------ photos

    def photos(self, folder: str) -> list[Photo]:
        """The photos of one concept, in the order in which they came."""
        query = "SELECT * FROM photos WHERE folder = ? ORDER BY number"
        names = [field.name for field in dataclasses.fields(Photo)]
        return [Photo(**{n: row[n] for n in names}) for row in self._rows(query, folder)]

    def put_photo(self, folder: str, photo: Photo) -> None:
        """Add a photo, or put it in the place of the one of that name, whose mask is forgotten."""
        with self._change() as db:
            query = "SELECT coalesce(max(number), 0) + 1 FROM photos WHERE folder = ?"
            (number,) = db.execute(query, (folder,)).fetchone()
            db.execute(
                "INSERT INTO photos VALUES (?, ?, ?, ?, ?, ?, ?, NULL) "
                "ON CONFLICT (folder, name) DO UPDATE SET file = excluded.file, "
                "sha256 = excluded.sha256, width = excluded.width, height = excluded.height, "
                "mask = NULL",
                (folder, photo.name, number, photo.file, photo.sha256, photo.width, photo.height),
            )

    def put_mask(self, folder: str, name: str, file: str) -> None:
        """Note the mask of a photo."""
        with self._change() as db:
            query = "UPDATE photos SET mask = ? WHERE folder = ? AND name = ?"
            db.execute(query, (file, folder, name))

    def delete_photo(self, folder: str, name: str) -> None:
        """Forget a photo and its mask."""
        with self._change() as db:
            db.execute("DELETE FROM photos WHERE folder = ? AND name = ?", (folder, name))

    # ------------------------------------------------------------------ jobs

    def add_job(
        self,
        owner: str,
        kind: Kind,
        request: Mapping[str, Any],
        *,
        num_images: int = 0,
        concept: StoredConcept | None = None,
        idempotency_key: str | None = None,
        body_sha256: str | None = None,
    ) -> Job:
        """Keep a job; once this returns, it is not lost."""
        id, now = f"{kind}-{secrets.token_hex(12)}", time.time()
        named = (None, None) if concept is None else (concept.id, concept.folder)
        values = (id, owner, kind, *named, json.dumps(dict(request)), num_images, now)
        with self._change() as db:
            db.execute(
                "INSERT INTO jobs (id, owner, kind, concept, folder, request, num_images, created, "
                "state, attempts, idempotency_key, body_sha256) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'queued', 0, ?, ?)",
                (*values, idempotency_key, body_sha256),
            )
        job = self.job(id)
        assert job is not None
        return job

    def job(self, id: str) -> Job | None:
        """The job of that id, of any owner; None where there is none."""
        rows = self._rows(f"SELECT {_JOB_COLUMNS} FROM jobs WHERE id = ?", id)
        return _job(rows[0]) if rows else None

    def job_of_key(self, owner: str, idempotency_key: str) -> Job | None:
        """The job that an owner asked for with this key, if there is one."""
        where = "owner = ? AND idempotency_key = ?"
        query = f"SELECT {_JOB_COLUMNS} FROM jobs WHERE {where}"
        rows = self._rows(query, owner, idempotency_key)
        return _job(rows[0]) if rows else None

    def jobs(self, owner: str, *, limit: int = 100) -> list[Job]:
        """The last ``limit`` jobs of an owner, the newest first."""
        where = "WHERE owner = ? ORDER BY number DESC LIMIT ?"
        query = f"SELECT {_JOB_COLUMNS} FROM jobs {where}"
        return [_job(row) for row in self._rows(query, owner, limit)]

    def open_jobs(self) -> list[Job]:
        """All jobs that have not ended, in the order in which they came."""
        where = "WHERE state IN ('queued', 'starting', 'processing') ORDER BY number"
        return [_job(row) for row in self._rows(f"SELECT {_JOB_COLUMNS} FROM jobs {where}")]

    def last_teaching(self, folder: str) -> Job | None:
        """The newest job that teaches a concept."""
        where = "WHERE folder = ? ORDER BY number DESC LIMIT 1"
        rows = self._rows(f"SELECT {_JOB_COLUMNS} FROM jobs {where}", folder)
        return _job(rows[0]) if rows else None

    def begin(self, *ids: str) -> None:
        """Note that the device begins some jobs, which counts as one more attempt of each."""
        with self._change() as db:
            db.executemany(
                "UPDATE jobs SET state = 'processing', attempts = attempts + 1, started = ? "
                "WHERE id = ? AND state IN ('queued', 'starting')",
                [(time.time(), id) for id in ids],
            )

    def take_lesson(self, id: str) -> None:
        """Note that the training has a lesson in its queue; that counts as no attempt yet."""
        with self._change() as db:
            query = "UPDATE jobs SET state = 'processing', started = ? WHERE id = ? "
            db.execute(query + "AND state = 'queued'", (time.time(), id))

    def attempt(self, id: str) -> None:
        """Note that the training touches a lesson that it has in its queue."""
        with self._change() as db:
            query = "UPDATE jobs SET attempts = attempts + 1 WHERE id = ? AND state = 'processing'"
            db.execute(query, (id,))

    def advanced(self, id: str) -> None:
        """Note that a lesson has come further for good: attempts before this one count no more."""
        with self._change() as db:
            query = "UPDATE jobs SET attempts = 1 WHERE id = ? AND state = 'processing'"
            db.execute(query, (id,))

    def requeue(self, id: str) -> None:
        """Let a job wait again, after a restart."""
        with self._change() as db:
            db.execute("UPDATE jobs SET state = 'queued' WHERE id = ?", (id,))

    def warn(self, id: str, text: str) -> None:
        """Add a warning to a drawing, once."""
        with self._change() as db:
            row = db.execute("SELECT request FROM jobs WHERE id = ?", (id,)).fetchone()
            request = {} if row is None else json.loads(row[0])
            warnings = request.get("warnings", [])
            if text not in warnings:
                request["warnings"] = [*warnings, text]
                db.execute("UPDATE jobs SET request = ? WHERE id = ?", (json.dumps(request), id))

    def give_back(self, id: str) -> None:
        """Let a job wait again because the server ends in order; its attempt does not count.

        A lesson keeps its state: it stays in the queue of the training.
        """
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET attempts = attempts - 1, "
                "state = CASE kind WHEN 'teach' THEN state ELSE 'queued' END "
                "WHERE id = ? AND state = 'processing'",
                (id,),
            )

    def end(self, id: str, state: State, error: str | None = None) -> bool:
        """Note the end of a job; returns whether it had not ended before."""
        with self._change() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, error = ?, finished = ? "
                "WHERE id = ? AND state IN ('queued', 'starting', 'processing')",
                (state, error, time.time(), id),
            )
            return changed.rowcount > 0

    def forget_drawings(self, before: float) -> list[str]:
        """Forget the drawings that ended before a moment; returns their ids."""
        where = "kind = 'draw' AND finished < ?"
        with self._change() as db:
            ids = [row[0] for row in db.execute(f"SELECT id FROM jobs WHERE {where}", (before,))]
            db.execute(f"DELETE FROM jobs WHERE {where}", (before,))
        return ids


def _concept(row: sqlite3.Row) -> StoredConcept:
    return StoredConcept(**{**dict(row), "fields": json.loads(row["fields"])})


def _job(row: sqlite3.Row) -> Job:
    return Job(**{**dict(row), "request": json.loads(row["request"])})
