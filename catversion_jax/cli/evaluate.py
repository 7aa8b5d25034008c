"""``catversion evaluate RUN|IMAGES``: draw every prompt of a set, score, and write a report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catversion_jax import __version__
from catversion_jax.cli.model_arguments import (
    add_dtype_argument,
    add_sampling_arguments,
    given_sampling_settings,
)
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.errors import CatVersionError

if TYPE_CHECKING:
    from catversion_jax.concepts import ConceptList
    from catversion_jax.evaluation.generation import PlannedImage
    from catversion_jax.evaluation.prompts import PromptSet
    from catversion_jax.evaluation.scoring import Scorer, Scores, SubjectScores
    from catversion_jax.evaluation.subjects import References
    from catversion_jax.evaluation.tables import Evaluation
    from catversion_jax.models.stable_diffusion import Backbone

logger = logging.getLogger(__name__)

# Denoised together where --batch_size says nothing; fixed, so that a machine gives the same bits.
_BATCH_SIZE = 4
_MASK_POLICY = (
    "given files, else alpha, else made from the drawing model's attention to the class word where "
    "there is a model; both sides masked, background in CLIP's mean colour, square crop "
    "around the mask with 10 % margin; images with an empty mask or none left out"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; sampling options are those of ``catversion generate``."""
    parser.epilog = (
        "Images of any method are scored from IMAGES/<concept>/<prompt>_<seed>.png (a prompt's "
        "words joined by '-',\nor its number in the set from 0; <prompt>_<seed>.mask.png beside "
        "it, object white) or as catversion generate\nwrote them, one --output_dir per concept. "
        "docs/results/evaluation.md has the definitions."
    )
    add = parser.add_argument
    add("source", metavar="RUN|IMAGES",
        help="output folder of training, or a folder of images, see below")  # fmt: skip
    add("--clip", help="transformers CLIPModel folder that scores [the model's own clip/ folder]")
    add("--prompts", default="dreambench", metavar="NAME|FILE",
        help="dreambench, catversion, tiny; or .txt/.yaml with {} for the class word "
             "[dreambench]")  # fmt: skip
    add("--concepts", help="the training images [where the run says they were]")
    add("--base_class", help="base class of concepts that do not name their own")
    add(
        "--model", help="model that draws, and makes missing masks [the one the run was trained on]"
    )
    add("--revision", help="hub revision of the model")
    add("--variant", help="weight file variant, for example fp16")
    add("--dino", help="transformers ViTModel folder (DreamBench: facebook/dino-vits16)")
    add("--num_images_per_prompt", type=int, help="seeds per prompt [as the prompt set says]")
    add("--seed", type=int, default=0, help="of the first image of every prompt [0]")
    add("--plain", action="store_true",
        help="also draw and score the model without concepts, same seeds")  # fmt: skip
    add("--all_steps", action="store_true",
        help="also score the run's intermediate concept files, first seed only")  # fmt: skip
    add("--num_prior_images", type=int, default=8,
        help="images per concept of other classes, concept forced on; 0: none [8]")  # fmt: skip
    add("--classes", help="comma-separated class words for these [the evaluated concepts']")
    add("--force", action="store_true",
        help="use a concept though it was trained with another text encoder")  # fmt: skip
    add("--output_dir", help="receives scores.csv, scores.json, report.html and images/ "
        "[RUN/evaluation, IMAGES/evaluation]")  # fmt: skip
    add_sampling_arguments(parser)
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate; 0 when every concept was scored, 3 when the run has some that failed."""
    from catversion_jax.evaluation.prompts import load_prompt_set

    settings = given_sampling_settings(args)
    settings = dataclasses.replace(settings, batch_size=settings.batch_size or _BATCH_SIZE)
    prompt_set = load_prompt_set(args.prompts)
    count = args.num_images_per_prompt
    count = prompt_set.num_images_per_prompt if count is None else count
    if count < 1:
        raise CatVersionError(f"--num_images_per_prompt {count}: must be at least 1.")
    if args.num_prior_images < 0:
        raise CatVersionError(f"--num_prior_images {args.num_prior_images}: must be at least 0.")
    return _Command(args, settings, prompt_set, range(args.seed, args.seed + count)).run()


class _Command:
    """One evaluation, from the source to the report."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: SamplingSettings,
        prompt_set: PromptSet,
        seeds: range,
    ):
        from catversion_jax.evaluation.subjects import read_run, subjects_of_images
        from catversion_jax.training.run.reader import is_run

        self.args, self.settings, self.prompt_set, self.seeds = args, settings, prompt_set, seeds
        self.source = Path(args.source)
        if not self.source.is_dir():
            raise CatVersionError(
                f"{self.source}: is no folder. Give the output folder of catversion train, or a "
                "folder of images."
            )
        self.output = Path(args.output_dir or self.source / "evaluation")
        self.draws = is_run(self.source)
        concepts = self._given_concepts()
        if self.draws:
            self.subjects = read_run(self.source, concepts)
        elif concepts is None:
            raise CatVersionError(
                f"{self.source}: holds no trained concept, so it is taken as a folder of images; "
                "give the training images they are compared with: --concepts."
            )
        else:
            self.subjects = subjects_of_images(self.source, concepts)
        words = [word.strip() for word in (args.classes or "").split(",") if word.strip()]
        self.classes = sorted({*words, *(subject.base_class for subject in self.subjects)})

    def _given_concepts(self) -> ConceptList | None:
        from catversion_jax.concepts import read_concepts

        if self.args.concepts is None:
            return None
        return read_concepts(self.args.concepts, base_class=self.args.base_class)

    def run(self) -> int:
        """Draw, score, write, print."""
        from catversion_jax.evaluation.embedders import ClipEmbedder, DinoEmbedder
        from catversion_jax.evaluation.page import PageMaterial, write_evaluation_page
        from catversion_jax.evaluation.scoring import Scorer
        from catversion_jax.evaluation.tables import table_lines, write_scores
        from catversion_jax.runtime.atomic_files import make_folder
        from catversion_jax.sampling.class_word_masks import class_word_masks
        from catversion_jax.training.run.reader import failed_concepts

        backbone = self._load_model() if self.draws or self.args.model else None
        clip = ClipEmbedder(self._clip_folder(backbone))
        dino = None if self.args.dino is None else DinoEmbedder(self.args.dino)
        make_folder(self.output)
        images = self.output / "images" if self.draws else self.source
        steps = self._steps()
        if backbone is not None and self.draws:
            self._draw(backbone, images, steps)
        masker = None if backbone is None else functools.partial(class_word_masks, backbone)
        scorer = Scorer(clip, self.prompt_set, dino=dino, masker=masker)
        references = self._references(scorer, backbone)
        evaluation = self._score(scorer, backbone, images, steps, references)
        material = PageMaterial(
            references, clip.mean, {s.name: s.eval_losses() for s in self.subjects}
        )
        paths = write_scores(self.output, evaluation)
        paths.append(write_evaluation_page(self.output / "report.html", evaluation, material))
        print("\n".join(table_lines(evaluation)))
        print("\n" + "\n".join(map(str, paths)))
        failed = failed_concepts(self.source)
        for path in failed:
            print(f"{path.parent.name}: left out, its training failed: {path}", file=sys.stderr)
        return 3 if failed else 0

    # ------------------------------------------------------------------ drawing

    def _load_model(self) -> Backbone:
        import jax

        from catversion_jax.models.stable_diffusion import default_dtype, load_backbone
        from catversion_jax.runtime.sharding import make_mesh, replicated
        from catversion_jax.sampling.requests import ConceptUse, check_concept
        from catversion_jax.training.run.reader import recorded_model

        args = self.args
        name = args.model or recorded_model(self.source)
        if name is None:
            raise CatVersionError(
                f"{self.source}: does not say which model it was trained on. Give it with --model."
            )
        dtype = args.dtype or default_dtype()
        backbone = load_backbone(
            name,
            revision=args.revision,
            variant=args.variant,
            dtype=dtype,
            sharding=replicated(make_mesh(1, jax.local_devices())),
        )
        for subject in self.subjects:
            if subject.concept is not None:
                check_concept(
                    backbone,
                    ConceptUse.of(subject.concept),
                    subject.concept.text_encoder_sha256,
                    force=args.force,
                )
        return backbone

    def _clip_folder(self, backbone: Backbone | None) -> str | Path:
        if self.args.clip is not None:
            return self.args.clip
        if backbone is not None and (backbone.folder / "clip" / "config.json").is_file():
            return backbone.folder / "clip"
        raise CatVersionError(
            "--clip: needed, the model has no clip/ folder of its own. Give a transformers "
            "CLIPModel folder; openai/clip-vit-base-patch32 for published comparisons."
        )

    def _steps(self) -> list[int]:
        if not self.args.all_steps:
            return []
        return sorted({step for subject in self.subjects for step in subject.steps()})

    def _draw(self, backbone: Backbone, images: Path, steps: list[int]) -> None:
        """Every image of the evaluation through one program."""
        from tqdm import tqdm

        from catversion_jax.evaluation.generation import draw_missing, plan_images
        from catversion_jax.evaluation.prior import plan_prior
        from catversion_jax.sampling.requests import prompt_warnings

        subjects, prompt_set = self.subjects, self.prompt_set
        scored: list[PlannedImage] = plan_images(images, subjects, prompt_set, self.seeds)
        planned = list(scored)
        if self.args.plain:
            folder = self.output / "plain_images"
            planned += plan_images(folder, subjects, prompt_set, self.seeds, plain=True)
        for step in steps:
            folder, first = self.output / "steps" / f"{step:06d}", self.seeds[:1]
            planned += plan_images(folder, subjects, prompt_set, first, step=step)
        if self.args.num_prior_images:
            planned += plan_prior(
                images,
                subjects,
                prompt_set,
                self.classes,
                self.args.seed,
                self.args.num_prior_images,
            )
        # asked once about the set, not page by page: prior images name no concept on purpose
        for message in prompt_warnings(backbone.tokenizer, [image.request for image in scored]):
            logger.warning(message)
        bar = tqdm(total=len(planned), unit="image", desc="drawing")
        with _quiet("catversion_jax.sampling.denoising"), bar as progress:
            drawn = draw_missing(backbone, planned, self.settings, progress.update)
        print(f"{len(planned)} images, {len(planned) - drawn} of them were there already")

    # ------------------------------------------------------------------ scoring

    def _references(self, scorer: Scorer, backbone: Backbone | None) -> dict[str, References]:
        from catversion_jax.evaluation.subjects import read_references

        resolution = 0 if backbone is None else backbone.default_resolution
        return {
            subject.name: read_references(subject, scorer.masker, resolution)
            for subject in self.subjects
        }

    def _score(
        self,
        scorer: Scorer,
        backbone: Backbone | None,
        images: Path,
        steps: list[int],
        references: dict[str, References],
    ) -> Evaluation:
        from catversion_jax.evaluation.prior import score_prior
        from catversion_jax.evaluation.tables import Evaluation

        def scored(folder: Path) -> list[SubjectScores]:
            return [scorer.score(s, references[s.name], folder) for s in self.subjects]

        methods = {"CatVersion" if self.draws else self.source.name: scored(images)}
        if self.draws and self.args.plain:
            methods["plain model"] = scored(self.output / "plain_images")
        priors = {
            subject.name: prior
            for subject in self.subjects
            if (prior := score_prior(images, subject, self.classes, scorer.clip)) is not None
        }
        first = next(iter(methods.values()))
        curves = self._curves(scorer, references, steps, first) if steps else {}
        return Evaluation(self._protocol(scorer, backbone, first), methods, priors, curves)

    def _curves(
        self,
        scorer: Scorer,
        references: dict[str, References],
        steps: list[int],
        final: list[SubjectScores],
    ) -> dict[str, list[tuple[int, Scores]]]:
        curves: dict[str, list[tuple[int, Scores]]] = {}
        for subject, last in zip(self.subjects, final, strict=True):
            points = [
                (
                    step,
                    scorer.score(
                        subject, references[subject.name], self.output / "steps" / f"{step:06d}"
                    ).total,
                )
                for step in steps
                if step in subject.steps()
            ]
            if points and subject.concept is not None:
                curves[subject.name] = [*points, (subject.concept.step, last.first_seed)]
        return curves

    def _protocol(
        self, scorer: Scorer, backbone: Backbone | None, subjects: list[SubjectScores]
    ) -> dict[str, Any]:
        """What must be the same for two tables to be comparable."""
        import jax

        from catversion_jax.evaluation.image_folders import recorded_settings

        clip, dino, prompts = scorer.clip, scorer.dino, self.prompt_set
        protocol: dict[str, Any] = {"source": str(self.source)}
        if backbone is not None and self.draws:
            protocol |= {
                "model": backbone.name,
                "text encoder sha256": backbone.text_encoder_sha256,
                **_drawn_with(self.settings, backbone.default_resolution),
            }
        else:
            drawn_with = recorded_settings(subjects[0].prompts[0].shown)
            protocol["drawn with"] = drawn_with or "the files do not say"
            protocol["mask model"] = "none" if backbone is None else backbone.name
        protocol["seeds"] = sorted({seed for subject in subjects for seed in subject.seeds})
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


def _drawn_with(settings: SamplingSettings, default_resolution: int) -> dict[str, Any]:
    """The settings in force; what is None is the model's own."""
    given = {key: v for key, v in dataclasses.asdict(settings).items() if v is not None}
    return {**given, **{key: given.get(key, default_resolution) for key in ("height", "width")}}


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
