"""Images and texts to unit vectors: CLIP from any transformers ``CLIPModel`` folder, DINO from any
``ViTModel`` folder, DINOv2 from any ``Dinov2Model`` or ``Dinov2WithRegistersModel`` folder, and a
judge of the embedded world.

Weights are arguments of the compiled functions and batches have a fixed size (padded), so a
picture's vector does not depend on what else is embedded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from catversion_jax.array_types import Array, Float, Int
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.clip.vision import load_clip, sub_config
from catversion_jax.models.convolutional_judge import MODEL_TYPE as JUDGE_TYPE
from catversion_jax.models.convolutional_judge import load_convolutional_judge
from catversion_jax.models.dinov2 import MODEL_TYPES as DINOV2_TYPES
from catversion_jax.models.dinov2 import load_dinov2
from catversion_jax.models.vit import load_vit
from catversion_jax.models.weights.hf_config import check_integers, read_config
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.batches import full_batches

BATCH = 16
OWN_CLIP = "clip"
# Where preprocessor_config.json gives none: OpenAI's CLIP, and ImageNet for DINO.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DINO_MEAN = (0.485, 0.456, 0.406)
DINO_STD = (0.229, 0.224, 0.225)


class ImageEmbedder:
    """Pictures to unit vectors.

    Attributes:
      name: the folder as the user gave it.
      mean: colour that the network sees as zero, within 0..1; fills what a mask removes.
      sha256: of the folder's configuration and weights, and of the colours of its preprocessor
        where they are not the usual ones.
    """

    def __init__(
        self,
        folder: str | Path,
        network: Network,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        short_side: int | None = None,
    ):
        settings = _preprocessor(Path(folder))
        self.name = str(folder)
        self.mean = np.asarray(settings.get("image_mean", mean), np.float64)
        self._std = np.asarray(settings.get("image_std", std), np.float64)
        self.sha256 = folder_sha256(Path(folder))
        if not (np.array_equal(self.mean, mean) and np.array_equal(self._std, std)):
            colours = np.stack([self.mean, self._std]).astype("<f8").tobytes()
            self.sha256 = hashlib.sha256(self.sha256.encode() + colours).hexdigest()
        self._image_size, self._short_side = image_size, short_side or image_size
        self._network = network

    def images(self, pictures: Sequence[Int[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of uint8 pictures of any size: shorter side resized (bicubic), centre
        cropped, normalized.
        """
        pixels = [self._prepared(picture) for picture in pictures]
        return _in_batches(pixels, lambda batch: _embed_images(self._network, batch))

    def _prepared(self, picture: np.ndarray) -> np.ndarray:
        """``[size size 3]`` as transformers' CLIPImageProcessor makes it."""
        size, image = self._image_size, Image.fromarray(picture)
        short = min(image.size)
        wanted = tuple(int(self._short_side * side / short) for side in image.size)
        if image.size != wanted:
            image = image.resize(wanted, Image.Resampling.BICUBIC)  # type: ignore[arg-type]  # pair
        left, top = (image.width - size) // 2, (image.height - size) // 2
        square = np.asarray(image.crop((left, top, left + size, top + size)), np.float64) / 255.0
        return ((square - self.mean) / self._std).astype(np.float32)


