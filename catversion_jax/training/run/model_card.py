"""``README.md`` of a run: the model card that goes with its concepts to the Hugging Face hub.

Paths and the address in it are those of the hub's repository, in which every concept has a folder;
``USER/NAME`` stands for its id until it is pushed. The card holds no photo and no date.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from catversion_jax.assets import EMBEDDED_MODEL
from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, Concept, load_concept
from catversion_jax.models.weights.hub import HUB_ID
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.regular_files import make_way, read_text
from catversion_jax.sampling.grids import cut_from_grid
from catversion_jax.sampling.png import read_metadata
from catversion_jax.training.run import names
from catversion_jax.training.run.summary import LOSSES, read_summary

CARD_FILE = "README.md"
PLACEHOLDER = "USER/NAME"
MARK = (
    "<!-- Written by catversion_jax from what training knew. Remove this line to keep your own "
    "changes: it is written again otherwise. -->"
)
LISTED, _SHOWN = 100, 8  # concepts in the table, and with pictures in the gallery
_PICTURES = 4  # of one concept
_OPTIONS = (
    "method",
    "max_train_steps",
    "learning_rate",
    "train_batch_size",
    "layers",
    "init",
    "context_states",
    "preserve_weight",
    "resolution",
    "mixed_precision",
    "seed",
)
# by the first part of modelspec.architecture: the licence of the published models
_LICENSES = {
    "stable-diffusion-v1": "creativeml-openrail-m",
    "stable-diffusion-v2": "openrail++",
    "stable-diffusion-xl-v1-base": "openrail++",
}


@dataclasses.dataclass(frozen=True)
class CardConcept:
    """A finished concept with what lies beside it.

    Attributes:
      file: the concept file.
      concept: what it says.
    """

    file: Path
    concept: Concept

    @property
    def folder(self) -> Path:
        """Where its losses and samples are, if it has any."""
        return self.file.parent

    @property
    def name(self) -> str:
        """Its folder in the repository."""
        own = self.file.name == CONCEPT_FILE_NAME and self.file.absolute().parent.name
        return re.sub(r"[^\w.-]+", "_", own or self.concept.name).strip("._") or "concept"

    @property
    def trigger(self) -> str:
        """What calls it in a prompt: its class word, or the token of a Textual Inversion."""
        metadata = self.concept.metadata
        return metadata.get("modelspec.trigger_phrase") or self.concept.base_class

    @property
    def prompt(self) -> str:
        """One that calls it in diffusers."""
        return _with_article(self.trigger)

    def pictures(self) -> list[tuple[str, bytes]]:
        """Prompts and PNG files: what the concept drew on its newest page of samples, without the
        photos beside it. Nothing where there is no page that can be read.
        """
        pages = sorted((self.folder / names.SAMPLES_FOLDER).glob("*.png"))
        side = self.concept.train_config.get("resolution")
        if not pages or not isinstance(side, int):
            return []
        try:
            columns = read_metadata(pages[-1])["columns"]
            prompts = [str(prompt) for prompt, _ in columns]
            with pages[-1].open("rb") as file, Image.open(file, formats=("PNG",)) as page:
                cells = [
                    cut_from_grid(page, 1, column, rows=2, columns=len(prompts), size=(side, side))
                    for column in range(min(len(prompts), _PICTURES))
                ]
        except Exception:  # whatever a damaged picture makes of its reader
            return []
        return [(prompt, _png(cell)) for prompt, cell in zip(prompts, cells, strict=False)]


def _with_article(words: str) -> str:
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def picture_files(one: CardConcept) -> dict[str, tuple[str, bytes]]:
    """The pictures of a concept by their path in the repository, each with its prompt."""
    return {f"{one.name}/{number}.png": x for number, x in enumerate(one.pictures(), start=1)}


def card_text(
    concepts: Sequence[CardConcept], total: int, title: str, license_id: str | None = None
) -> str:
    """The model card of some concepts.

    Args:
      concepts: those that are listed, at least one.
      total: how many there are.
      title: of the page.
      license_id: as the hub calls it; None takes that of the published model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    first = concepts[0].concept
    base, on_hub = _base(first.base_model)
    shown = {one.name: picture_files(one) for one in concepts[:_SHOWN]}
    architecture = first.metadata.get("modelspec.architecture", "").split("/")[0]
    own = "apache-2.0" if base == EMBEDDED_MODEL else _LICENSES.get(architecture, "other")
    data: dict[str, Any] = {
        "license": license_id or own,
        "base_model": first.base_model if on_hub else None,
        "base_model_relation": "adapter" if on_hub else None,
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "diffusers", "catversion"],
        "instance_prompt": concepts[0].prompt,
    }
    widget = [
        {"text": prompt, "output": {"url": path}}
        for files in shown.values()
        for path, (prompt, _) in files.items()
    ]
    if widget:
        data["widget"] = widget
    metadata = ModelCardData(**data)
    environment = Environment(
        loader=PackageLoader("catversion_jax.training.run", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = [_row(one) for one in concepts]
    body = environment.get_template("model_card.md").render(
        mark=MARK,
        title=_cell(title),
        concepts=rows,
        total=total,
        shown_all=total == len(rows),
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else _cell(base),
        base_path=json.dumps(base),
        base_shell=shlex.quote(base),
        calls=f'the word "{_cell(concepts[0].trigger)}" means *that* {_cell(first.base_class)}'
        if total == 1
        else "the word that calls a concept means that very thing",
        has_pictures=bool(widget),
        first=rows[0],
        repo=PLACEHOLDER,
        file=CONCEPT_FILE_NAME,
        options=[(k, _cell(_short(v))) for k, v in _options(first.train_config).items()],
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))


def write_card(root: Path) -> None:
    """Write the card of a run, unless the one that is there was changed by hand.

    A run without finished concepts gets none.
    """
    path = root / CARD_FILE
    if MARK not in (read_text(path) or MARK):
        return
    found = sorted((root / names.CONCEPTS_FOLDER).glob(f"*/{CONCEPT_FILE_NAME}"))
    concepts: list[CardConcept] = []
    for file in found:
        if len(concepts) == LISTED:
            break
        try:
            concepts.append(CardConcept(file, load_concept(file)))
        except CatVersionError:
            continue  # a damaged one is trained again by the next start
    if concepts:
        make_way(path)
        write_atomically(path, card_text(concepts, len(found), "Concepts").encode())


def _row(one: CardConcept) -> dict[str, Any]:
    """What the template says of a concept."""
    concept, summary = one.concept, read_summary(one.folder)
    losses = [summary.get(key) for key in reversed(LOSSES)]
    return {
        "cell": _cell(concept.name),
        "folder": one.name,
        "folder_text": json.dumps(one.name),
        "address_text": json.dumps(f"{PLACEHOLDER}/{one.name}"),
        "hub_shell": shlex.quote(f"hf://{PLACEHOLDER}/{one.name}"),
        "folder_shell": shlex.quote(one.name),
        "prompt_shell": shlex.quote(f"{_with_article(concept.base_class)} on the beach"),
        "prompt_text": json.dumps(f"{one.prompt} on the beach", ensure_ascii=False),
        "trigger": _trigger_cell(one),
        "step": concept.step,
        "photos": len(concept.images) or "",
        "losses": ", ".join("?" if x is None else f"{x:.4f}" for x in losses),
        "embedding": not concept.learned.adds_keys,
    }


def _trigger_cell(one: CardConcept) -> str:
    """What calls a concept; a Textual Inversion has a token of its own in other programs."""
    if one.concept.when != "class_word":
        return "every prompt"
    word = _cell(one.concept.base_class)
    return word if one.trigger == one.concept.base_class else f"{word}; {_cell(one.trigger)}"


def _base(model: str) -> tuple[str, bool]:
    """The name of the model to show, and whether the hub has it; of a path its last part."""
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return model, True
    return Path(model).name or "an unnamed model", False


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _OPTIONS if config.get(key) is not None}


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """A text for a cell of a table: on one line, without what Markdown and HTML read."""
    line = " ".join(text.split())
    return re.sub(r"([\\|`*_\[\]#])", r"\\\1", line).replace("<", "&lt;").replace(">", "&gt;")
