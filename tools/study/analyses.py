"""Two looks inside the text encoder.

Attention mass: how much of each token's attention goes to the learned residual, lambda of the
package's ``residual.py``, mean over heads, by layer and by what the token is.

Where features are dense, layer by layer, in two figures:

    (1)  class share    S_l(c) = P |m_c - m|^2 / sum_p |h_cp - m|^2
    (2)  image change   D_l(c) = 1 - cos(image with noise concatenated at layer l, plain image)

``h_cp`` is the hidden state of the end token after layer ``l`` for class ``c`` in prompt ``p`` (all
prompts of the set), ``m_c`` its mean over prompts, ``m`` over everything. (1) is the share of a
class's deviation that all its prompts have in common: 1 where the state says nothing but the class.
(2) concatenates one pair of the size of that layer's own keys and values in random directions, the
same for every class: how far a change of that layer alone reaches into the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import interval, plain

from catversion_jax.array_types import Float
from catversion_jax.concepts.prompts import with_class_word
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.evaluation.alignment import matched_cosines
from catversion_jax.evaluation.prompts import PromptSet
from catversion_jax.methods.attention_mass import residual_attention_mass
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, Concept, load_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.embedders import ClipEmbedder
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.sampling.denoising import draw_requests
from catversion_jax.sampling.requests import ConceptUse, ImageRequest, place_concepts

ROLES = ("start token", "before the word", "class word", "after the word", "end token", "padding")


def attention_mass(backbone: Backbone, run: Path, prompt_set: PromptSet) -> list[dict[str, Any]]:
    """Of every concept of a run: one row for each layer and role, means over concepts."""
    concepts = [load_concept(path) for path in sorted(run.glob(f"concepts/*/{CONCEPT_FILE_NAME}"))]
    by_concept = [_mass_by_role(backbone, concept, prompt_set) for concept in concepts]
    learned = concepts[0].learned if concepts else None
    layers = learned.layers if isinstance(learned, KVResidual) else ()
    rows = []
    for number, layer in enumerate(layers):
        for role_number, role in enumerate(ROLES):
            values = [float(v) for m in by_concept if np.isfinite(v := m[number, role_number])]
            if values:
                rows.append(
                    {"layer": layer, "role": role, **_interval_of(values), "concepts": len(values)}
                )
    return rows


def _mass_by_role(
    backbone: Backbone, concept: Concept, prompt_set: PromptSet
) -> Float[np.ndarray, "L roles"]:
    """Mean over heads, tokens and prompts; NaN where no prompt has such a token."""
    use = ConceptUse.of(concept)
    texts = [prompt.filled(concept.base_class) for prompt in prompt_set.of(concept.base_class)]
    placed = [place_concepts(backbone.tokenizer, text, [use]) for text in texts]
    ids = np.stack([one.token_ids for one in placed])
    word_places = np.stack([one.word_places[0] for one in placed])
    mass = residual_attention_mass(backbone.text_encoder, ids, concept.learned, word_places)
    by_token = np.asarray(mass).mean(axis=2)  # [L B T]
    roles = token_roles(ids, word_places, _end_id(backbone))
    return np.stack(
        [
            by_token[:, roles == role].mean(axis=1)
            if (roles == role).any()
            else np.full(len(by_token), np.nan)
            for role in range(len(ROLES))
        ],
        axis=1,
    )


def token_roles(ids: np.ndarray, word_places: np.ndarray, end_id: int) -> np.ndarray:
    """``[B T]``: the index in :data:`ROLES` of every token.

    Args:
      ids: ``[B T]``; padding may repeat the end token.
      word_places: ``[B T]``, at least 0 on the class word's tokens.
      end_id: of the end token.
    """
    positions = np.arange(ids.shape[1])
    roles = np.empty(ids.shape, int)
    for row, (end, word) in enumerate(zip(end_positions(ids, end_id), word_places, strict=True)):
        where = np.flatnonzero(word >= 0)
        first, last = (where[0], where[-1]) if len(where) else (end, end)
        roles[row] = ROLES.index("padding")
        roles[row, positions == end] = ROLES.index("end token")
        roles[row, positions < end] = ROLES.index("after the word")
        roles[row, (positions <= last) & (positions < end)] = ROLES.index("class word")
        roles[row, positions < first] = ROLES.index("before the word")
        roles[row, 0] = ROLES.index("start token")
    return roles


def end_positions(ids: np.ndarray, end_id: int) -> np.ndarray:
    """``[B]``: where each row's prompt ends."""
    return (ids == end_id).argmax(axis=1)


