"""Which images and words a run trains on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from catversion_jax.config.options import Options, option
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.shards import parse_shard


@dataclasses.dataclass(frozen=True)
class DataOptions(Options):
    """Images and words."""

    concepts: str = option(
        "",
        "What to personalize: a folder of images, a folder of such folders, a manifest, or a "
        "Hugging Face dataset (required).",
        decides_result=False,  # the concept files name the images themselves
        aliases=("train_data_dir", "instance_data_dir", "concepts_list"),
    )
    shard: str | None = option(
        None,
        "Which part of the list this process trains: i/n takes the concepts whose name has the "
        "hash i modulo n, i counted from 0, and auto/n takes i from the environment "
        "(JOB_COMPLETION_INDEX, SLURM_ARRAY_TASK_ID, SKYPILOT_JOB_RANK). null takes both numbers "
        "from SkyPilot's pools and Slurm's job arrays, and else is 0/1, the whole list.",
        decides_result=False,
    )
    base_class: str | None = option(
        None,
        "Word or words that say what a concept is a kind of, such as teapot; used for concepts "
        "that do not name their own.",
        decides_result=True,
    )
    dataset_split: str = option(
        "train", "Split that is read of a Hugging Face dataset.", decides_result=True
    )
    image_column: str = option(
        "image", "Dataset column that holds the images (diffusers).", decides_result=True
    )
    concept_column: str | None = option(
        None,
        "Dataset column that names the concept of each example; without it the whole dataset is "
        "one concept.",
        decides_result=True,
    )
    base_class_column: str | None = option(
        None, "Dataset column that holds the base class of each example.", decides_result=True
    )
    resolution: int | None = option(
        None,
        "Side of the square training images in pixels; null takes the model's own (SD 1.x: 512, "
        "official).",
        decides_result=True,
        at_least=8,
    )
    crop: Literal["center", "squash"] = option(
        "center",
        "How an image becomes square: center keeps the middle (diffusers), squash changes the "
        "aspect ratio (official).",
        decides_result=True,
    )
    random_flip: float = option(
        0.5,
        "Probability that a training step sees an image mirrored (official); concept.json can set "
        "another one for its concept.",
        decides_result=True,
        at_least=0.0,
        at_most=1.0,
    )
    alpha: Literal["white", "mask"] = option(
        "white",
        "What transparency in an image means: white composites the image on white, mask also "
        "takes the opaque part as the object mask.",
        decides_result=True,
    )
    mask_polarity: Literal["white", "black"] | None = option(
        None,
        "What the object is in mask files, and that they are meant as they are; null takes white "
        "and lets masked_training refuse masks that are empty or look inverted. concept.json can "
        "set it for its concept.",
        decides_result=True,
    )
    holdout: int = option(
        0,
        "Number of each concept's last photos that are kept from training, for evaluate to score "
        "against (0: scores against training photos, as published, which are too high: arXiv "
        "2503.06632); a concept that would keep fewer than 3, or has eval_images, is left as it "
        "is.",
        decides_result=False,  # the concept files name the images themselves
        at_least=0,
        at_most=1000,
    )
    max_megapixels: float = option(
        100.0,
        "Largest image that is decoded, in millions of pixels; a small file can claim to be huge.",
        decides_result=False,
        at_least=0.01,
        at_most=178.0,  # where Pillow refuses
    )
    instance_prompt: str = option(
        "{base_class}",
        "Template of the training prompts, in which {base_class} stands for the base class "
        "(official: the bare word); object and style are the template lists of textual inversion.",
        decides_result=True,
    )

    def contradictions(self) -> list[str]:
        """What is no part of a list."""
        problems = super().contradictions()
        if self.shard is not None:
            try:
                parse_shard(self.shard)
            except CatVersionError as error:
                problems.append(str(error))
        return problems
