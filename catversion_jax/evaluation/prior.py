"""What a concept does to everything else: the prior preservation of one concept.

Four kinds of images, drawn with the same seeds (folders of ``image_folders.py``):

    _plain   the model without any concept
    off      the concept at scale 0, its own class: must be the plain images bit for bit
    other    the concept as its file says, another class: under ``class_word`` bit for bit too
    prior    the concept forced on every prompt (``when=always``), other classes: how far images
             drift, and whether CLIP still finds their class among those of the run (zero-shot)

A method without such a switch (DreamBooth, say) gives ``_plain`` and ``prior`` only; Textual
Inversion's vectors stand for the class word and cannot be forced, so it has no ``prior``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from catversion_jax.concepts.folders import children
from catversion_jax.concepts.prompts import with_class_word
from catversion_jax.evaluation.alignment import matched_cosines
from catversion_jax.evaluation.generation import PlannedImage
from catversion_jax.evaluation.image_folders import PLAIN_FOLDER, image_name, read_pixels
from catversion_jax.evaluation.prompts import PromptSet, class_key
from catversion_jax.evaluation.subjects import Subject
from catversion_jax.models.embedders import ClipEmbedder
from catversion_jax.sampling.png import slug
from catversion_jax.sampling.requests import ConceptUse, ImageRequest

ZERO_SHOT_PROMPT = "a {}"


@dataclasses.dataclass(frozen=True)
class PriorScores:
    """Prior preservation of one concept; None where its images are not there.

    Attributes:
      images: pairs in ``drift``.
      drift: mean of 1 - cosine between image with the concept forced on and plain image.
      class_kept: share of those images that CLIP still assigns to their own class.
      class_kept_plain: the same share of the plain images.
      off_identical: whether the switched-off concept gives the plain image bit for bit.
      other_identical: whether, used as its file says, it leaves another class's image bit for bit.
    """

    images: int
    drift: float | None
    class_kept: float | None
    class_kept_plain: float | None
    off_identical: bool | None
    other_identical: bool | None


def plan_prior(
    folder: Path,
    subjects: Sequence[Subject],
    prompt_set: PromptSet,
    classes: Sequence[str],
    seed: int,
    num_images: int,
) -> list[PlannedImage]:
    """The images of all four kinds, of every concept.

    Args:
      folder: the images folder.
      subjects: those without a concept are left out.
      prompt_set: whose prompts are used, in turn.
      classes: the class words; a concept's others are drawn in turn, from the one after its own
        on, so that many concepts test all of them.
      seed: of the first round through the prompts.
      num_images: of kind ``prior`` for each concept.
    """
    planned: list[PlannedImage] = []
    for subject in subjects:
        if subject.concept is None:
            continue
        own = folder / subject.name
        off = ConceptUse.of(subject.concept, scale=0.0)
        planned += _with_plain(folder, own / "off", prompt_set, subject.base_class, seed, 0, off)
        others = _others(classes, subject.base_class)
        if not others:
            continue
        as_used = ConceptUse.of(subject.concept)
        planned += _with_plain(folder, own / "other", prompt_set, others[0], seed, 0, as_used)
        if subject.concept.learned.replaces_word:
            continue  # it stands for its class word, so it cannot act where that is not written
        forced = ConceptUse.of(subject.concept, when="always")
        planned += plan_drift(folder, subject, prompt_set, classes, seed, num_images, forced)
    # concepts share plain images; what has one path and is not the same is refused when it is drawn
    unique = {(one.path, one.request.prompt, one.request.seed): one for one in planned}
    return list(unique.values())


def plan_drift(
    folder: Path,
    subject: Subject,
    prompt_set: PromptSet,
    classes: Sequence[str],
    seed: int,
    num_images: int,
    use: ConceptUse | None,
) -> list[PlannedImage]:
    """The images of kind ``prior`` of one concept, and the plain ones beside them.

    ``use`` is None where the concept is the model itself; other arguments as for
    :func:`plan_prior`.
    """
    others = _others(classes, subject.base_class)
    kind = folder / subject.name / "prior"
    return [
        image
        for turn in range(num_images if others else 0)
        for image in _with_plain(
            folder, kind, prompt_set, others[turn % len(others)], seed, turn, use
        )
    ]


def _others(classes: Sequence[str], base_class: str) -> list[str]:
    """All but one, beginning after it."""
    keys, own = list(map(class_key, classes)), class_key(base_class)
    start = keys.index(own) + 1 if own in keys else 0
    turned = [*classes[start:], *classes[:start]]
    return [word for word in turned if class_key(word) != own]


def _with_plain(
    folder: Path,
    kind: Path,
    prompt_set: PromptSet,
    base_class: str,
    seed: int,
    turn: int,
    use: ConceptUse | None,
) -> list[PlannedImage]:
    """One image, and the plain model's of the same name."""
    prompts = prompt_set.of(base_class)
    text = prompts[turn % len(prompts)].filled(base_class)
    number = seed + turn // len(prompts)
    name = f"{slug(base_class)}--{image_name(text, number)}"
    return [
        PlannedImage(kind / name, ImageRequest(text, (use,) if use else (), number)),
        PlannedImage(folder / PLAIN_FOLDER / name, ImageRequest(text, (), number)),
    ]


def score_prior(
    folder: Path,
    subject: Subject,
    classes: Sequence[str],
    clip: ClipEmbedder,
    only: Container[Path] | None = None,
) -> PriorScores | None:
    """Compare a concept's images, or those among ``only``, with the plain model's of the same name;
    None without any.
    """
    own = folder / subject.name
    pairs = _pairs(folder, own / "prior", classes, only)
    off, other = _identical(folder, own / "off", only), _identical(folder, own / "other", only)
    if not pairs:
        if off is None and other is None:
            return None
        return PriorScores(0, None, None, None, off, other)
    changed = clip.images([read_pixels(path) for path, _, _ in pairs])
    plain = clip.images([read_pixels(path) for _, path, _ in pairs])
    words = clip.texts([with_class_word(ZERO_SHOT_PROMPT, word) for word in classes])
    truth = np.array([number for _, _, number in pairs])
    return PriorScores(
        len(pairs),
        float((1.0 - matched_cosines(changed, plain)).mean()),
        float(((changed @ words.T).argmax(axis=1) == truth).mean()),
        float(((plain @ words.T).argmax(axis=1) == truth).mean()),
        off,
        other,
    )


def _pairs(
    folder: Path, kind: Path, classes: Sequence[str], only: Container[Path] | None
) -> list[tuple[Path, Path, int]]:
    """(image, plain image, number of the class) of every image that has its counterpart."""
    names = list(map(slug, classes))
    numbers = {name: i for i, name in enumerate(names) if names.count(name) == 1}
    return [
        (path, plain, numbers[word])
        for path, plain in _counterparts(folder, kind, only)
        if (word := path.name.partition("--")[0]) in numbers
    ]


def _identical(folder: Path, kind: Path, only: Container[Path] | None) -> bool | None:
    pairs = _counterparts(folder, kind, only)
    if not pairs:
        return None
    return all(np.array_equal(read_pixels(path), read_pixels(plain)) for path, plain in pairs)


def _counterparts(
    folder: Path, kind: Path, only: Container[Path] | None
) -> list[tuple[Path, Path]]:
    if not kind.is_dir():
        return []
    drawn = [path for path in children(kind) if only is None or path in only]
    pairs = [(path, folder / PLAIN_FOLDER / path.name) for path in drawn]
    return [(path, plain) for path, plain in pairs if plain.is_file()]
