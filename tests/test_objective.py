"""The loss and its gradient against PyTorch: CLIP with concatenated K/V, UNet, autograd."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel

from catversion_jax.diffusion import NoiseScheduleConfig, noise_schedule
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.objective import DiffusionBatch, diffusion_loss, min_snr_weight
from catversion_jax.residual import KVResidual

LAYERS = (1, 2, 3)
BIAS = 1.0


def torch_text_states(
    model: CLIPTextModel, token_ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """CLIP's forward pass written out, with keys and values concatenated as the paper says."""
    text = getattr(model, "text_model", model)
    hidden = text.embeddings(input_ids=token_ids)
    batch, length, width = hidden.shape
    heads = model.config.num_attention_heads
    causal = torch.full((length, length), float("-inf")).triu(1)
    for index, layer in enumerate(text.encoder.layers):
        normed = layer.layer_norm1(hidden)
        attn = layer.self_attn
        q, k, v = (
            proj(normed).view(batch, length, heads, -1).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + causal
        if index in LAYERS:
            extra_k, extra_v = (x[LAYERS.index(index)].transpose(0, 1) for x in (key, value))
            extra = q @ extra_k.transpose(-1, -2) * q.shape[-1] ** -0.5 + BIAS
            logits = torch.cat([extra, logits], dim=-1)
            v = torch.cat([extra_v.expand(batch, -1, -1, -1), v], dim=2)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + attn.out_proj(mixed)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return text.final_layer_norm(hidden)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_loss_and_gradient_equal_torch(tiny_sd_folder: Path, snr_gamma: float | None) -> None:
    rng = np.random.default_rng(0)
    key, value = (rng.normal(size=(3, 2, 4, 8)).astype(np.float32) for _ in range(2))
    latents, noise = (rng.normal(size=(2, 4, 8, 8)).astype(np.float32) for _ in range(2))
    timesteps = np.array([17, 801], np.int32)
    mask = (rng.uniform(size=(2, 8, 8)) > 0.5).astype(np.float32)
    backbone = load_backbone(tiny_sd_folder)
    token_ids = backbone.tokenizer(["a teapot", "the teapot on a hill"])

    scheduler = DDPMScheduler.from_pretrained(tiny_sd_folder, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(
        tiny_sd_folder / "text_encoder", attn_implementation="eager"
    )
    unet = UNet2DConditionModel.from_pretrained(tiny_sd_folder / "unet")
    torch_key, torch_value = (torch.tensor(x, requires_grad=True) for x in (key, value))
    context = torch_text_states(
        text_encoder, torch.tensor(token_ids.astype(np.int64)), torch_key, torch_value
    )
    steps = torch.tensor(timesteps, dtype=torch.long)
    noisy = scheduler.add_noise(torch.tensor(latents), torch.tensor(noise), steps)
    error = (unet(noisy, steps, context).sample - torch.tensor(noise)) ** 2
    weight = torch.tensor(np.maximum(mask, 0.1))
    error = error * (weight / weight.mean(dim=(1, 2), keepdim=True))[:, None]
    per_image = error.mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(scheduler, steps)
        per_image = per_image * torch.minimum(snr, torch.full_like(snr, snr_gamma)) / snr
    loss = per_image.mean()
    loss.backward()

    residual = KVResidual(jnp.asarray(key), jnp.asarray(value), LAYERS, BIAS)
    hidden = backbone.text_encoder.call("lower", token_ids, LAYERS[0])
    batch = DiffusionBatch(
        latents.transpose(0, 2, 3, 1), noise.transpose(0, 2, 3, 1), timesteps, hidden, mask
    )

    @jax.jit
    def ours(residual, text_encoder, unet):
        return diffusion_loss(
            residual,
            text_encoder,
            unet,
            batch,
            noise_schedule(backbone.noise_schedule),
            first_layer=LAYERS[0],
            snr_gamma=snr_gamma,
            unmasked_weight=0.1,
        )

    our_loss, grads = jax.value_and_grad(ours)(residual, backbone.text_encoder, backbone.unet)
    np.testing.assert_allclose(our_loss, loss.item(), rtol=1e-4)
    for mine, theirs in ((grads.key, torch_key.grad), (grads.value, torch_value.grad)):
        reference = theirs.numpy()
        assert np.abs(reference).max() > 0
        assert np.abs(mine - reference).max() <= 1e-3 * np.abs(reference).max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_is_diffusers(prediction_type: str) -> None:
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
    steps = torch.arange(0, 1000, 37)
    snr = compute_snr(DDPMScheduler(**settings), steps)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / divisor
    schedule = noise_schedule(NoiseScheduleConfig.from_scheduler_config(settings))
    np.testing.assert_allclose(min_snr_weight(schedule, steps.numpy(), 5.0), expected, rtol=1e-4)
