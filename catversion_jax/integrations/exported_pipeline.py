"""What the pipeline of an exported folder has beside its class. ``catversion export --format
pipeline`` writes this file, those that it imports and one of ``exported_*_pipeline.py`` into
``pipeline.py``, and the concepts below them.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from catversion_jax.integrations.diffusers import (
    chosen,
    disable_catversion,
    enable_catversion,
    list_catversion,
    load_catversion,
    load_parts,
    set_catversion,
    unload_catversion,
)
from catversion_jax.integrations.exported_source import with_concepts_at_end
from catversion_jax.integrations.loaded_concept import LoadedConcept, parse_concept
from catversion_jax.integrations.pipeline_encoders import encoders_of, names_in, states_on
from catversion_jax.integrations.told_pipeline import ToldPipeline, plain, scaled, tell, told_class


class ConceptMethods:
    """The functions of the loader as methods of a pipeline."""

    def load_catversion(self, path_or_hub_id: Any, *args: Any, **kwargs: Any) -> str:
        """Load a further concept; see the function of that name."""
        return load_catversion(self, path_or_hub_id, *args, **kwargs)

    def set_catversion(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the active concepts and their scales; see the function of that name."""
        set_catversion(self, name, *args, **kwargs)

    def disable_catversion(self) -> None:
        """Let every concept rest until :meth:`enable_catversion`."""
        disable_catversion(self)

    def enable_catversion(self, *others: Any) -> None:
        """Undo :meth:`disable_catversion`; ``others`` are pipelines made of the components of this
        one (``OtherPipeline.from_pipe(pipe)``) that spare their negative prompts from then on.
        """
        for pipe in (self, *others):
            enable_catversion(pipe)

    def unload_catversion(self, name: str | None = None) -> None:
        """Forget one concept, or all."""
        unload_catversion(self, name)

    def list_catversion(self) -> list[dict[str, Any]]:
        """The loaded concepts; see the function of that name."""
        return list_catversion(self)

    def chosen(
        self, name: Any, *args: Any, **kwargs: Any
    ) -> contextlib.AbstractContextManager[None]:
        """A block in which these loaded concepts act, and no others; see the function."""
        return chosen(self, name, *args, **kwargs)

    def scaled(self, scale: Any) -> contextlib.AbstractContextManager[None]:
        """A block in which active concepts have other scales: a number, or numbers by name."""
        return scaled(self, scale)

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """A block whose prompts call no concept."""
        return plain(self)


class ConceptPipeline(ConceptMethods, ToldPipeline):
    """A pipeline with the concepts of its folder loaded and active.

    Attributes:
      concepts: their files in base64 by name.
      choice: the scales of the active ones (``active``), ``enabled`` and ``keep_apart``; None: as
        they come when loaded.
      force: they are loaded whatever text encoders they were trained with.
      source: of ``pipeline.py``, for folders that are saved.
      save_plain: ``save_pretrained`` of the pipeline's own class.
    """

    concepts: ClassVar[Mapping[str, str]] = {}
    choice: ClassVar[Mapping[str, Any] | None] = None
    force: ClassVar[bool] = False
    source: ClassVar[str] = ""
    save_plain: Callable[..., Any]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """A folder like the exported one, with the concepts that are loaded now, as they are
        chosen now.
        """
        if lost := [n for n, parts in _parts_by_name(self).items() if not parts[0].file]:
            warnings.warn(
                f"{', '.join(lost)} was loaded from tensors and is not in the saved folder. Load "
                "it from its file.",
                stacklevel=2,
            )
        return self.save_plain(*args, **kwargs)

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The configuration, which names the class in ``pipeline.py``, and that file."""
        saved = super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder, name = Path(save_directory), type(self).__name__
        by_name = {n: parts for n, parts in _parts_by_name(self).items() if parts[0].file}
        states = states_on(self)
        choice = {
            "active": {
                n: s for n, s in (states[0].active if states else {}).items() if n in by_name
            },
            "enabled": states[0].enabled if states else True,
            "keep_apart": states[0].keep_apart if states else False,
        }
        source = with_concepts_at_end(
            self.source,
            name,
            {n: parts[0].file for n, parts in by_name.items()},
            choice=choice,
            force=any(part.forced for parts in by_name.values() for part in parts),
        )
        (folder / "pipeline.py").write_text(source, encoding="utf-8")
        file = folder / self.config_name  # type: ignore[attr-defined]
        index = json.loads(file.read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", name]
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return saved


def _parts_by_name(pipe: Any) -> dict[str, tuple[LoadedConcept, ...]]:
    states = states_on(pipe)
    return {name: tuple(state.loaded[name] for state in states) for name in names_in(states)}


def with_concepts(plain_init: Callable[..., None]) -> Callable[..., None]:
    """``__init__`` of a pipeline class that loads the concepts too; diffusers reads the parameters
    of the plain one.

    ``from_pipe`` makes a second pipeline of text encoders that had them: what was loaded, chosen or
    unloaded since stays.
    """

    @functools.wraps(plain_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        encoders = encoders_of(self)
        if not encoders:
            return
        brought = hashlib.sha256(repr(self.concepts).encode()).hexdigest()  # by this folder
        had = [getattr(one.model, "_catversion_brought", ()) for one in encoders]
        if any(brought not in one for one in had):
            _bring(self)
            for one, before in zip(encoders, had, strict=True):
                one.model._catversion_brought = (*before, brought)
        elif states_on(self):
            tell(self)

    return __init__


def _bring(pipe: ConceptPipeline) -> None:
    """Load the concepts of the folder."""
    loaded = names_in(states_on(pipe))
    for name, data in pipe.concepts.items():
        if name not in loaded:
            source = f"concept {name!r} of this pipeline"
            load_parts(
                pipe, parse_concept(base64.b64decode(data), source), source, name, force=pipe.force
            )
    if pipe.choice is None or not pipe.concepts or loaded:
        return
    active = pipe.choice["active"]
    set_catversion(pipe, list(active), list(active.values()), keep_apart=pipe.choice["keep_apart"])
    if not pipe.choice["enabled"]:
        disable_catversion(pipe)


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
            told_class(image_to_image, f"{begin}Img2ImgPipeline", ConceptMethods),
        ),
        (
            auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
            told_class(inpaint, f"{begin}InpaintPipeline", ConceptMethods),
        ),
    ):
        mapping[key] = kind
