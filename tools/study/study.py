"""One arm from its options to its scores; what all arms share.

    OUT/arms/<arm>/run/         what the trainer wrote
    OUT/arms/<arm>/images/      what was drawn, in the layout of catversion evaluate
    OUT/arms/<arm>/compute.json what training cost
    OUT/arms/<arm>/scores.json  figures of every concept, and the settings they were made with

Everything there is kept: a finished arm with the same settings is skipped, an unfinished one goes
on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from arms import PROMPT, SHARED, Arm, base_of

from catversion_jax.concepts import ConceptList
from catversion_jax.concepts.prompts import with_class_word
from catversion_jax.config import make_config
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.generation import (
    PlannedImage,
    draw_missing,
    plan_images,
)
from catversion_jax.evaluation.image_folders import PLAIN_FOLDER
from catversion_jax.evaluation.prior import plan_drift, plan_prior, score_prior
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.evaluation.scoring import Scorer
from catversion_jax.evaluation.subjects import Subject, read_references, read_run
from catversion_jax.models.embedders import ClipEmbedder, DinoEmbedder, folder_sha256
from catversion_jax.models.stable_diffusion import Backbone, default_dtype
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.sampling.class_word_masks import class_word_masks
from catversion_jax.training.start import train

logger = logging.getLogger("study")

_DECIDE_TRAINING = ("kind", "options", "train_steps", "training_seed", "model", "weights_sha256")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What every arm has in common; part of what makes a result the same.

    Attributes:
      prompt_set: the prompts.
      seeds: of the methods; ablations are drawn with the first ``ablation_seeds``.
      sampling: how images are drawn.
      num_prior_images: images of other classes for each concept.
      train_steps: instead of every arm's own number of steps, to try the study out.
      training_seed: of what is trained; the start values of a concept too.
    """

    prompt_set: PromptSet
    seeds: int
    ablation_seeds: int
    sampling: SamplingSettings
    num_prior_images: int
    concepts_per_device: int
    train_steps: int | None = None
    training_seed: int = 42

    def seeds_of(self, arm: Arm) -> range:
        """The seeds an arm is drawn with."""
        return range(self.seeds if arm.is_main else min(self.seeds, self.ablation_seeds))


