"""A block for diffusers' modular pipelines of Stable Diffusion XL: the text encoder step with
concepts.

    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = ModularPipelineBlocks.from_pretrained(
        folder, trust_remote_code=True
    )
    pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    pipe(prompt="a teapot on the moon", concepts={"my_teapot": 0.8}, output="images")

``catversion export --format block`` writes the folder: this file and those that it imports in
``block.py``, and the concepts below them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers.modular_pipelines import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLTextEncoderStep,
)

from catversion_jax.integrations.concept_source import read_concept
from catversion_jax.integrations.context_states import has_states, hide_filling, num_tokens
from catversion_jax.integrations.diffusers import chosen, load_parts
from catversion_jax.integrations.loaded_concept import CatVersionLoadError, parse_concept
from catversion_jax.integrations.pipeline_encoders import names_in, states_on
from catversion_jax.integrations.told_pipeline import check_scale, encoded_apart, plain


class CatVersionTextEncoderStep(StableDiffusionXLTextEncoderStep):
    """The text encoder step of Stable Diffusion XL, in which concepts act.

    What a call asks for holds for that call alone: pipelines that share the text encoders, and
    other threads, draw with what they asked for.

    Attributes:
      concepts: the files that the block brings, in base64 by name.
      choice: None; a folder's code sets it.
      force: they are loaded whatever text encoders they were trained with.
      source: of ``block.py``, for folders that are saved.
    """

    concepts: ClassVar[Mapping[str, str]] = {}
    choice: ClassVar[Mapping[str, Any] | None] = None
    force: ClassVar[bool] = False
    source: ClassVar[str] = ""
    _requirements: ClassVar[dict[str, str]] = {
        "diffusers": ">=0.42",
        "torch": ">=2.6",
        "transformers": ">=4.57",
    }

    @property
    def description(self) -> str:
        """What the block does."""
        names = ", ".join(self.concepts) or "none"
        return (
            "Text Encoder step that generate text_embeddings to guide the image generation, with "
            f"CatVersion concepts: a prompt that contains the class word of a concept calls it. "
            f"The block brings: {names}."
        )

    @property
    def inputs(self) -> list[InputParam]:
        """Those of the step, and which concepts act."""
        return [
            *super().inputs,
            InputParam(
                "concepts",
                type_hint=dict,
                description=(
                    "Scales by concept, or a list of concepts, each at scale 1: names of those "
                    "that the block brings or that are loaded, concept files, their folders or "
                    "hub ids. Default: all that the block brings; {} for none."
                ),
            ),
            InputParam(
                "keep_apart",
                type_hint=bool,
                description=(
                    "Where a prompt calls several concepts, let each be seen from its own word up "
                    "to the next concept's word only."
                ),
            ),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Encode the prompts, with the concepts of this call."""
        asked = state.get("concepts")
        scales = {
            self._loaded(components, name): scale
            for name, scale in _asked_scales(asked, self.concepts).items()
        }
        if asked is None:  # of several of one base class the last, as pipelines do
            loaded = states_on(components)[0].loaded if scales else {}
            by_class = {loaded[key].class_ids[0]: key for key in scales}
            scales = {key: scale for key, scale in scales.items() if key in by_class.values()}
        if not scales:
            with plain(components):
                return super().__call__(components, state)
        if has_states(components):
            hide_filling(getattr(components, "unet", None), num_tokens(components))
        apart = bool(state.get("keep_apart"))
        with chosen(components, list(scales), list(scales.values()), keep_apart=apart):
            return super().__call__(components, state)

    def encode_prompt(self, components: Any, *args: Any, **kwargs: Any) -> Any:
        """As the step's own; no concept acts on the negative prompt."""
        return encoded_apart(
            components,
            super().encode_prompt,
            (components, *args),
            kwargs,
            guided_name="prepare_unconditional_embeds",
        )

    def _loaded(self, components: Any, name: str) -> str:
        """The name under which a concept is loaded in the text encoders; it rests there."""
        if name in self.concepts:
            data = base64.b64decode(self.concepts[name])
            key = f"{name}@{hashlib.sha256(data).hexdigest()[:16]}"  # other blocks have other ones
        else:
            data, key = b"", name
        if key in names_in(states_on(components)):
            return key
        try:
            if data:
                parts, source = parse_concept(data, key), f"concept {name!r} of this block"
            else:
                parts, source = read_concept(name)
        except CatVersionLoadError as error:
            brought = ", ".join(self.concepts) or "none"
            raise CatVersionLoadError(f"{error} Concepts of this block: {brought}.") from error
        return load_parts(components, parts, source, key, force=self.force, activate=False)

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration, which names the class in ``block.py``, and that file."""
        super().save_config(save_directory, *args, **kwargs)
        if not self.source:  # the class of this package, which is imported by its name
            return
        folder = Path(save_directory)
        (folder / "block.py").write_text(self.source, encoding="utf-8")
        file = folder / self.config_name
        index = json.loads(file.read_text(encoding="utf-8"))
        index["auto_map"] = {"ModularPipelineBlocks": f"block.{type(self).__name__}"}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _asked_scales(asked: Any, brought: Mapping[str, str]) -> dict[str, float]:
    """The scale of each concept that a call asks for."""
    if asked is None:
        return dict.fromkeys(brought, 1.0)
    if isinstance(asked, str | Path):
        asked = [asked]
    if not isinstance(asked, Iterable):
        raise CatVersionLoadError(
            f"concepts={asked!r:.80}: must be scales by name, or a list of names."
        )
    scales = asked if isinstance(asked, Mapping) else dict.fromkeys(asked, 1.0)
    for number in scales.values():
        check_scale(number)
    return {str(name): float(number) for name, number in scales.items()}


def register_connected() -> None:
    """A block is found by its folder alone."""
