"""Concepts of many users, taught beside each other while pictures are drawn."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catversion_jax.concepts import ConceptSpec, read_concepts
from catversion_jax.concepts.report import ConceptReport, report_concept
from catversion_jax.config import DataOptions, MethodOptions
from catversion_jax.errors import CatVersionError, ConceptError, shown
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, Concept, load_concept
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.regular_files import read_json_object
from catversion_jax.serving.store import Photo, StoredConcept
from catversion_jax.training.live import LiveTraining
from catversion_jax.training.run import names
from catversion_jax.training.run.directory import RunDirectory
from catversion_jax.training.run.manifest import changed_model

WARM_UP = "warm-up"
"""The concept that compiles everything; no client has it."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the teaching of a concept is.

    Attributes:
      step: updates done.
      updates: updates that it gets in all.
      losses: pairs of step and evaluation loss.
      plain_loss: the plain model's evaluation loss; None where it is not known yet.
    """

    step: int
    updates: int
    losses: tuple[tuple[int, float], ...]
    plain_loss: float | None


class ConceptFolders:
    """Photos and concept files of a server on disk; names are the server's own.

    Args:
      root: the server's folder.
      run: the folder of the training.
      data: how photos become square pixels.
      method: when concepts act.
    """

    def __init__(self, root: Path, run: Path, data: DataOptions, method: MethodOptions):
        self._photos, self._files = root / "photos", root / "concepts"
        self._root, self._run = root, run / names.CONCEPTS_FOLDER
        self._data, self._when = data, method.when
        make_folder(self._photos)
        make_folder(self._files)

    def check_model(self, backbone: Backbone) -> None:
        """Make sure that nothing was taught here with another model, whatever the options were.

        Raises:
          CatVersionError: something was.
        """
        now = {**backbone.fingerprints, "digests": backbone.digests}
        for folder in sorted(self._root.glob("run-*")):
            before = read_json_object(folder / names.RUN_FILE)
            if not before or not RunDirectory(folder).holds_results():
                continue
            changed, former = changed_model(before, now), before.get("base_model")
            if former != backbone.name:
                changed.insert(0, f"it was {shown(former)} and is {shown(backbone.name)}")
            if changed:
                raise CatVersionError(
                    f"output_dir={self._root}: concepts were taught there with another model "
                    f"({', '.join(changed)}), and a server's folder is for one. Give another "
                    "output_dir, or put the former model back."
                )

    def write_photo(self, folder: str, file: str, data: bytes) -> None:
        """Keep a photo or a mask, all or nothing."""
        make_folder(self._photos / folder)
        write_atomically(self._photos / folder / file, data)

    def remove_photo(self, folder: str, *files: str | None) -> None:
        """Delete the files of a photo, where there are any."""
        for file in files:
            if file is not None:
                (self._photos / folder / file).unlink(missing_ok=True)

    def photos_of(self, folder: str) -> Path:
        """Where the photos of a concept lie."""
        return self._photos / folder

    def photo(self, folder: str, file: str) -> bytes:
        """The contents of a photo."""
        return (self._photos / folder / file).read_bytes()

    def describe(self, folder: str, fields: Mapping[str, Any], photos: Sequence[Photo]) -> None:
        """Write what the concept is beside its photos; what is no photo of it goes away."""
        make_folder(self._photos / folder)
        own = {file for photo in photos for file in (photo.file, photo.mask)}
        for path in (self._photos / folder).iterdir():
            if path.name not in own and path.name != "concept.json":
                path.unlink(missing_ok=True)  # of a photo that was replaced
        write_atomically(self._photos / folder / "concept.json", json.dumps(dict(fields)).encode())

    def spec(self, folder: str, name: str) -> ConceptSpec:
        """The concept in a folder, under the given name.

        Raises:
          ConceptError: the folder cannot be taught from.
        """
        found = read_concepts(
            self._photos / folder,
            max_megapixels=self._data.max_megapixels,
            default_when=self._when,
        )
        for problem in found.problems:
            raise ConceptError(problem.message)
        return dataclasses.replace(found.concepts[0], name=name)

    def report(self, folder: str, backbone: Backbone) -> ConceptReport:
        """What ``catversion check`` says of the photos; every one is decoded."""
        return report_concept(
            self.spec(folder, folder),
            resolution=self._data.resolution or backbone.default_resolution,
            alpha=self._data.alpha,
            templates=self._data.instance_prompt,
            default_when=self._when,
            tokenizer=backbone.tokenizers[0],
        )

    def publish(self, job: str, concept: StoredConcept | None) -> None:
        """Give the file of a finished job the name that its owner knows."""
        learned = load_concept(self._run / job / CONCEPT_FILE_NAME)
        named = learned if concept is None else dataclasses.replace(learned, name=concept.id)
        named.save(self.file(job))

    def file(self, job: str) -> Path:
        """The concept file of a finished job."""
        return self._files / f"{job}.safetensors"

    def is_learned(self, job: str) -> bool:
        """Whether the training of a job had ended, though nobody was told."""
        return (self._run / job / CONCEPT_FILE_NAME).is_file()

    def newest(self, job: str) -> Path | None:
        """The file of a job that is finished, or the newest one of a step; None without any."""
        if self.file(job).is_file():
            return self.file(job)
        steps = [
            (step, path)
            for path in (self._run / job).glob(names.STEP_FILES)
            if (step := names.step_of_file(path)) is not None
        ]
        return max(steps)[1] if steps else None

    def remove(self, folder: str | None, jobs: Sequence[str]) -> None:
        """Delete a concept's photos and all that jobs of it made, with other options too."""
        if folder is not None:
            shutil.rmtree(self._photos / folder, ignore_errors=True)
        for job in jobs:
            for made in self._root.glob(f"run*/{names.CONCEPTS_FOLDER}/{job}"):
                shutil.rmtree(made, ignore_errors=True)
            self.file(job).unlink(missing_ok=True)

    def remove_strangers(self, folders: set[str]) -> None:
        """Delete what a killed process left behind: photos of concepts that nobody knows, and
        files that it had begun.
        """
        for begun in (*self._photos.glob("*/.*.tmp"), *self._files.glob(".*.tmp")):
            begun.unlink(missing_ok=True)
        for path in self._photos.iterdir():
            if path.name not in folders and path.name != WARM_UP:
                shutil.rmtree(path, ignore_errors=True)

    def write_warm_up(self, resolution: int) -> None:
        """Write a concept of one grey picture, ``resolution`` pixels wide and high."""
        grey = Image.fromarray(np.full((resolution, resolution, 3), 127, np.uint8))
        buffer = io.BytesIO()
        grey.save(buffer, format="PNG")
        self.write_photo(WARM_UP, "0001.png", buffer.getvalue())
        photo = Photo("0001", "0001.png", "", resolution, resolution)
        self.describe(WARM_UP, {"base_class": "thing"}, [photo])


def warm_up(live: LiveTraining, folders: ConceptFolders, resolution: int) -> Concept:
    """Compile all that teaching needs, by a first step of a concept that nobody wants.

    Returns:
      That concept, for drawing to compile with.
    """
    folders.write_warm_up(resolution)
    live.add(WARM_UP)
    while True:
        if not live.advance():
            for news in live.news():  # it could not be prepared
                raise ConceptError(news.reason)
            time.sleep(0.01)
        mine = [one for one in live.under_way if one.name == WARM_UP]
        if mine and mine[0].step > 0:
            break
    concept = load_concept(live.written(mine[0]))
    live.withdraw(WARM_UP)
    folders.remove(WARM_UP, [WARM_UP])
    return concept