class Study:
    """The frozen model, the concepts, and the folder of results."""

    def __init__(
        self,
        out: Path,
        backbone: Backbone,
        clip: ClipEmbedder,
        dino: DinoEmbedder | None,
        all_concepts: ConceptList,
        concepts: ConceptList,
        ablation_concepts: ConceptList,
        protocol: Protocol,
        source: str,
    ):
        self.out, self.backbone, self.protocol = out, backbone, protocol
        self.all_concepts, self.source = all_concepts, source
        self.concepts, self.ablation_concepts = concepts, ablation_concepts
        # of everything that draws
        parts = ("text_encoder", "unet", "vae")
        self.weights = {part: folder_sha256(backbone.folder / part) for part in parts}
        masker = functools.partial(class_word_masks, backbone)
        self.scorer = Scorer(clip, protocol.prompt_set, dino=dino, masker=masker)
        subjects = [Subject(s.name, s.base_class, s.images) for s in concepts.concepts]
        self.references = {
            s.name: read_references(s, masker, backbone.default_resolution) for s in subjects
        }
        # the same for every arm, also where it trains a part of the concepts
        self.classes = sorted({subject.base_class for subject in subjects})

    def folder(self, arm: Arm) -> Path:
        """Where everything of an arm lies."""
        return self.out / "arms" / arm.name

    def concepts_of(self, arm: Arm) -> ConceptList:
        """The concepts an arm trains."""
        concepts = self.concepts if arm.is_main else self.ablation_concepts
        return concepts if arm.sees_masks else without_masks(concepts)

    # ------------------------------------------------------------------ one arm

    def run(self, arm: Arm) -> dict[str, Any]:
        """Train, draw and score what is missing of one arm; returns the content of scores.json."""
        known = self.finished(arm)
        if known is not None:
            logger.info("%s: done already", arm.name)
            return known
        settings = self.settings(arm)
        self._claim_folder(arm, settings)
        subjects, failed = {
            "plain": self._plain,
            "trainer": self._train,
            "dreambooth": self._dreambooth,
        }[arm.kind](arm)
        records = {subject.name: self._score(arm, subject) for subject in subjects}
        content = {
            "settings": settings,
            "base": base_of(arm.question),
            "question": arm.question,
            "text": arm.text,
            "concepts": records,
            "failed": failed,
            "compute": self._compute(arm),
        }
        write_json(self.folder(arm) / "scores.json", content)
        return content

    def finished(self, arm: Arm) -> dict[str, Any] | None:
        """The content of an arm's scores.json where it was made with these very settings."""
        path = self.folder(arm) / "scores.json"
        if not path.is_file():
            return None
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if known["settings"] == self.settings(arm) else None

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Everything that decides an arm's figures, as plain JSON values."""
        protocol = self.protocol
        values = {
            "kind": arm.kind,
            "options": {**(SHARED if arm.kind == "trainer" else {}), **arm.options},
            "train_steps": protocol.train_steps,
            "training_seed": protocol.training_seed,
            "concepts": [spec.name for spec in self.concepts_of(arm).concepts],
            "model": self.backbone.name,
            "weights_sha256": self.weights,
            "clip_sha256": self.scorer.clip.sha256,
            "dino_sha256": self.scorer.dino and self.scorer.dino.sha256,
            "prompt_set": dataclasses.asdict(protocol.prompt_set),
            "seeds": list(protocol.seeds_of(arm)),
            "sampling": dataclasses.asdict(protocol.sampling),
            "num_prior_images": protocol.num_prior_images,
            "classes": self.classes,
            "platform": jax.default_backend(),
            **({} if arm.sees_masks else {"sees_masks": False}),
        }
        return json.loads(json.dumps(values))

    def _claim_folder(self, arm: Arm, settings: dict[str, Any]) -> None:
        """Refuse a folder whose training was another one; what is only drawn is drawn again."""
        path = self.folder(arm) / "training.json"
        wanted = {key: settings[key] for key in _DECIDE_TRAINING}
        if path.is_file() and (known := json.loads(path.read_text())) != wanted:
            changed = [key for key in wanted if known.get(key) != wanted[key]]
            raise CatVersionError(
                f"{self.folder(arm)}: was trained with other {', '.join(changed)}. Remove this "
                "folder to train the arm again, or give another OUT."
            )
        write_json(path, wanted)

    def _plain(self, arm: Arm) -> tuple[list[Subject], dict[str, str]]:
        """The class word alone."""
        subjects = [Subject(s.name, s.base_class, s.images) for s in self.concepts_of(arm).concepts]
        self._draw(self.backbone, self._plan_scored(arm, subjects))
        return subjects, {}

    def _train(self, arm: Arm) -> tuple[list[Subject], dict[str, str]]:
        """All concepts at once with the public trainer."""
        run, concepts = self.folder(arm) / "run", self.concepts_of(arm)
        options = {**SHARED, **arm.options}
        if self.protocol.train_steps is not None:
            options["max_train_steps"] = self.protocol.train_steps
        config = make_config(
            {
                "seed": self.protocol.training_seed,
                **options,
                "concepts": self.source,
                "pretrained_model_name_or_path": self.backbone.name,
                "output_dir": str(run),
                "resolution": self.backbone.default_resolution,
                "mixed_precision": "bf16" if default_dtype() == "bfloat16" else "no",
                "concepts_per_device": self.protocol.concepts_per_device,
                "compilation_cache_dir": None,
            }
        )
        samples = config.max_train_steps * config.train_batch_size
        with self._timed(arm, samples, "all", len(concepts.concepts)):
            result = train(config, concepts=concepts, backbone=self.backbone)
        subjects = read_run(run, self.all_concepts)[0] if result.finished else []
        subjects = [s for s in subjects if s.name in result.finished]
        seeds = self.protocol.seeds_of(arm)
        images = self.folder(arm) / "images"
        planned = plan_images(images, subjects, self.protocol.prompt_set, seeds)
        if arm.is_main:  # the ablations' tables do not show it
            planned += plan_prior(
                images,
                subjects,
                self.protocol.prompt_set,
                self.classes,
                0,
                self.protocol.num_prior_images,
            )
        self._draw(self.backbone, planned)
        return subjects, dict(result.failures)

    def _dreambooth(self, arm: Arm) -> tuple[list[Subject], dict[str, str]]:
        """One concept after another: a fine-tuned UNet is drawn with and thrown away."""
        from dreambooth import DreamBooth, Settings  # torch
        from fine_tuned import backbone_with

        given = dict(arm.options)
        if self.protocol.train_steps is not None:
            given["steps"] = self.protocol.train_steps
        settings, method = Settings(**{"seed": self.protocol.training_seed, **given}), None
        subjects = []
        for spec in self.concepts_of(arm).concepts:
            subject = Subject(spec.name, spec.base_class, spec.images)
            subjects.append(subject)
            done = self.folder(arm) / "images" / subject.name / "DONE.json"
            if done.is_file() and json.loads(done.read_text()) == self.settings(arm):
                continue
            method = method or DreamBooth(
                str(self.backbone.folder), self.backbone.default_resolution
            )
            with self._timed(arm, settings.steps * settings.batch_size, spec.name, 1):
                unet = method.fine_tune(spec, with_class_word(PROMPT, spec.base_class), settings)
            tuned = backbone_with(self.backbone, unet, f"{arm.name} of {spec.name}")
            drift = plan_drift(
                self.folder(arm) / "images",
                subject,
                self.protocol.prompt_set,
                self.classes,
                0,
                self.protocol.num_prior_images if arm.is_main else 0,
                None,
            )
            plain = [image for image in drift if image.path.parent.name == PLAIN_FOLDER]
            own = [image for image in drift if image.path.parent.name != PLAIN_FOLDER]
            self._draw(tuned, self._plan_scored(arm, [subject]) + own)
            self._draw(self.backbone, plain)
            write_json(done, self.settings(arm))
        return subjects, {}

    def _score(self, arm: Arm, subject: Subject) -> dict[str, Any]:
        images = self.folder(arm) / "images"
        scores = self.scorer.score(subject, self.references[subject.name], images)
        prior = score_prior(images, subject, self.classes, self.scorer.clip)
        return {
            "base_class": subject.base_class,
            "total": dataclasses.asdict(scores.total),
            "first_seed": dataclasses.asdict(scores.first_seed),
            "real": dataclasses.asdict(scores.real),
            "prior": None if prior is None else dataclasses.asdict(prior),
        }

    # ------------------------------------------------------------------ drawing

    def _plan_scored(self, arm: Arm, subjects: Sequence[Subject]) -> list[PlannedImage]:
        """The images of a method whose concept is the model itself."""
        prompts, seeds = self.protocol.prompt_set, self.protocol.seeds_of(arm)
        return plan_images(self.folder(arm) / "images", subjects, prompts, seeds, plain=True)

    def _draw(self, backbone: Backbone, planned: Sequence[PlannedImage]) -> None:
        """Draw what is missing, remove what is no longer asked for; the plain model's images are
        drawn once for all arms.
        """
        wanted = {image.path for image in planned}
        for folder in {path.parent for path in wanted if path.parent.name != PLAIN_FOLDER}:
            for path in folder.glob("*.png"):
                if not path.name.endswith(".mask.png") and path not in wanted:
                    path.unlink()
        shared = self.out / "plain" / "-".join(value[:8] for value in self.weights.values())
        for image in planned:
            known = shared / image.path.name
            if image.path.parent.name == PLAIN_FOLDER and known.is_file():
                make_folder(image.path.parent)
                if not image.path.is_file():
                    shutil.copyfile(known, image.path)
        logging.getLogger("catversion_jax.sampling.denoising").setLevel(logging.ERROR)
        draw_missing(backbone, planned, self.protocol.sampling)
        make_folder(shared)
        for image in planned:
            if image.path.parent.name == PLAIN_FOLDER:
                shutil.copyfile(image.path, shared / image.path.name)

    # ------------------------------------------------------------------ what it cost

    def _timed(self, arm: Arm, samples: int, what: str, concepts: int) -> _Clock:
        return _Clock(self.folder(arm) / "compute.json", samples, what, concepts)

    def _compute(self, arm: Arm) -> dict[str, Any]:
        path = self.folder(arm) / "compute.json"
        if not path.is_file():
            return {"samples_per_concept": 0, "seconds_per_concept": 0.0}
        rows = json.loads(path.read_text(encoding="utf-8"))
        seconds, concepts = (
            sum(row[key] for row in rows.values()) for key in ("seconds", "concepts")
        )
        return {
            "samples_per_concept": next(iter(rows.values()))["samples"],
            "seconds_per_concept": seconds / concepts,
        }


