r"""The concept encoder: photos of a thing and its class word -> start values, in one pass.

    (1)  x = [mean_i W_p (p_i - m_p),  W_w (w - m_w)]
    (2)  start = own + B (A x + C gelu(D x + d))

``p_i`` is CLIP's pooled state of photo i, ``w`` its text embedding of the class word, both
whitened by the principal components of the concepts it was fitted on; ``own`` are the start values
of ``init=class_word``, whose noise has one seed for all concepts, so that what is learned of one
lies beside what is learned of the next. ``B`` has few rows: 128 for all numbers of a concept.

What the weights are fitted to, ``training/fit_start.py`` says. This is a hypernetwork as in
HyperDreamBooth (arXiv 2307.06949), for keys and values instead of the UNet's weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from catversion_jax.array_types import Array, Float
from catversion_jax.config import MethodOptions
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import read_safetensors
from catversion_jax.methods.learned import Learned
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.safetensors_bytes import serialize_safetensors

FORMAT = "catversion.start_version"
FORMAT_VERSION = 1
NUM_PHOTO_FEATURES = 96
NUM_WORD_FEATURES = 24
NUM_HIDDEN = 256
MATCHING_OPTIONS = (
    "method",
    "num_positions",
    "layers",
    "logit_bias",
    "scope",
    "context_states",
)
"""Options that decide what the predicted numbers mean; a run must have those of the file."""

AnyLearned = TypeVar("AnyLearned", bound=Learned)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderWeights:
    """The fitted part, equation (2).

    Attributes:
      linear: ``[F R]``, ``A``.
      hidden: ``[F H]``, ``D``.
      hidden_bias: ``[H]``, ``d``.
      out: ``[H R]``, ``C``.
      basis: ``[R n]``, ``B``, for the n numbers of a concept in the order of its leaves.
    """

    linear: Float[Array, "F R"]
    hidden: Float[Array, "F H"]
    hidden_bias: Float[Array, "H"]
    out: Float[Array, "H R"]
    basis: Float[Array, "R n"]

    def predicted(self, features: Float[Array, "F"], own: AnyLearned) -> AnyLearned:
        """Equation (2) for one concept.

        Args:
          features: ``x``.
          own: start values of ``init=class_word``, leaves without a concept axis.
        """
        hidden = jax.nn.gelu(features @ self.hidden + self.hidden_bias)
        added = (features @ self.linear + hidden @ self.out) @ self.basis
        leaves, structure = jax.tree.flatten(own)
        ends = np.cumsum([leaf.size for leaf in leaves])
        parts = jnp.split(added, ends[:-1])
        moved = [leaf + part.reshape(leaf.shape) for leaf, part in zip(leaves, parts, strict=True)]
        return jax.tree.unflatten(structure, moved)


def new_weights(num_features: int, num_numbers: int, rank: int, seed: int) -> EncoderWeights:
    """Weights that predict ``own`` itself, ready to be fitted.

    Args:
      num_features: F.
      num_numbers: n, of one concept.
      rank: R.
      seed: of the random part.
    """
    rng = np.random.default_rng(seed)

    def random(inputs: int, outputs: int) -> np.ndarray:
        return (rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)

    arrays: dict[str, Any] = dict(
        linear=np.zeros((num_features, rank), np.float32),
        hidden=random(num_features, NUM_HIDDEN),
        hidden_bias=np.zeros(NUM_HIDDEN, np.float32),
        out=np.zeros((NUM_HIDDEN, rank), np.float32),
        basis=random(rank, num_numbers),
    )
    return EncoderWeights(**arrays)


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Vectors to their principal components, each of variance 1 over the fitted vectors.

    Attributes:
      mean: ``[D]``.
      components: ``[D F]``.
    """

    mean: Float[np.ndarray, "D"]
    components: Float[np.ndarray, "D F"]

    @classmethod
    def of(cls, vectors: Float[np.ndarray, "S D"], most: int) -> Whitening:
        """Of the principal components of ``vectors``, at most ``most``; those that hardly vary are
        left out.
        """
        exact = np.asarray(vectors, np.float64)
        mean = exact.mean(0)
        _, lengths, directions = np.linalg.svd(exact - mean, full_matrices=False)
        deviations = lengths / np.sqrt(max(1, len(exact)))
        kept = min(most, int((deviations > 1e-3 * deviations.max(initial=1e-12)).sum()))
        directions = directions[:kept]
        largest = np.abs(directions).argmax(1)
        directions *= np.sign(directions[np.arange(kept), largest])[:, None]
        components = (directions / deviations[:kept, None]).T
        return cls(mean.astype(np.float32), components.astype(np.float32))

    def __call__(self, vectors: Float[np.ndarray, "*S D"]) -> Float[np.ndarray, "*S F"]:
        """The components of ``vectors``."""
        return (vectors - self.mean) @ self.components


