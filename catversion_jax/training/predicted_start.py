"""``init=predicted``: what a run needs to predict the start values of its concepts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from catversion_jax.array_types import Float
from catversion_jax.concepts.images import LoadedImage
from catversion_jax.config import MethodOptions
from catversion_jax.config.method import START_FILE
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.methods.concept_encoder import ConceptEncoder, load_concept_encoder
from catversion_jax.methods.learned import Learned
from catversion_jax.models.embedders import OWN_CLIP, ClipEmbedder, own_clip
from catversion_jax.models.stable_diffusion import Backbone


@dataclasses.dataclass(frozen=True)
class StartPredictor:
    """A concept encoder and the CLIP it sees photos with.

    Attributes:
      encoder: what ``fit-start`` fitted.
      clip: the CLIP of its features.
    """

    encoder: ConceptEncoder
    clip: ClipEmbedder

    @classmethod
    def of(cls, method: MethodOptions, backbone: Backbone) -> StartPredictor | None:
        """As the options say; None where ``init`` is not ``predicted``.

        Raises:
          CatVersionError: the file cannot be used, was fitted for another model, other options or
            another CLIP.
        """
        if method.init != "predicted":
            return None
        own = backbone.folder / START_FILE
        if method.start is None and not own.is_file():
            raise CatVersionError(
                f"init=predicted: {backbone.name} has no {START_FILE} of its own. Give "
                "start=FILE; catversion fit-start makes one from many concepts."
            )
        encoder = load_concept_encoder(method.start or own)
        encoder.check_options(method)
        for name, trained in encoder.fingerprints.items():
            if backbone.fingerprints.get(name) != trained:
                raise CatVersionError(
                    f"start={method.start or own}: was fitted for a text encoder of {name} "
                    f"{trained:.12}, {backbone.name} has "
                    f"{backbone.fingerprints.get(name, 'none')!s:.12}. Give the model that it was "
                    "fitted for, or fit another one: catversion fit-start."
                )
        clip = ClipEmbedder(
            backbone.folder / OWN_CLIP
            if method.start_clip is None and encoder.clip == OWN_CLIP
            else _given_folder(method.start_clip or encoder.clip)
        )
        if clip.sha256 != encoder.clip_sha256:
            raise CatVersionError(
                f"start_clip={shown(clip.name)}: is not the CLIP that the concept encoder was "
                f"fitted with ({encoder.clip}, sha256 {encoder.clip_sha256:.12}; this one has "
                f"{clip.sha256:.12}). Give its folder as start_clip."
            )
        found = (len(encoder.photos.mean), len(encoder.words.mean))
        if found != (clip.state_width, clip.text_width):
            raise CatVersionError(
                f"start={method.start or own}: the file is damaged: it is for vectors of {found} "
                f"numbers, its CLIP gives {(clip.state_width, clip.text_width)}. Copy it again, or "
                "fit it again."
            )
        return cls(encoder, clip)

    def start(self, images: Sequence[LoadedImage], base_class: str, own: Learned) -> Learned:
        """The predicted start values of one concept; see :meth:`ConceptEncoder.start`."""
        photos = photo_states(self.clip, images)
        return self.encoder.start(photos, word_embedding(self.clip, base_class), own)


def network_digests(backbone: Backbone, predictor: StartPredictor | None) -> dict[str, str]:
    """Digests of all networks that decide a run's result, by name: the model's, and that of the
    concept encoder where there is one.
    """
    start = {} if predictor is None else {"start": predictor.encoder.sha256}
    return {**backbone.digests, **start}


def clip_for(given: str | None, backbone: Backbone) -> tuple[str, ClipEmbedder]:
    """The CLIP to fit with, and what the file calls it.

    Raises:
      CatVersionError: none was given, and the model has none of its own.
    """
    if given is None and own_clip(backbone.folder) is None:
        raise CatVersionError(
            f"clip: needed, {backbone.name} has no {OWN_CLIP}/ folder of its own. Give a "
            "transformers CLIPModel folder, such as a download of openai/clip-vit-large-patch14."
        )
    if given is None:
        return OWN_CLIP, ClipEmbedder(backbone.folder / OWN_CLIP)
    # a folder of that name is not the model's own
    name = f"./{OWN_CLIP}" if given == OWN_CLIP else given
    return name, ClipEmbedder(_given_folder(name))


def _given_folder(name: str) -> str:
    if not os.path.isdir(name):
        raise CatVersionError(
            f"CLIP {shown(name)}: no such folder. Give a transformers CLIPModel folder, for "
            "init=predicted the one that the concept encoder was fitted with (start_clip)."
        )
    return name


def photo_states(clip: ClipEmbedder, images: Sequence[LoadedImage]) -> Float[np.ndarray, "M D"]:
    """CLIP's pooled states of training images, as they are cropped."""
    return clip.states([image.picture for image in images])


def word_embedding(clip: ClipEmbedder, base_class: str) -> Float[np.ndarray, "E"]:
    """CLIP's embedding of the class word."""
    return clip.texts([f"a {base_class}"])[0]
