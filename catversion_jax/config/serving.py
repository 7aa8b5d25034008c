"""The options of ``catversion serve``, each with its range."""

from __future__ import annotations

import dataclasses
from typing import Literal

from catversion_jax.config.options import Options, option


@dataclasses.dataclass(frozen=True)
class ServeOptions(Options):
    """The server. These options fix all shapes, so nothing is compiled after the start."""

    model: str = option(
        "tiny-sd",
        "Model that is served: a diffusers folder, a file, a hub id, or tiny-sd.",
        decides_result=True,
    )
    host: str = option(
        "127.0.0.1",
        "Address to listen on. Any other than this machine's own needs --keys.",
        decides_result=False,
    )
    port: int = option(
        8188,
        "Port to listen on; 0 takes a free one.",
        decides_result=False,
        at_least=0,
        at_most=65535,
    )
    keys: str | None = option(
        None,
        "File of API keys: a line for each user, name and key with a space between. Without it "
        "everybody may come in, which is allowed on this machine's own address only.",
        decides_result=False,
    )
    output_dir: str = option(
        "catversion-server",
        "Folder that receives photos, concepts, pictures and the list of jobs; the next start "
        "continues there.",
        decides_result=False,
    )
    preset: Literal["quality", "fast"] = option(
        "quality",
        "How concepts are taught: quality comes closest to the photos; fast is less alike and "
        "begins, where the model has a concept encoder, with its prediction, so that a concept can "
        "be drawn at once.",
        decides_result=True,
    )
    updates: int | None = option(
        None,
        "Number of optimizer updates of each concept; by default 200, and 25 after a prediction.",
        decides_result=True,
        at_least=1,
    )
    rows: int | None = option(
        None,
        "Number of concepts that train at once on each device; by default 1 on CPU, else 8.",
        decides_result=False,
        at_least=1,
        at_most=1024,
    )
    max_images: int = option(
        20, "Most photos of one concept.", decides_result=False, at_least=1, at_most=1000
    )
    max_prompts: int = option(
        8, "Most training prompts of one concept.", decides_result=False, at_least=1, at_most=100
    )
    batch_size: int | None = option(
        None,
        "Number of pictures that are denoised together on each device; by default 1 on CPU, else "
        "4. A picture's bits depend on it, but not on the others in its batch.",
        decides_result=False,
        at_least=1,
        at_most=4096,
    )
    sizes: tuple[str, ...] = option(
        (),
        "Sizes WIDTHxHEIGHT that a request may ask for; by default the model's own alone.",
        decides_result=False,
    )
    max_wait_ms: float = option(
        50.0,
        "How many milliseconds the first picture of a batch waits for others, at most.",
        decides_result=False,
        at_least=0,
        at_most=60_000,
    )
    drawing_share: float = option(
        0.75,
        "Share of the device's time that drawing gets while there are both pictures to draw and "
        "concepts to teach; teaching gets the rest.",
        decides_result=False,
        at_least=0.05,
        at_most=0.95,
    )
    max_pictures: int = option(
        10, "Most pictures of one request.", decides_result=False, at_least=1, at_most=100
    )
    max_inference_steps: int = option(
        100, "Most denoising steps of a request.", decides_result=False, at_least=1, at_most=1000
    )
    max_concepts: int = option(
        2,
        "Most concepts of one request: the text encoder is compiled for each number of them.",
        decides_result=False,
        at_least=1,
        at_most=8,
    )
    max_waiting_images: int = option(
        512,
        "Most pictures that wait to be drawn; a request above it is refused (429).",
        decides_result=False,
        at_least=1,
    )
    max_waiting_images_per_key: int = option(
        256,
        "Most pictures of one key that wait to be drawn; a request above it is refused (429).",
        decides_result=False,
        at_least=1,
    )
    max_waiting_concepts: int = option(
        256,
        "Most concepts that wait to be taught; one above it is refused (429).",
        decides_result=False,
        at_least=1,
    )
    max_waiting_concepts_per_key: int = option(
        64,
        "Most concepts of one key that wait to be taught; one above it is refused (429).",
        decides_result=False,
        at_least=1,
    )
    max_stored_concepts_per_key: int = option(
        1000, "Most concepts that the server keeps for one key.", decides_result=False, at_least=1
    )
    max_photo_mb: float = option(
        20.0,
        "Largest file of a photo or a mask, in megabytes.",
        decides_result=False,
        at_least=0.01,
        at_most=1000,
    )
    max_megapixels: float = option(
        40.0,
        "Largest photo or mask that is decoded, in millions of pixels.",
        decides_result=False,
        at_least=0.01,
        at_most=1000,
    )
    keep_hours: float = option(
        24.0,
        "How many hours finished drawings are kept. Concepts are kept until they are deleted.",
        decides_result=False,
        at_least=0.01,
    )
    hung_after: float = option(
        300.0,
        "Seconds without progress after which a busy device counts as hung, and /ready says so.",
        decides_result=False,
        at_least=1,
    )
    shutdown_timeout: float = option(
        30.0,
        "Seconds that the server goes on drawing after SIGTERM; what is left is drawn after the "
        "next start.",
        decides_result=False,
        at_least=0,
        at_most=86_400,
    )

    def contradictions(self) -> list[str]:
        """What is wrong between the options, a sentence each."""
        problems = []
        if not is_own_address(self.host) and self.keys is None:
            problems.append(
                f"host={self.host}: other machines can reach this address, so it needs --keys "
                "FILE, a line with name and key for each user. Or leave 127.0.0.1."
            )
        if self.max_waiting_images < self.max_pictures:
            problems.append(
                f"max_waiting_images={self.max_waiting_images}: must be at least max_pictures="
                f"{self.max_pictures}, else no request of so many is ever taken."
            )
        for size in self.sizes:
            if parsed_size(size) is None:
                problems.append(f"sizes={size}: must be WIDTHxHEIGHT in pixels, such as 512x512.")
        return problems


def is_own_address(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host in ("127.0.0.1", "localhost", "::1")


def parsed_size(text: str) -> tuple[int, int] | None:
    """``WIDTHxHEIGHT`` as two numbers; None for any other text."""
    width, cross, height = text.partition("x")
    sides = [int(side) for side in (width, height) if side.isascii() and side.isdigit()]
    if not cross or len(sides) != 2 or max(len(width), len(height)) > 5 or not all(sides):
        return None
    return sides[0], sides[1]
