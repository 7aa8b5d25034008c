"""``catversion_jax.evaluate``: draw every prompt of a set, score the images, write the report."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from catversion_jax.concepts import ConceptList
from catversion_jax.concepts.mask_files import MaskMaker
from catversion_jax.config.gate import GateSettings
from catversion_jax.config.sampling import (
    MAX_IMAGES_PER_PROMPT,
    check_count,
    sampling_settings,
)
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.evaluation.dreambench_plus import export_dreambench_plus
from catversion_jax.evaluation.frontier import check_scales
from catversion_jax.evaluation.gate import GateResult, judge, write_gate
from catversion_jax.evaluation.job import EvaluationJob
from catversion_jax.evaluation.page import PageMaterial, write_evaluation_page
from catversion_jax.evaluation.prompts import class_key, load_prompt_set
from catversion_jax.evaluation.scoring import Scorer
from catversion_jax.evaluation.subjects import (
    Subject,
    read_run,
    subjects_of_images,
)
from catversion_jax.evaluation.tables import Evaluation, write_scores
from catversion_jax.models.embedders import ClipEmbedder, DinoEmbedder, own_clip
from catversion_jax.models.stable_diffusion import Backbone, load_model
from catversion_jax.runtime.atomic_files import make_folder
from catversion_jax.runtime.bucket_paths import as_path, embedded_or_given, home_expanded
from catversion_jax.sampling.class_word_masks import class_word_masks
from catversion_jax.sampling.requests import ConceptUse, check_concept
from catversion_jax.training.run.names import EVALUATION_FOLDER, GATE_FILE
from catversion_jax.training.run.reader import is_run, recorded_concepts, recorded_model

logger = logging.getLogger(__name__)

_BATCH_SIZE = 4
"""Images denoised together where nothing else is said; fixed, so that a machine gives the same
bits."""


def evaluate(
    source: str | Path,
    *,
    prompts: str = "dreambench",
    concepts: str | Path | ConceptList | None = None,
    base_class: str | None = None,
    holdout: int | None = None,
    model: str | Path | Backbone | None = None,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: str | None = None,
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    num_images_per_prompt: int | None = None,
    seed: int = 0,
    plain: bool = False,
    all_steps: bool = False,
    num_prior_images: int = 8,
    gallery: bool = False,
    scales: Sequence[float] = (),
    gate: GateSettings | bool = False,
    dreambench_plus: str | Path | None = None,
    classes: Sequence[str] = (),
    force: bool = False,
    output_dir: str | Path | None = None,
    report: str | Path | None = None,
    on_image: Callable[[int, int], None] | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    karras: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Score the concepts of a run, or the images of any method, and write the scores and a page.

    Images that are there already, drawn with the same settings, are kept.

    Args:
      source: the output folder of training (or the folder of one concept in it), whose concepts are
        drawn; or a folder of images as ``IMAGES/<concept>/<prompt>_<seed>.png``.
      prompts: a prompt set that ships (``"dreambench"``, ``"catversion"``, ``"tiny"``), or a text
        or YAML file with ``{}`` for the class word.
      concepts: the photos that the images are compared with: a folder or manifest, or what
        ``read_concepts`` returned. None is where the run says they were. Photos that were held out
        from training (``eval_images``, ``holdout``) are compared with in place of the training
        images, where a concept has any.
      base_class: base class of concepts that do not name their own.
      holdout: how many of each concept's last photos were held out; None is what the run says, and
        0 for a folder of images.
      model: the model that draws, and that makes missing masks: a diffusers folder, a Hugging Face
        hub id, or a backbone that is loaded already. None is the one the run was trained on.
      revision: branch, tag or commit of the hub id.
      variant: variant of the weight files, for instance ``"fp16"``.
      prediction_type: ``"epsilon"`` or ``"v_prediction"``, for a single-file model that does not
        say it.
      dtype: ``"float32"`` or ``"bfloat16"`` for text encoder and UNet; None is float32 on CPU, else
        bfloat16.
      clip: a folder of a transformers ``CLIPModel``, which scores; None is the model's own
        ``clip/`` folder.
      dino: a folder of a transformers ``ViTModel``, which gives a second image score, or of a
        ``Dinov2Model`` or ``Dinov2WithRegistersModel``, which also judges objects without their
        background, by the nearest photo, and in the gallery; or ``"tiny-sd-judge"``, which ships
        and does the same for pictures of tiny-sd's world.
      num_images_per_prompt: seeds of each prompt; None is what the prompt set says.
      seed: of the first image of every prompt.
      plain: also draw and score the model without concepts, with the same seeds.
      all_steps: also score the concept files of intermediate steps, with the first seed.
      num_prior_images: images per concept of other classes with the concept forced on; 0 leaves
        prior preservation out.
      gallery: also rank each image among the photos of all concepts of its class: whether it is
        nearest to its own concept's.
      scales: also draw with these strengths of the concepts and the first seed, for a plot of image
        against text score.
      gate: whether the concepts that fail the quality gate are written to ``gate.json``, which
        ``train`` with ``retrain="failed"`` reads; it includes ``plain`` and ``gallery``.
        ``catversion_jax.config.GateSettings(...)`` has other thresholds than the usual ones.
      dreambench_plus: a folder that also receives photos, prompts and images in DreamBench++'s
        layout, for other judges.
      classes: class words for these images besides those of the concepts.
      force: use a concept though it was trained with another text encoder of the same shape.
      output_dir: receives ``scores.csv``, ``scores.json``, ``report.html`` and ``images/``; None is
        the folder ``evaluation`` in ``source``.
      report: path of the page; None is ``report.html`` in ``output_dir``.
      on_image: is called with (images done, images in all) while drawing.
      sampler: how images are drawn. ``catversion_jax.generate`` describes this and the next
        options and their defaults.
      num_inference_steps: denoising steps.
      guidance_scale: weight of classifier-free guidance.
      eta: of the ddim sampler.
      karras: Karras spacing of the noise levels.
      height: pixels.
      width: pixels.
      batch_size: images denoised together on each device; None is 4.

    Returns:
      The scores by method and concept. ``print(evaluation)`` shows the table, ``.files`` are the
      files that were written.

    Raises:
      CatVersionError: the source holds nothing to score, the training images, CLIP or the model are
        missing, or a setting that cannot be.

    Example:
      >>> import catversion_jax as cv
      >>> evaluation = cv.evaluate("runs/mine", prompts="tiny", plain=True)
      >>> evaluation.methods["CatVersion"][0].total.overall_masked
      0.41
    """
    settings = sampling_settings(
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        eta=eta,
        karras=karras,
        height=height,
        width=width,
        batch_size=_BATCH_SIZE if batch_size is None else batch_size,
    )
    _check_types(prompts, concepts, classes, seed, num_images_per_prompt, num_prior_images)
    scales = check_scales(scales)
    prompt_set = load_prompt_set(prompts)
    count = num_images_per_prompt
    count = prompt_set.num_images_per_prompt if count is None else count
    check_count("num_images_per_prompt", count, MAX_IMAGES_PER_PROMPT)
    if not 0 <= num_prior_images <= MAX_IMAGES_PER_PROMPT:
        raise CatVersionError(
            f"num_prior_images={num_prior_images}: must be within 0..{MAX_IMAGES_PER_PROMPT}."
        )
    gate_settings = GateSettings() if gate is True else gate or None
    if gate_settings is not None and not isinstance(gate_settings, GateSettings):
        raise CatVersionError(f"gate={shown(gate)}: must be true, false or GateSettings(...).")
    plain_asked = plain
    if gate_settings is not None:
        plain = gallery = True
    folder = as_path(source)
    if isinstance(concepts, str | Path):
        concepts = recorded_concepts(folder, holdout, source=str(concepts), base_class=base_class)
    elif base_class is not None:
        raise CatVersionError(
            f"base_class={shown(base_class)}: is for concepts that --concepts names; those of a "
            "run say their own. Give --concepts too, or leave it out."
        )
    subjects, left_out, draws = _subjects(folder, concepts, holdout)
    if not draws and (plain_asked or all_steps or scales):
        raise CatVersionError(
            f"{folder}: is a folder of images; plain, all_steps and scales draw more of them, for "
            "which the output folder of training is needed. Leave them out, or give that."
        )
    words = sorted({word.strip() for word in classes} - {""})
    words += [subject.base_class for subject in subjects]
    job = EvaluationJob(
        source=folder,
        output=folder / EVALUATION_FOLDER if output_dir is None else as_path(output_dir),
        draws=draws,
        subjects=subjects,
        left_out=left_out,
        prompt_set=prompt_set,
        settings=settings,
        seeds=range(seed, seed + count),
        classes=sorted({class_key(word): word for word in words}.values()),
        plain=plain,
        all_steps=all_steps,
        num_prior_images=num_prior_images,
        gallery=gallery,
        scales=scales,
    )
    backbone = None
    if draws or model is not None:
        backbone = load_model(
            _model_of(folder) if model is None else model,
            revision=revision,
            variant=variant,
            prediction_type=prediction_type,
            dtype=dtype,
        )
        _check_concepts(subjects, backbone, force=force)
    scorer = Scorer(
        ClipEmbedder(_clip_folder(clip, backbone)),
        prompt_set,
        dino=None if dino is None else DinoEmbedder(embedded_or_given(dino)),
        masker=_masker(backbone),
    )
    make_folder(job.output)
    drawn = planned = 0
    if backbone is not None and draws:
        drawn, planned = job.draw(backbone, on_image)
    evaluation, references = job.score(scorer, backbone)
    if gate_settings is not None:
        found = _gate(evaluation, gate_settings, subjects)
        evaluation = dataclasses.replace(evaluation, gate=found)
    losses = {s.name: s.eval_losses() for s in subjects if s.name in references}
    page = job.output / "report.html" if report is None else as_path(report)
    files = write_scores(job.output, evaluation)
    files.append(
        write_evaluation_page(page, evaluation, PageMaterial(references, scorer.clip.mean, losses))
    )
    if evaluation.gate is not None:
        files.append(write_gate(job.output / GATE_FILE, evaluation.gate))
    if dreambench_plus is not None:
        out = as_path(dreambench_plus)
        export_dreambench_plus(
            out, job.images, subjects, references, prompt_set, only=job.scored_files
        )
        files.append(out)
    return dataclasses.replace(evaluation, files=tuple(files), num_images=planned, num_drawn=drawn)


