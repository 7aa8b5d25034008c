"""What the pipeline of an exported folder has beside its class. ``catversion export --format
pipeline`` writes this file, those that it imports and one of ``exported_*_pipeline.py`` into
``pipeline.py``, and the concepts below them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from catversion_jax.integrations.diffusers import load_bytes, set_catversion
from catversion_jax.integrations.pipeline_encoders import encoders_of, names_in, states_on
from catversion_jax.integrations.told_pipeline import ToldPipeline, plain, scaled, told_class


class ConceptPipeline(ToldPipeline):
    """A pipeline with the concepts of its folder loaded and active."""

    concepts: ClassVar[Mapping[str, str]] = {}  # files in base64 by name
    force: ClassVar[bool] = False  # whatever text encoders they were trained with
    source: ClassVar[str] = ""  # of pipeline.py, for folders that are saved
    save_plain: Callable[..., Any]  # save_pretrained of the pipeline's own class

    def set_catversion(
        self, name: Any, scale: Any = 1.0, *, plain_prompts: Any = None, keep_apart: Any = None
    ) -> None:
        """Choose the active concepts and their scales; see the function of that name."""
        set_catversion(self, name, scale, plain_prompts=plain_prompts, keep_apart=keep_apart)

    def scaled(self, scale: Any) -> contextlib.AbstractContextManager[None]:
        """A block in which active concepts have other scales: a number, or numbers by name."""
        return scaled(self, scale)

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """A block whose prompts call no concept."""
        return plain(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """A folder like the exported one, with the same concepts."""
        if others := sorted(set(names_in(states_on(self))) - set(self.concepts)):
            warnings.warn(
                f"save_pretrained saves the concepts that this pipeline was exported with; "
                f"{', '.join(others)} loaded since are not in it. Keep their files beside it.",
                stacklevel=2,
            )
        return self.save_plain(*args, **kwargs)

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The configuration, which names the class in ``pipeline.py``, and that file."""
        saved = super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        (folder / "pipeline.py").write_text(self.source, encoding="utf-8")
        file = folder / self.config_name  # type: ignore[attr-defined]
        index = json.loads(file.read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", type(self).__name__]
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return saved


def with_concepts(plain_init: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a pipeline class that loads the concepts too; diffusers reads the parameters
    of the plain one.
    """

    @functools.wraps(plain_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        if not encoders_of(self):
            return
        loaded = names_in(states_on(self))  # the text encoders may be shared ones
        for name, data in self.concepts.items():
            if name not in loaded:
                source = f"concept {name!r} of this pipeline"
                load_bytes(self, base64.b64decode(data), source, name, self.force)

    return __init__


def connect(key: str, pipeline: Any, image_to_image: type, inpaint: type) -> None:
    """Let ``AutoPipelineForImage2Image.from_pipe`` and its like find pipelines that spare negative
    prompts too, under names that begin as that of ``pipeline`` does.
    """
    try:
        from diffusers.pipelines import auto_pipeline
    except (ImportError, RuntimeError):  # it imports all pipelines: one may need another version
        return
    begin = pipeline.__name__.removesuffix("Pipeline")
    for mapping, kind in (
        (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, pipeline),
        (
            auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            told_class(image_to_image, f"{begin}Img2ImgPipeline"),
        ),
        (
            auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
            told_class(inpaint, f"{begin}InpaintPipeline"),
        ),
    ):
        mapping[key] = kind