def _end_id(backbone: Backbone) -> int:
    """The empty prompt is start, end, padding."""
    return int(backbone.tokenizer([""])[0][1])


def class_shares(
    backbone: Backbone, classes: Sequence[str], prompt_set: PromptSet
) -> list[dict[str, Any]]:
    """Equation (1) after every layer."""
    templates = prompt_set.prompts
    texts = [prompt.filled(word) for word in classes for prompt in templates]
    ids = backbone.tokenizer(texts)
    ends = end_positions(ids, _end_id(backbone))
    rows = []
    for layer in range(1, backbone.num_text_layers + 1):
        hidden = np.asarray(backbone.text_encoder.call("lower", ids, layer), np.float64)
        states = hidden[np.arange(len(ids)), ends].reshape(len(classes), len(templates), -1)
        rows.append({"layer": layer - 1, **_interval_of(class_share(states).tolist())})
    return rows


def class_share(states: Float[np.ndarray, "C P D"]) -> Float[np.ndarray, " C"]:
    """Equation (1) of every class; 0 where nothing differs."""
    centred = states - states.mean(axis=(0, 1))
    common = states.shape[1] * np.square(centred.mean(axis=1)).sum(axis=-1)
    total = np.square(centred).sum(axis=(1, 2))
    return np.divide(common, total, out=np.zeros_like(common), where=total > 1e-12)


def image_changes(
    backbone: Backbone,
    clip: ClipEmbedder,
    classes: Sequence[str],
    settings: SamplingSettings,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Equation (2) of every layer, means over classes."""
    texts = {word: with_class_word("a {}", word) for word in classes}
    draw = _drawer(backbone, clip, settings, texts, seed)
    plain_images = draw(lambda word: ())
    rows = []
    for layer in range(backbone.num_text_layers):
        noise = _noise_at(backbone, list(texts.values()), layer, seed)
        uses = {word: (ConceptUse("noise", word, noise),) for word in texts}
        changed = draw(uses.__getitem__)
        change = 1.0 - matched_cosines(changed, plain_images)
        rows.append({"layer": layer, **_interval_of(change.tolist())})
    return rows


def _drawer(
    backbone: Backbone,
    clip: ClipEmbedder,
    settings: SamplingSettings,
    texts: Mapping[str, str],
    seed: int,
) -> Callable[[Callable[[str], tuple[ConceptUse, ...]]], np.ndarray]:
    def draw(uses: Callable[[str], tuple[ConceptUse, ...]]) -> np.ndarray:
        requests = [ImageRequest(text, uses(word), seed) for word, text in texts.items()]
        return clip.images(list(draw_requests(backbone, requests, settings).images))

    return draw


def _noise_at(backbone: Backbone, texts: Sequence[str], layer: int, seed: int) -> KVResidual:
    """One pair in random directions, as large as the layer's own (root mean square)."""
    ids = backbone.tokenizer(list(texts))
    own = [
        np.asarray(part)[0]
        for part in backbone.text_encoder.call("keys_values", ids, layers=(layer,))
    ]
    shape = (1, 1, backbone.num_heads, backbone.head_dim)
    rng = np.random.default_rng(seed)
    key, value = (
        (np.sqrt(np.mean(part**2)) * rng.standard_normal(shape)).astype(np.float32) for part in own
    )
    return KVResidual(key, value, (layer,))


def _interval_of(values: Sequence[float]) -> dict[str, float | None]:
    found = interval(values)
    return plain({"it": found})["it"] if found is not None else {}
