"""What many programs ask of AUTOMATIC1111's web UI, as far as drawing goes.

A concept is a model (``sd_model_checkpoint``) or a LoRA: ``<lora:rex:0.8>`` in a prompt calls the
concept ``rex``.
"""

import base64
import json
import re
from typing import Any

from catversion_jax.config.sampling import SAMPLERS
from catversion_jax.errors import shown
from catversion_jax.serving.core import BASE
from catversion_jax.serving.errors import unprocessable
from catversion_jax.serving.faces.waiting import taken, until_ended
from catversion_jax.serving.forms import DrawForm, Txt2ImgForm
from catversion_jax.serving.server import Server

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmsolver++": "DPM++ 2M",
    "lcm": "LCM",
}
_LORA = re.compile(r"<lora:([^:<>]{1,64})(?::([0-9]*\.?[0-9]+))?>")
_CALL = re.compile(r"<\s*(?:lora|lyco|lycoris|hypernet)\s*:[^<>]{0,80}>?", re.IGNORECASE)
"""What calls a network in A1111's prompts, also where no concept is called by it here."""


def routes(server: Server) -> Any:
    """``/sdapi/v1``: txt2img, options, sd-models, samplers, loras."""
    from fastapi import APIRouter, Request

    router, core = APIRouter(prefix="/sdapi/v1", tags=["a1111"]), server.core
    chosen: dict[str, str] = {}  # the model of each key

    def names(request: Request) -> list[str]:
        owner = request.state.owner
        return [one.id for one in core.store.concepts(owner) if one.taught_by is not None]

    @router.get("/options")
    def options(request: Request) -> dict[str, Any]:
        """The model that is chosen."""
        return {"sd_model_checkpoint": chosen.get(request.state.owner, BASE)}

    @router.post("/options")
    def set_options(values: dict[str, Any], request: Request) -> None:
        """Choose a model; other settings have no effect."""
        model = values.get("sd_model_checkpoint")
        if model is None:
            return
        if model not in (BASE, *names(request)):
            raise unprocessable(
                "invalid_model",
                f"sd_model_checkpoint={shown(model)}: must be one of /sdapi/v1/sd-models.",
                "sd_model_checkpoint",
            )
        chosen[request.state.owner] = model

    @router.get("/sd-models")
    def models(request: Request) -> list[dict[str, Any]]:
        """The plain model and the key's own concepts, each as a model."""
        return [
            {
                "title": name,
                "model_name": name,
                "hash": None,
                "sha256": None,
                "filename": name,
                "config": None,
            }
            for name in (BASE, *names(request))
        ]

    @router.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        """The samplers, by A1111's names."""
        return [{"name": SAMPLER_NAMES[s], "aliases": [s], "options": {}} for s in SAMPLERS]

    @router.get("/loras")
    def loras(request: Request) -> list[dict[str, Any]]:
        """The key's own concepts, each as a LoRA."""
        return [
            {"name": name, "alias": name, "path": name, "metadata": {}} for name in names(request)
        ]

    @router.post("/txt2img")
    async def txt2img(form: Txt2ImgForm, request: Request) -> dict[str, Any]:
        """Draw pictures and wait for them."""
        sampler = form.sampler_name or form.sampler_index
        by_name = {name.lower(): key for key, name in SAMPLER_NAMES.items()}
        if sampler is not None:
            key = by_name.get(sampler.lower(), sampler)
            if key not in SAMPLERS:
                raise unprocessable(
                    "invalid_sampler",
                    f"sampler_name={shown(sampler)}: must be one of {', '.join(by_name)}.",
                    "sampler_name",
                )
            sampler = key
        called = [
            {"id": name, "scale": float(scale or 1)} for name, scale in _LORA.findall(form.prompt)
        ]
        prompt = " ".join(_LORA.sub("", form.prompt).split())
        if (other := _CALL.search(prompt)) is not None:
            raise unprocessable(
                "invalid_lora",
                f"prompt: {shown(other[0])}: a concept is called by <lora:NAME> or "
                "<lora:NAME:0.8>, with a name of /sdapi/v1/loras and a number from 0 to 10.",
                "prompt",
            )
        if not prompt:
            raise unprocessable("invalid_request", "prompt: has no words.", "prompt")
        model = form.override_settings.get("sd_model_checkpoint")
        width, height = server.orders.sizes[0]
        size = f"{form.width or width}x{form.height or height}"
        drawing: dict[str, Any] = {
            "prompt": prompt,
            "model": model or chosen.get(request.state.owner, BASE),
            "n": form.batch_size * form.n_iter,
            "size": size,
            "concepts": called,
            "seed": None if form.seed in (None, -1) else form.seed,
            "negative_prompt": form.negative_prompt,
            "num_inference_steps": form.steps,
            "guidance_scale": form.cfg_scale,
            "sampler": sampler,
        }
        from pydantic import ValidationError

        try:
            order = DrawForm(**drawing)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise unprocessable("invalid_request", f"{place}: {first['msg']}.", place) from error
        job = await until_ended(core, await taken(server, order, request))
        images = [
            base64.b64encode(core.picture(job, index)).decode() for index in range(job.num_images)
        ]
        info = {
            "prompt": prompt,
            "negative_prompt": form.negative_prompt,
            "seed": job.request["seed"],
            "all_seeds": [(job.request["seed"] + i) % 2**32 for i in range(job.num_images)],
            "sd_model_name": drawing["model"],
            "job": job.id,
            "warnings": job.request["warnings"],
        }
        return {"images": images, "parameters": form.model_dump(), "info": json.dumps(info)}

    return router
