"""One evaluation: which images it draws, how they are scored, and the protocol that says both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from catversion_jax import __version__
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.frontier import FrontierPoint, frontier_points
from catversion_jax.evaluation.gallery import rank_galleries
from catversion_jax.evaluation.generation import PlannedImage, draw_missing, plan_images
from catversion_jax.evaluation.image_folders import recorded_settings
from catversion_jax.evaluation.prior import PriorScores, plan_prior, score_prior
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.evaluation.scores import Scores, SubjectScores
from catversion_jax.evaluation.scoring import Scorer
from catversion_jax.evaluation.subjects import References, Subject, read_references
from catversion_jax.evaluation.tables import Evaluation
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.sampling.requests import prompt_warnings

logger = logging.getLogger(__name__)

_MASK_POLICY = (
    "given files, else alpha, else made from the drawing model's attention to the class word where "
    "there is a model; both sides masked, background in CLIP's mean colour, square crop "
    "around the mask with 10 % margin; images with an empty mask or none left out"
)


@dataclasses.dataclass(frozen=True)
class _Scored:
    """What was found about one concept."""

    references: References
    methods: dict[str, SubjectScores]
    prior: PriorScores | None
    curve: list[tuple[int, Scores]]
    scales: dict[float, SubjectScores]


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """What is drawn and scored.

    Attributes:
      source: the run or the folder of images.
      output: receives everything that is written.
      draws: whether the images are drawn here.
      subjects: the concepts.
      left_out: why other concepts are not among them, by name.
      prompt_set: what is drawn of each.
      settings: how it is drawn.
      seeds: of every prompt.
      classes: class words for prior preservation, sorted.
      plain: whether the plain model is drawn and scored too.
      all_steps: whether intermediate concept files are scored too.
      num_prior_images: images of other classes for each concept.
      gallery: whether pictures are ranked among the photos of their class.
      scales: strengths of the concepts for the frontier, with the first seed.
    """

    source: Path
    output: Path
    draws: bool
    subjects: Sequence[Subject]
    left_out: Mapping[str, str]
    prompt_set: PromptSet
    settings: SamplingSettings
    seeds: range
    classes: Sequence[str]
    plain: bool
    all_steps: bool
    num_prior_images: int
    gallery: bool = False
    scales: Sequence[float] = ()

    @property
    def images(self) -> Path:
        """The folder of the images of the method under evaluation."""
        return self.output / "images" if self.draws else self.source

    def _steps(self) -> list[int]:
        """Training steps that have a concept file, where they are wanted; reads every folder."""
        if not self.all_steps:
            return []
        return sorted({step for subject in self.subjects for step in subject.steps()})

    def _step_folder(self, step: int) -> Path:
        return self.output / "steps" / f"{step:06d}"

    def _scale_folder(self, scale: float) -> Path:
        short = f"{scale:g}"
        return self.output / "scales" / (short if float(short) == scale else repr(scale))

    @property
    def _other_scales(self) -> list[float]:
        """Those that are drawn for the frontier: at 1 the images are there anyhow."""
        return [scale for scale in self.scales if scale != 1] if self.draws else []

    # ------------------------------------------------------------------ drawing

    @functools.cached_property
    def _planned(self) -> tuple[list[PlannedImage], list[PlannedImage]]:
        """The images of the method under evaluation, and all, in the order of drawing."""
        subjects, prompt_set = self.subjects, self.prompt_set
        scored: list[PlannedImage] = plan_images(self.images, subjects, prompt_set, self.seeds)
        planned = list(scored)
        if self.plain:
            folder = self.output / "plain_images"
            planned += plan_images(folder, subjects, prompt_set, self.seeds, plain=True)
        for step in self._steps():
            folder, first = self._step_folder(step), self.seeds[:1]
            planned += plan_images(folder, subjects, prompt_set, first, step=step)
        for scale in self._other_scales:
            folder, first = self._scale_folder(scale), self.seeds[:1]
            planned += plan_images(folder, subjects, prompt_set, first, scale=scale)
        if self.num_prior_images:
            planned += plan_prior(
                self.images,
                subjects,
                prompt_set,
                self.classes,
                self.seeds[0],
                self.num_prior_images,
            )
        return scored, planned

    @functools.cached_property
    def scored_files(self) -> frozenset[Path] | None:
        """What is scored of the images that lie there; None is all, where others have drawn them.
        An earlier evaluation with other options may have left more.
        """
        return frozenset(image.path for image in self._planned[1]) if self.draws else None

    def draw(
        self, backbone: Backbone, on_image: Callable[[int, int], None] | None
    ) -> tuple[int, int]:
        """Draw what is missing through one program; (images drawn, images in all)."""
        scored, planned = self._planned
        # asked once about the set, not page by page: prior images name no concept on purpose
        for message in prompt_warnings(backbone.tokenizers, [image.request for image in scored]):
            logger.warning(message)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if on_image is not None:
                on_image(done, len(planned))

        with _quiet("catversion_jax.sampling.denoising"):
            return draw_missing(backbone, planned, self.settings, advance), len(planned)

    # ------------------------------------------------------------------ scoring

    def score(
        self, scorer: Scorer, backbone: Backbone | None
    ) -> tuple[Evaluation, dict[str, References]]:
        """Everything that is scored, with the protocol, and the training images of what is.

        A concept whose images cannot be read is left out of everything, with the reason.

        Raises:
          CatVersionError: no concept is left.
        """
        resolution = 0 if backbone is None else backbone.default_resolution
        found: dict[str, _Scored] = {}
        left_out = dict(self.left_out)
        for subject in self.subjects:
            try:
                references = read_references(subject, scorer.masker, resolution)
                found[subject.name] = self._score(scorer, subject, references)
            except CatVersionError as error:
                left_out[subject.name] = str(error)
        if not found:
            raise CatVersionError(next(iter(left_out.values())))
        scored = found.values()
        methods = {
            method: [one.methods[method] for one in scored] for method in next(iter(scored)).methods
        }
        galleries = {}
        if self.gallery:
            for method, subjects in methods.items():
                methods[method], galleries[method] = rank_galleries(subjects)
        evaluation = Evaluation(
            self._protocol(scorer, backbone, next(iter(methods.values()))),
            methods,
            {name: one.prior for name, one in found.items() if one.prior is not None},
            {name: one.curve for name, one in found.items() if one.curve},
            left_out,
            galleries,
            "DINO" if scorer.dino is None else scorer.dino.kind,
            self._frontier(list(scored), methods),
        )
        return evaluation, {name: one.references for name, one in found.items()}

    def _score(self, scorer: Scorer, subject: Subject, references: References) -> _Scored:
        """One concept."""
        score = functools.partial(scorer.score, subject, references, only=self.scored_files)
        final = score(self.images)
        methods = {"CatVersion" if self.draws else self.source.name: final}
        if self.draws and self.plain:
            folder = self.output / "plain_images"
            methods["plain model"] = score(folder)
        prior = score_prior(self.images, subject, self.classes, scorer.clip, only=self.scored_files)
        curve = self._curve(score, subject, final)
        scales = {scale: score(self._scale_folder(scale)) for scale in self._other_scales}
        return _Scored(references, methods, prior, curve, scales)

    def _frontier(
        self, scored: Sequence[_Scored], methods: Mapping[str, Sequence[SubjectScores]]
    ) -> list[FrontierPoint]:
        """Scores over the scale; the plain model, where it is drawn, stands at 0."""
        if not self._other_scales:
            return []
        by_scale: dict[float, Sequence[SubjectScores]] = {
            scale: [one.scales[scale] for one in scored] for scale in self._other_scales
        }
        if 1 in self.scales:
            by_scale[1.0] = next(iter(methods.values()))
        if "plain model" in methods:
            by_scale[0.0] = methods["plain model"]
        return frontier_points(by_scale)

    def _curve(
        self, score: Callable[[Path], SubjectScores], subject: Subject, final: SubjectScores
    ) -> list[tuple[int, Scores]]:
        """Scores of the first seed over the training step."""
        if not self.all_steps or subject.concept is None:
            return []
        points = [(step, score(self._step_folder(step)).total) for step in subject.steps()]
        return [*points, (subject.concept.step, final.first_seed)] if points else []

    def _protocol(
        self, scorer: Scorer, backbone: Backbone | None, subjects: Sequence[SubjectScores]
    ) -> dict[str, Any]:
        """What must be the same for two tables to be comparable."""
        clip, dino, prompts = scorer.clip, scorer.dino, self.prompt_set
        protocol: dict[str, Any] = {"source": str(self.source)}
        if backbone is not None and self.draws:
            protocol |= {
                "model": backbone.name,
                **{key.replace("_", " "): v for key, v in backbone.fingerprints.items()},
                **_drawn_with(self.settings, backbone),
            }
        else:
            drawn_with = recorded_settings(subjects[0].prompts[0].shown)
            protocol["drawn with"] = drawn_with or "the files do not say"
            protocol["mask model"] = "none" if backbone is None else backbone.name
        protocol["seeds"] = sorted({seed for subject in subjects for seed in subject.seeds})
        if any(subject.held_out for subject in subjects):
            protocol["photos"] = _compared_with(subjects)
        return protocol | {
            "prompt set": f"{prompts.name} ({len(prompts.prompts)} prompts)",
            "prompt form": "the class word alone calls the concept; edit text = the prompt without "
            "its noun phrase",
            "clip": f"{clip.name} (sha256 {clip.sha256})",
            "dino": "none" if dino is None else f"{dino.name} (sha256 {dino.sha256})",
            "masks": _MASK_POLICY,
            "classes for zero-shot": self.classes,
            "intervals": "95 %, percentile bootstrap over concepts",
            "platform": jax.default_backend(),
            "software": f"catversion_jax {__version__}",
        }


def _compared_with(subjects: Sequence[SubjectScores]) -> str:
    """Which photos the image scores are against."""
    without = [subject.name for subject in subjects if not subject.held_out]
    names = f"{', '.join(without[:5])}{' ...' if len(without) > 5 else ''}"
    held_out = f"held out from training for {len(subjects) - len(without)} concepts"
    others = f"; training images for {len(without)} ({names})" if without else ""
    return f"{held_out}{others}; copies are counted against the training images"


def _drawn_with(settings: SamplingSettings, backbone: Backbone) -> dict[str, Any]:
    """The settings in force; what is None is the model's own."""
    settings = settings.over(backbone.drawing_defaults)
    given = {key: v for key, v in dataclasses.asdict(settings).items() if v is not None}
    own = backbone.default_resolution
    return {**given, **{key: given.get(key, own) for key in ("height", "width")}}


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of one logger."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
