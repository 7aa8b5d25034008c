"""The pipeline class of an exported folder. ``catversion export --format pipeline`` writes this
file and those that it imports into ``pipeline.py``, and the concepts below them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from catversion_jax.integrations.diffusers import load_bytes, set_catversion
from catversion_jax.integrations.encoder_state import state_on
from catversion_jax.integrations.told_pipeline import ToldPipeline, plain, scaled, told_class


class CatVersionPipeline(ToldPipeline, StableDiffusionPipeline):
    """StableDiffusionPipeline with the concepts of its folder loaded and active."""

    concepts: ClassVar[Mapping[str, str]] = {}  # files in base64 by name
    force: ClassVar[bool] = False  # whatever text encoder they were trained with
    source: ClassVar[str] = ""  # of pipeline.py, for folders that are saved

    # diffusers reads the parameters of this one
    @functools.wraps(StableDiffusionPipeline.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.text_encoder is None:
            return
        state = state_on(self.text_encoder)
        for name, data in self.concepts.items():
            if state is None or name not in state.loaded:  # the text encoder may be a shared one
                source = f"concept {name!r} of this pipeline"
                load_bytes(self, base64.b64decode(data), source, name, self.force)

    def set_catversion(self, name: Any, scale: Any = 1.0, *, plain_prompts: Any = None) -> None:
        """Choose the active concepts and their scales; see the function of that name."""
        set_catversion(self, name, scale, plain_prompts=plain_prompts)

    def scaled(self, scale: Any) -> contextlib.AbstractContextManager[None]:
        """A block in which active concepts have other scales: a number, or numbers by name."""
        return scaled(self, scale)

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """A block whose prompts call no concept."""
        return plain(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """A folder like the exported one, with the same concepts."""
        state = state_on(self.text_encoder)
        if state is not None and (others := sorted(set(state.loaded) - set(self.concepts))):
            warnings.warn(
                f"save_pretrained saves the concepts that this pipeline was exported with; "
                f"{', '.join(others)} loaded since are not in it. Keep their files beside it.",
                stacklevel=2,
            )
        return StableDiffusionPipeline.save_pretrained(self, *args, **kwargs)

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The configuration, which names the class in ``pipeline.py``, and that file."""
        saved = super().save_config(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        (folder / "pipeline.py").write_text(self.source, encoding="utf-8")
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", "CatVersionPipeline"]
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / self.config_name).write_text(text, encoding="utf-8")
        return saved


def register_connected() -> None:
    """Let ``AutoPipelineForImage2Image.from_pipe`` and its like find pipelines that spare negative
    prompts too.
    """
    try:
        from diffusers.pipelines import auto_pipeline
    except (ImportError, RuntimeError):  # it imports all pipelines: one may need another version
        return
    for mapping, kind in (
        (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, CatVersionPipeline),
        (
            auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            told_class(StableDiffusionImg2ImgPipeline, "CatVersionImg2ImgPipeline"),
        ),
        (
            auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
            told_class(StableDiffusionInpaintPipeline, "CatVersionInpaintPipeline"),
        ),
    ):
        mapping["catversion"] = kind