class _Clock:
    """Adds up the wall seconds of training over interrupted runs."""

    def __init__(self, path: Path, samples: int, what: str, concepts: int):
        self.path, self.what = path, what
        self.row = {"samples": samples, "concepts": concepts}

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        rows = json.loads(self.path.read_text()) if self.path.is_file() else {}
        before = rows.get(self.what, {}).get("seconds", 0.0)
        seconds = before + time.perf_counter() - self.started
        write_json(self.path, rows | {self.what: {**self.row, "seconds": seconds}})


def write_json(path: Path, value: Any) -> None:
    """Write plain values, whole or not at all."""
    make_folder(path.parent)
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def without_masks(concepts: ConceptList) -> ConceptList:
    """The concepts as somebody has them who draws no masks."""
    specs = [
        dataclasses.replace(
            spec, images=tuple(dataclasses.replace(image, mask=None) for image in spec.images)
        )
        for spec in concepts.concepts
    ]
    return dataclasses.replace(concepts, concepts=tuple(specs))


def evenly_spread(concepts: ConceptList, count: int | None) -> ConceptList:
    """``count`` of the concepts, evenly spread over the list; all of them for None.

    Raises:
      CatVersionError: fewer than 2 or more than there are.
    """
    total = len(concepts.concepts)
    if count is None:
        return concepts
    if not 2 <= count <= total:
        raise CatVersionError(
            f"{count} concepts: must be within 2..{total}, an interval needs two at least."
        )
    chosen = [concepts.concepts[i * total // count] for i in range(count)]
    return ConceptList(tuple(chosen), concepts.problems, concepts.skipped)
