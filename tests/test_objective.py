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
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.clip.text_projection import TextStates
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses, min_snr_weight

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


@pytest.mark.parametrize(
    ("snr_gamma", "preserved", "num_states"),
    [
        pytest.param(None, 0.0, 0, marks=pytest.mark.slow),
        pytest.param(5.0, 0.0, 0, marks=pytest.mark.slow),
        (None, 0.7, 3),  # all terms at once
    ],
)
def test_losses_and_gradients_of_two_concepts_equal_torch(
    one_block_sd_folder: Path, snr_gamma: float | None, preserved: float, num_states: int
) -> None:
    """The concepts share one call of the UNet here; torch computes one after the other."""
    rng = np.random.default_rng(0)
    key, value = (rng.normal(size=(2, 3, 2, 4, 8)).astype(np.float32) for _ in range(2))
    latents, noise = (rng.normal(size=(2, 2, 4, 8, 8)).astype(np.float32) for _ in range(2))
    timesteps = np.array([[17, 801], [430, 5]], np.int32)
    mask = (rng.uniform(size=(2, 2, 8, 8)) > 0.5).astype(np.float32)
    backbone = load_backbone(one_block_sd_folder)
    prompts = ["a teapot", "the teapot on a hill", "a red cat", "cat"]
    token_ids = backbone.tokenizer(prompts).reshape(2, 2, -1)

    scheduler = DDPMScheduler.from_pretrained(one_block_sd_folder, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(
        one_block_sd_folder / "text_encoder", attn_implementation="eager"
    )
    unet = UNet2DConditionModel.from_pretrained(one_block_sd_folder / "unet")
    states = rng.normal(size=(2, num_states, 32)).astype(np.float32)
    torch_key, torch_value, torch_states = (
        torch.tensor(x, requires_grad=True) for x in (key, value, states)
    )

    def torch_loss(concept: int) -> torch.Tensor:
        ids = torch.tensor(token_ids[concept].astype(np.int64))
        context = torch_text_states(text_encoder, ids, torch_key[concept], torch_value[concept])
        behind = torch_states[concept].expand(len(context), -1, -1)
        context = torch.cat([context, behind], dim=1)
        steps = torch.tensor(timesteps[concept], dtype=torch.long)
        clean, eps = torch.tensor(latents[concept]), torch.tensor(noise[concept])
        noisy = scheduler.add_noise(clean, eps, steps)
        prediction = unet(noisy, steps, context).sample
        weight = torch.tensor(np.maximum(mask[concept], 0.1))
        outside = preserved * (1 - torch.tensor(mask[concept]))
        with torch.no_grad():
            plain = unet(noisy, steps, text_encoder(ids).last_hidden_state).sample
        error = weight[:, None] * (prediction - eps) ** 2
        error = error + outside[:, None] * (prediction - plain) ** 2
        error = error / (weight + outside).mean(dim=(1, 2))[:, None, None, None]
        per_image = error.mean(dim=(1, 2, 3))
        if snr_gamma is not None:
            snr = compute_snr(scheduler, steps)
            per_image = per_image * torch.minimum(snr, torch.full_like(snr, snr_gamma)) / snr
        return per_image.mean()

    losses = [torch_loss(concept) for concept in range(2)]
    sum(losses).backward()

    residual = KVResidual(
        jnp.asarray(key),
        jnp.asarray(value),
        LAYERS,
        BIAS,
        states=jnp.asarray(states) if num_states else None,
    )
    hidden = backbone.text_encoder.call("lower", token_ids.reshape(4, -1), LAYERS[0])
    plain = backbone.text_encoder(token_ids.reshape(4, -1))
    batch = DiffusionBatch(
        latents.transpose(0, 1, 3, 4, 2),
        noise.transpose(0, 1, 3, 4, 2),
        timesteps,
        (LowerStates(hidden.reshape(2, 2, *hidden.shape[1:]), token_ids),),
        mask,
        plain=TextStates(jnp.asarray(plain.reshape(2, 2, *plain.shape[1:]))) if preserved else None,
    )

    @jax.jit
    def ours(residual, text_encoders, unet):
        found = diffusion_losses(
            residual,
            text_encoders,
            unet,
            batch,
            noise_schedule(backbone.noise_schedule),
            first_layers=LAYERS[:1],
            snr_gamma=snr_gamma,
            unmasked_weight=0.1,
            preserve_weight=preserved,
        )
        return found.sum(), found

    run = jax.value_and_grad(ours, has_aux=True)
    (_, found), grads = run(residual, backbone.text_encoders, backbone.unet)
    np.testing.assert_allclose(found, [loss.item() for loss in losses], rtol=1e-4)
    pairs = [(grads.key, torch_key.grad), (grads.value, torch_value.grad)]
    if num_states:
        pairs.append((grads.states, torch_states.grad))
    for mine, theirs in pairs:
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
