"""What a concept file says of itself to other programs: Stability AI's ModelSpec 1.0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from catversion_jax.methods.learned import Learned

# by width of the text encoders
_ARCHITECTURES = {
    (768,): "stable-diffusion-v1",
    (1024,): "stable-diffusion-v2",
    (768, 1280): "stable-diffusion-xl-v1-base",
}


def modelspec(
    learned: Learned, name: str, base_class: str, when: str, config: Mapping[str, Any]
) -> dict[str, str]:
    """The ``modelspec.*`` keys that do not change from one writing to the next.

    Args:
      learned: what the concept learned.
      name: of the concept.
      base_class: the words that call it.
      when: ``class_word`` or ``always``.
      config: of its training.
    """
    # other programs call token embeddings by their token, ours by the class word
    trigger = learned.parts[0].facts(name).get("placeholder_token", base_class)
    hint = (
        f"write '{trigger}' in the prompt"
        if when == "class_word"
        else "acts on every conditional prompt"
    )
    adapter = learned.modelspec_adapter
    widths = tuple(part.width for part in learned.parts)
    keys = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{_ARCHITECTURES.get(widths, 'stable-diffusion')}/{adapter}",
        "implementation": "catversion_jax",
        "title": name,
        "description": f"{learned.modelspec_description.format(name=name)}.",
        "trigger_phrase": trigger,
        "usage_hint": hint,
        "tags": f"{adapter}, text-to-image, personalization",
    }
    for key in ("resolution", "prediction_type"):
        if config.get(key):
            keys[key] = str(config[key])
    if str(config.get("resolution", "")).isdigit():
        keys["resolution"] = f"{config['resolution']}x{config['resolution']}"
    return {f"modelspec.{k}": v for k, v in keys.items()}