@dataclasses.dataclass(frozen=True)
class ConceptEncoder:
    """A fitted concept encoder, as a file holds it.

    Attributes:
      photos: of CLIP's pooled states.
      words: of CLIP's text embeddings.
      weights: numpy leaves; their file holds them in float16.
      options: what of :data:`MATCHING_OPTIONS` it was fitted with.
      noise_seed: of the start values to which the prediction is added.
      fingerprints: of the model's text encoders, by name.
      clip: the CLIP folder as the user gave it.
      clip_sha256: of that folder.
      fitted_on: names of the concepts it was fitted on.
    """

    photos: Whitening
    words: Whitening
    weights: EncoderWeights
    options: dict[str, Any]
    noise_seed: int
    fingerprints: dict[str, str]
    clip: str
    clip_sha256: str
    fitted_on: tuple[str, ...]

    def start(
        self,
        photos: Float[np.ndarray, "M D"],
        word: Float[np.ndarray, "E"],
        own: AnyLearned,
    ) -> AnyLearned:
        """The predicted start values of one concept; numpy leaves.

        Args:
          photos: CLIP's pooled states of its photos.
          word: CLIP's text embedding of its class word.
          own: its start values by ``init=class_word`` with :attr:`noise_seed`.

        Raises:
          CatVersionError: it was fitted for concepts of another size.
        """
        size = sum(leaf.size for leaf in jax.tree.leaves(own))
        if size != self.weights.basis.shape[1]:
            raise CatVersionError(
                f"start: was fitted for concepts of {self.weights.basis.shape[1]} numbers, these "
                f"have {size}. Use the model and the options that it was fitted with."
            )
        x = np.concatenate([self.photos(photos).mean(0), self.words(word)])
        with jax.default_matmul_precision("float32"):
            return jax.tree.map(np.asarray, _predicted(self.weights, x, own))

    def check_options(self, method: MethodOptions) -> None:
        """Make sure that a run learns what the encoder predicts.

        Raises:
          CatVersionError: an option differs; the message names all of them.
        """
        given = dataclasses.asdict(method)
        differing = [
            f"{name}={given[name]} here, {value} in the file"
            for name, value in self.options.items()
            if given[name] != value
        ]
        if differing:
            raise CatVersionError(
                f"init=predicted: the start file was fitted with other options "
                f"({'; '.join(differing)}). Give those, or fit another one: catversion fit-start."
            )

    def to_bytes(self) -> bytes:
        """The file."""
        tensors = {
            "photos.mean": self.photos.mean,
            "photos.components": self.photos.components,
            "words.mean": self.words.mean,
            "words.components": self.words.components,
            **{
                f"weights.{f.name}": getattr(self.weights, f.name).astype(np.float16)
                for f in _WEIGHTS
            },
        }
        metadata = {
            f"catversion.{name}": json.dumps(getattr(self, name), sort_keys=True) for name in _FACTS
        }
        return serialize_safetensors(tensors, {FORMAT: str(FORMAT_VERSION), **metadata})

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the file."""
        path = as_path(path)
        make_folder(path.parent)
        write_atomically(path, self.to_bytes())
        return path


def load_concept_encoder(path: str | Path) -> ConceptEncoder:
    """Read a file that ``catversion fit-start`` wrote.

    Raises:
      CatVersionError: it cannot be read, or is something else.
    """
    path = as_path(path)
    try:
        metadata, tensors = read_safetensors(path.read_bytes(), path)
    except OSError as error:
        raise CatVersionError(
            f"start={path}: cannot be read ({error.strerror or error}). Give the file that "
            "catversion fit-start wrote."
        ) from error
    except CatVersionError as error:
        raise CatVersionError(
            f"start={path}: is no safetensors file, or a damaged one. Give the file that "
            "catversion fit-start wrote, or copy it again."
        ) from error
    if metadata.get(FORMAT) != str(FORMAT_VERSION):
        raise CatVersionError(
            f"start={path}: is no start file of version {FORMAT_VERSION} ({FORMAT}="
            f"{metadata.get(FORMAT, 'missing')!s:.40}). Give the file that catversion fit-start "
            "wrote."
        )
    try:
        facts = {name: json.loads(metadata[f"catversion.{name}"]) for name in _FACTS}
        for name, tensor in tensors.items():
            kind = np.float16 if name.startswith("weights.") else np.float32
            if tensor.dtype != kind or not np.isfinite(tensor).all():
                raise ValueError(f"{name} must be finite {kind.__name__}")
        weights: dict[str, Any] = {
            f.name: tensors[f"weights.{f.name}"].astype(np.float32) for f in _WEIGHTS
        }
        found = ConceptEncoder(
            photos=Whitening(tensors["photos.mean"], tensors["photos.components"]),
            words=Whitening(tensors["words.mean"], tensors["words.components"]),
            weights=EncoderWeights(**weights),
            options={name: facts["options"][name] for name in MATCHING_OPTIONS},
            noise_seed=int(facts["noise_seed"]),
            fingerprints={str(k): str(v) for k, v in facts["fingerprints"].items()},
            clip=str(facts["clip"]),
            clip_sha256=str(facts["clip_sha256"]),
            fitted_on=tuple(map(str, facts["fitted_on"])),
        )
        _check_shapes(found)
        if not 0 <= found.noise_seed < 2**31:
            raise ValueError(f"noise_seed {found.noise_seed} is not within 0..{2**31 - 1}")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CatVersionError(
            f"start={path}: the file is damaged ({type(error).__name__}: {error!s:.200}). "
            "Copy or fit it again."
        ) from error
    return found


_WEIGHTS = dataclasses.fields(EncoderWeights)
_FACTS = ("options", "noise_seed", "fingerprints", "clip", "clip_sha256", "fitted_on")


def _check_shapes(encoder: ConceptEncoder) -> None:
    weights = encoder.weights
    width = encoder.photos.components.shape[1] + encoder.words.components.shape[1]
    hidden, rank = weights.out.shape
    expected = {
        "linear": (width, rank),
        "hidden": (width, hidden),
        "hidden_bias": (hidden,),
        "basis": (rank, weights.basis.shape[1]),
    }
    for name, shape in expected.items():
        if getattr(weights, name).shape != shape:
            raise ValueError(f"weights.{name} {getattr(weights, name).shape}, expected {shape}")
    for name in ("photos", "words"):
        whitening = getattr(encoder, name)
        if whitening.mean.shape != whitening.components.shape[:1]:
            raise ValueError(f"{name}.mean and {name}.components do not fit")


@jax.jit
def _predicted(weights: EncoderWeights, features: Array, own: AnyLearned) -> AnyLearned:
    return weights.predicted(features, own)
