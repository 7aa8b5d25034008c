"""Stable Diffusion XL's networks at full size, random weights, against diffusers and transformers.

By hand, ``pytest -m slow -s tests/test_full_size_sdxl.py``: the UNet's 2,567,463,684 numbers are
10.3 GB in float32, so torch is gone before jax starts and the weights pass through a folder
(10 GB of disk, 19 GB of memory, 5 minutes on two cores).

The figures are in docs/results/parity.md.
"""

import ctypes
import gc
import os
import resource
import time

import jax
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="parity needs torch and diffusers: pip install '.[test]'"
)
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install '.[test]'")

import jax.numpy as jnp  # noqa: E402
import transformers  # noqa: E402
from torch_reference import (  # noqa: E402
    SDXL_TEXT_ENCODER_2,
    SDXL_UNET,
    as_network,
    draw,
    nchw,
    nhwc,
    randomise,
    relative_error,
)

from catversion_jax.models.clip.text_projection import (  # noqa: E402
    CLIPTextModelWithProjection,
    CLIPTextWithProjectionConfig,
)
from catversion_jax.models.layers.resnet import LayerFactory  # noqa: E402
from catversion_jax.models.unet.config import UNetConfig  # noqa: E402
from catversion_jax.models.unet.embeddings import AddedConditions  # noqa: E402
from catversion_jax.models.unet.unet import UNet2DConditionModel  # noqa: E402
from catversion_jax.models.weights.convert import load_network  # noqa: E402

pytestmark = pytest.mark.slow

TIMESTEP = 601
SIZE = 64
"""Of the latents; a picture of 1024 pixels has 128."""


def torch_unet(folder, sample, text, pooled, time_ids, weight):
    """Save a random torch UNet; its prediction, and the gradient of the weighted sum in the text
    and in the pooled state.
    """
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel.from_config(SDXL_UNET)
    reference = randomise(reference.to_empty(device="cpu"))
    assert sum(parameter.numel() for parameter in reference.parameters()) == 2_567_463_684
    reference.save_pretrained(folder)
    reference.enable_gradient_checkpointing()
    reference.train()  # checkpointing acts in train mode only; dropout is 0
    given = [torch.tensor(array, requires_grad=True) for array in (text, pooled)]
    added = {"text_embeds": given[1], "time_ids": torch.tensor(time_ids)}
    prediction = reference(
        nchw(sample), torch.tensor([TIMESTEP]), given[0], added_cond_kwargs=added
    ).sample
    (prediction * nchw(weight)).sum().backward()
    return nhwc(prediction), *(array.grad.numpy() for array in given)


def test_unet(tmp_path, record_property):
    sample, weight = draw(1, SIZE, SIZE, 4, seed=1), draw(1, SIZE, SIZE, 4, seed=2)
    text, pooled = draw(1, 77, 2048, seed=3), draw(1, 1280, seed=4)
    time_ids = np.array([[1365, 1024, 0, 170, 1024, 1024]], np.float32)
    started = time.monotonic()
    expected = torch_unet(tmp_path, sample, text, pooled, time_ids, weight)
    torch_seconds = time.monotonic() - started
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give 10 GB back before the next 10 are read
    unet = load_network(
        lambda rngs: UNet2DConditionModel(UNetConfig.from_hf(SDXL_UNET), layers=LayerFactory(rngs)),
        tmp_path,
    )

    @jax.jit
    def gradients(unet, text, pooled):
        def weighted(text, pooled):
            added = AddedConditions(pooled, time_ids)
            prediction = unet(sample, TIMESTEP, text, added=added)
            return (prediction * weight).sum(), prediction

        (_, prediction), found = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(
            text, pooled
        )
        return prediction, *found

    found = gradients(unet, text, pooled)
    errors = [relative_error(*pair) for pair in zip(found, expected, strict=True)]
    record_property("errors", errors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(  # noqa: T201
        f"\nSDXL UNet: prediction {errors[0]:.1e}, gradient in the text {errors[1]:.1e}, in the "
        f"pooled state {errors[2]:.1e}; torch {torch_seconds:.0f} s, all "
        f"{time.monotonic() - started:.0f} s, peak {peak:.1f} GB of "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f}"
    )
    assert errors[0] < 1e-4
    assert max(errors[1:]) < 1e-3


def test_second_text_encoder(record_property):
    config = transformers.CLIPTextConfig(**SDXL_TEXT_ENCODER_2)
    with torch.device("meta"):
        reference = transformers.CLIPTextModelWithProjection(config)
    reference = reference.to_empty(device="cpu")
    reference.text_model.embeddings.position_ids = torch.arange(77)[None]
    randomise(reference)
    parsed = CLIPTextWithProjectionConfig.from_hf(config.to_dict(), source="SDXL")
    ours = as_network(
        reference,
        lambda rngs: CLIPTextModelWithProjection(parsed, param_dtype=jnp.float32, rngs=rngs),
    )
    ids = np.random.default_rng(0).integers(1, 49406, (2, 77), dtype=np.int32)
    ids[0, 9], ids[0, 10:], ids[1, -1] = 49407, 0, 49407  # padded with 0; full
    expected = reference(torch.tensor(ids), output_hidden_states=True)
    found = jax.jit(type(ours).call, static_argnums=1)(ours, "states", ids)
    errors = (
        relative_error(found.context, expected.hidden_states[-2]),
        relative_error(found.pooled, expected.text_embeds),
    )
    record_property("errors", errors)
    print(f"\nSDXL text encoder 2: penultimate {errors[0]:.1e}, pooled {errors[1]:.1e}")  # noqa: T201
    assert max(errors) < 1e-4
