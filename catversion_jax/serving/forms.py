"""What clients send, as pydantic checks it; OpenAPI is written from it.

Fields of OpenAI's request that mean nothing here (``quality``, ``style``, ``background``,
``moderation``) are taken and have no effect; any other unknown field is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
)

from catversion_jax.concepts.fields import WHEN

LONGEST_PROMPT = 4000
ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a concept's or a photo's name must be."""
Name = Annotated[str, StringConstraints(pattern=ID)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_PROMPT)]
Scale = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


class Form(BaseModel):
    """A body; unknown fields are errors, and so is a value of another type (``"seed": true``)."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorDetail(BaseModel):
    """What went wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class UsedConcept(Form):
    """A concept in a picture; a scale of 0 gives the plain model, 1 the concept as taught."""

    id: Name
    scale: Scale = 1.0


class DrawForm(Form):
    """OpenAI's image request, with the extensions of this server."""

    prompt: Prompt
    model: str = Field(default="base", max_length=100, description='"base", or the id of a concept')
    n: int = Field(default=1, ge=1, le=1000)
    size: str | None = Field(default=None, max_length=20, description='"WIDTHxHEIGHT" or "auto"')
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(default=95, ge=0, le=100)
    user: str | None = Field(default=None, max_length=200)
    concepts: list[UsedConcept] = Field(default_factory=list, max_length=8)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    negative_prompt: str = Field(default="", max_length=LONGEST_PROMPT)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    sampler: str | None = Field(default=None, max_length=30)
    quality: str | None = Field(default=None, max_length=30)
    style: str | None = Field(default=None, max_length=30)
    background: str | None = Field(default=None, max_length=30)
    moderation: str | None = Field(default=None, max_length=30)


class ConceptForm(Form):
    """What a concept is."""

    base_class: str = Field(min_length=1, max_length=200, description="such as teapot")
    class_forms: list[Annotated[str, StringConstraints(max_length=202)]] | None = Field(
        default=None,
        max_length=100,
        description="further forms that call it; its plural by default",
    )
    prompts: list[Prompt] | None = Field(
        default=None, max_length=100, description="training prompts"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    when: str | None = Field(default=None, max_length=20, json_schema_extra={"enum": [*WHEN, None]})


class TeachJobForm(Form):
    """Teach a concept from the photos that it has."""

    kind: Literal["teach"]
    concept: Name


class DrawJobForm(DrawForm):
    """Draw, without waiting for it."""

    kind: Literal["draw"] = "draw"


def _kind(value: Any) -> str:
    kind = value.get("kind", "draw") if isinstance(value, dict) else getattr(value, "kind", "draw")
    return "teach" if kind == "teach" else "draw"


JobForm = Annotated[
    Annotated[DrawJobForm, Tag("draw")] | Annotated[TeachJobForm, Tag("teach")],
    Discriminator(_kind),
]
"""A job of either kind; ``kind`` says which."""


class Txt2ImgForm(BaseModel):
    """A1111's request; unknown fields have no effect, since its clients send many, and a whole
    number may be written as ``20.0``.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: Prompt
    negative_prompt: str = Field(default="", max_length=LONGEST_PROMPT)
    batch_size: int = Field(default=1, ge=1, le=1000)
    n_iter: int = Field(default=1, ge=1, le=1000)
    steps: int | None = Field(default=None, ge=1, le=1000)
    cfg_scale: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    width: int | None = Field(default=None, ge=8, le=8192)
    height: int | None = Field(default=None, ge=8, le=8192)
    seed: int | None = Field(default=None, ge=-1, lt=2**32)
    sampler_name: str | None = Field(default=None, max_length=50)
    sampler_index: str | None = Field(default=None, max_length=50)
    override_settings: dict[str, object] = Field(default_factory=dict)

    @field_validator("batch_size", "n_iter", "steps", "width", "height", "seed", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return int(value) if isinstance(value, float) and value.is_integer() else value