def _check_types(
    prompts: object,
    concepts: object,
    classes: object,
    seed: object,
    num_images_per_prompt: object,
    num_prior_images: object,
) -> None:
    """Make sure that these arguments of :func:`evaluate` are of their types.

    Raises:
      CatVersionError: one is not.
    """
    if not isinstance(prompts, str):
        raise CatVersionError(f"prompts={shown(prompts)}: must be the name of a set, or a file.")
    if not (concepts is None or isinstance(concepts, str | Path | ConceptList)):
        raise CatVersionError(
            f"concepts={shown(concepts)}: must be a path, or what read_concepts returned."
        )
    words = classes if isinstance(classes, Sequence) and not isinstance(classes, str) else [None]
    if not all(isinstance(word, str) for word in words):
        raise CatVersionError(
            f'classes={shown(classes)}: must be a list of class words, such as ["dog", "cup"].'
        )
    numbers = {"seed": seed, "num_prior_images": num_prior_images}
    if num_images_per_prompt is not None:
        numbers["num_images_per_prompt"] = num_images_per_prompt
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise CatVersionError(f"{name}={shown(value)}: must be a whole number.")


def _subjects(
    folder: Path, concepts: ConceptList | None, holdout: int | None
) -> tuple[list[Subject], dict[str, str], bool]:
    """The concepts to evaluate, why others cannot be, and whether all are of a run and drawn."""
    if not folder.is_dir():
        raise CatVersionError(
            f"{folder}: is no folder. Give the output folder of catversion train, or a folder of "
            "images."
        )
    if is_run(folder):
        return *read_run(folder, concepts, holdout), True
    if concepts is None:
        raise CatVersionError(
            f"{folder}: holds no trained concept, so it is taken as a folder of images; give the "
            "training images they are compared with: --concepts."
        )
    return *subjects_of_images(folder, concepts), False