class ClipEmbedder(ImageEmbedder):
    """Both towers of a CLIP.

    Attributes:
      state_width: numbers of a pooled state.
      text_width: numbers of a text's vector.
    """

    def __init__(self, folder: str | Path):
        """Load.

        Raises:
          CatVersionError: no CLIPModel folder, or no tokenizer in it or beside it.
        """
        config = read_config(folder)
        network = load_clip(folder)
        self.state_width = int(network.params["visual_projection"]["kernel"].shape[0])
        self.text_width = int(network.params["text_projection"]["kernel"].shape[1])
        source = str(Path(folder) / "config.json")
        text, vision = (
            sub_config(config, f"{part}_config", source=source) for part in ("text", "vision")
        )
        own, beside = Path(folder), Path(folder).parent / "tokenizer"
        has_own = any((own / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        self.tokenizer = Tokenizer.from_folder(
            own if has_own or not beside.is_dir() else beside,
            context=text.get("max_position_embeddings", 77),
            vocab_size=text.get("vocab_size"),
        )
        super().__init__(folder, network, vision.get("image_size", 224), CLIP_MEAN, CLIP_STD)

    def states(self, pictures: Sequence[Int[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "n D"]:
        """The vision encoder's pooled states, before the projection and of any length."""
        pixels = [self._prepared(picture) for picture in pictures]
        return _in_batches(pixels, lambda batch: _image_states(self._network, batch))

    def texts(self, prompts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Unit vectors of prompts, cut at the context's end."""
        ids = list(self.tokenizer(prompts)) if prompts else []
        return _in_batches(ids, lambda batch: _embed_texts(self._network, batch))


class DinoEmbedder(ImageEmbedder):
    """The class token of a DINO vision transformer (DreamBench's second image score), or of
    DINOv2's, or the features of a convolutional judge.

    Attributes:
      kind: ``"DINO"``, ``"DINOv2"`` or ``"judge"``, for people.
      judges_objects: whether more than DreamBench's score is asked of it: all but DINO judge
        objects without their background and by the nearest photo too.
    """

    def __init__(self, folder: str | Path):
        """Load.

        Raises:
          CatVersionError: no ViTModel, Dinov2Model or judge's folder.
        """
        model_type = read_config(folder).get("model_type")
        self.kind = {**dict.fromkeys(DINOV2_TYPES, "DINOv2"), JUDGE_TYPE: "judge"}.get(
            model_type if isinstance(model_type, str) else "", "DINO"
        )
        self.judges_objects = self.kind != "DINO"
        if self.kind == "judge":
            network, image_size = load_convolutional_judge(folder)
            super().__init__(folder, network, image_size, (0.5,) * 3, (0.5,) * 3)
            return
        if self.kind == "DINOv2":
            short_side, crop = _sizes(Path(folder))
            network, image_size = load_dinov2(folder, image_size=crop)
            super().__init__(
                folder, network, image_size, DINO_MEAN, DINO_STD, short_side=short_side
            )
            return
        network, image_size = load_vit(folder)
        super().__init__(folder, network, image_size, DINO_MEAN, DINO_STD)


def own_clip(model: Path) -> Path | None:
    """The CLIP that a model folder has of its own, in ``clip/``."""
    folder = model / OWN_CLIP
    return folder if (folder / "config.json").is_file() else None


def folder_sha256(folder: Path) -> str:
    """Hash of a model folder's configuration and weights, whatever the files' dates."""
    digest = hashlib.sha256()
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    for path in sorted([folder / "config.json", *files]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _sizes(folder: Path) -> tuple[int | None, int | None]:
    """Shorter side and crop of the preprocessor; None where it does not say them."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None
    value = read_config(folder, path.name)
    size, crop = value.get("size"), value.get("crop_size")
    found = {
        "shortest_edge": size.get("shortest_edge") if isinstance(size, dict) else None,
        "crop_size": crop.get("height") if isinstance(crop, dict) else None,
    }
    given = {key: side for key, side in found.items() if side is not None}
    check_integers(given, dict.fromkeys(given, (1, 2**12)), source=str(path))
    return found["shortest_edge"], found["crop_size"]


def _preprocessor(folder: Path) -> dict[str, Sequence[float]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    value = read_config(folder, path.name)
    colours: dict[str, Any] = {
        key: value[key] for key in ("image_mean", "image_std") if key in value
    }
    for key, colour in colours.items():
        low = 1e-3 if key == "image_std" else -1e3
        numbers = isinstance(colour, list) and all(
            type(x) in (int, float) and low <= x <= 1e3 for x in colour
        )
        if not numbers or len(colour) != 3:
            raise CatVersionError(
                f"{path}: {key} = {shown(colour)}, must be three numbers. Download it again."
            )
    return colours


def _in_batches(
    rows: Sequence[np.ndarray], embed: Callable[[np.ndarray], Array]
) -> Float[np.ndarray, "n E"]:
    """``embed`` over batches of exactly ``BATCH`` rows, the last filled up with its last row."""
    if not rows:
        return np.zeros((0, 1), np.float32)
    parts = [
        np.asarray(embed(np.stack([rows[i] for i in batch])))
        for batch in full_batches(len(rows), BATCH)
    ]
    return np.concatenate(parts)[: len(rows)]


# Accelerators would otherwise multiply float32 matrices with fewer bits.
@jax.default_matmul_precision("float32")
@jax.jit
def _embed_images(network: Network, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
    return _unit(network.call("image_embeds", pixels))


@jax.default_matmul_precision("float32")
@jax.jit
def _image_states(network: Network, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    return network.call("image_states", pixels).astype(jnp.float32)


@jax.default_matmul_precision("float32")
@jax.jit
def _embed_texts(network: Network, token_ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
    return _unit(network.call("text_embeds", token_ids))


def _unit(vectors: Float[Array, "B E"]) -> Float[Array, "B E"]:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
