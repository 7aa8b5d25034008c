"""Where models went and how they are addressed elsewhere: what a model that is not found may mean.

Nothing is looked up: a message says where to look. Another account's copy is never taken by itself.
"""

from __future__ import annotations

import re

RENAMED = (
    (r"runwayml/stable-diffusion-(v1-5|inpainting)", r"stable-diffusion-v1-5/stable-diffusion-\1"),
    (r"stabilityai/stable-diffusion-(2(?:-.+)?)", r"sd2-community/stable-diffusion-\1"),
)
"""Hub ids that their owners took down, as patterns, and where copies are."""

_HUB = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.+)", re.IGNORECASE)
_HUB_FILE = re.compile(r"([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?#]+)")
_HUB_MODEL = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)/?(?:(?:tree/|[?#]).*)?")
_MODEL_SITE = re.compile(
    r"(?:https?://)?(?:\w+\.)?(?:civitai\.\w+|civitaiarchive\.com|tensor\.art|seaart\.ai|"
    r"liblib\.art|modelscope\.(?:cn|com))(?:/|$)|urn:air:",
    re.IGNORECASE,
)


def moved(model: str) -> str:
    """A sentence, with a leading space, about a hub id that was taken down; else ``""``."""
    for pattern, now in RENAMED:
        if found := re.fullmatch(pattern, model):
            return f" It was taken down; copies are at {found.expand(now)}."
    return ""


def address_remedy(model: str) -> str | None:
    """What to give in place of an address; None where ``model`` is none."""
    if found := _HUB.fullmatch(model):
        if file := _HUB_FILE.match(found[1]):
            owner_and_name, revision, path = file.groups()
            own = "" if revision == "main" else f" --revision {revision}"
            return (
                f"is the address of a file. Download it with 'hf download {owner_and_name} "
                f"{path}{own}', and give the path that this prints."
            )
        if name := _HUB_MODEL.fullmatch(found[1]):
            return f"is the address of a model on the Hugging Face hub. Give {name[1]}."
    if _MODEL_SITE.match(model):
        return (
            "is an address on a model site, which nothing is downloaded from. Download the model's "
            ".safetensors file there, log in where the site asks for it, and give that file."
        )
    if re.match(r"\w+://", model):
        return (
            "is an address. Download the model's .safetensors file, and give that file; of a "
            "Hugging Face model give owner/name."
        )
    return None