def _gate(
    evaluation: Evaluation, settings: GateSettings, subjects: Sequence[Subject]
) -> GateResult:
    scored = next(iter(evaluation.methods.values()))
    plain = evaluation.methods.get("plain model", ())
    updates = {s.name: s.concept.step for s in subjects if s.concept is not None}
    return judge(scored, plain, settings, updates)


def _model_of(folder: Path) -> str:
    name = recorded_model(folder)
    if name is None:
        raise CatVersionError(
            f"{folder}: does not say which model it was trained on. Give it with --model."
        )
    return name


def _check_concepts(subjects: Sequence[Subject], backbone: Backbone, *, force: bool) -> None:
    """Make sure that every concept was made for this model."""
    for subject in subjects:
        if subject.concept is not None:
            concept = subject.concept
            check_concept(backbone, ConceptUse.of(concept), concept.fingerprints, force=force)


def _masker(backbone: Backbone | None) -> MaskMaker | None:
    """Makes the masks that are missing; None where no model is at hand that can."""
    if backbone is None:
        return None
    if backbone.inpaints:
        logger.warning(
            f"{backbone.name}: is an inpainting model, whose attention makes no masks: pictures "
            "without a mask file get no masked scores."
        )
        return None
    return functools.partial(class_word_masks, backbone)


def _clip_folder(given: str | Path | None, backbone: Backbone | None) -> Path:
    if given is not None:
        return home_expanded(given)
    if backbone is not None and (own := own_clip(backbone.folder)):
        return own
    raise CatVersionError(
        "--clip: needed, the model has no clip/ folder of its own. Give a transformers CLIPModel "
        "folder; openai/clip-vit-base-patch32 for published comparisons."
    )
