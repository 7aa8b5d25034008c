"""DreamBooth (arXiv 2208.12242) as an outside baseline, written against torch diffusers.

The whole UNet is fine-tuned on a concept's images with the prompt that calls it; text encoder and
VAE stay frozen. As everywhere in the study a concept is called by its class word, so there is no
rare token, and no prior-preservation term: it would show plain images of the class under the very
prompt that is to show the concept. Images come in shuffled epochs, timesteps stratified over the
batch and the learning rate falls along a cosine, as for the other methods. With ``preserve_weight``
the loss is equation (5) of ``training/objective.py``, with ``proportional`` timesteps those of
``training/step.py``: what our method is given there, the baseline can be given too.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from catversion_jax.concepts import ConceptSpec
from catversion_jax.concepts.latents import load_concept_images


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fine-tune."""

    learning_rate: float
    steps: int
    batch_size: int
    weight_decay: float = 1e-2
    seed: int = 42
    preserve_weight: float = 0.0
    timestep_sampling: Literal["stratified", "proportional"] = "stratified"


class DreamBooth:
    """The frozen parts of one model folder, and fine-tuned copies of its UNet."""

    def __init__(self, model: str, resolution: int):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
        self.vae = pipeline.vae.float().to(self.device).requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.float().to(self.device).requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.plain = pipeline.unet.float().to(self.device).requires_grad_(False).eval()
        self.model, self.resolution = model, resolution

    def fine_tune(self, spec: ConceptSpec, prompt: str, settings: Settings) -> UNet2DConditionModel:
        """A fresh copy of the UNet, trained on one concept.

        Args:
          spec: its images; ``random_flip`` of its own is kept.
          prompt: what every image is called.
          settings: see :class:`Settings`.
        """
        torch.manual_seed(settings.seed)
        unet = UNet2DConditionModel.from_pretrained(self.model, subfolder="unet")
        unet = unet.float().to(self.device)
        mean, std, mask = self._latents(spec)
        text = self._encode(prompt)
        flip = 0.5 if spec.random_flip is None else spec.random_flip
        optimizer = torch.optim.AdamW(
            unet.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        count = settings.steps * settings.batch_size
        epochs = torch.cat([torch.randperm(len(mean)) for _ in range(-(-count // len(mean)))])
        unet.train()
        for image in epochs[:count].split(settings.batch_size):
            side = (torch.rand(settings.batch_size) < flip).long()
            clean = mean[image, side] + std[image, side] * torch.randn_like(mean[image, side])
            loss = self._loss(unet, clean, mask[image, side], text, settings)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)  # as diffusers' script
            optimizer.step()
            decay.step()
        return unet.eval()

    def _loss(
        self,
        unet: UNet2DConditionModel,
        clean: torch.Tensor,
        mask: torch.Tensor,
        text: torch.Tensor,
        settings: Settings,
    ) -> torch.Tensor:
        schedule = self.schedule
        noise = torch.randn_like(clean)
        places = (torch.arange(len(clean)) + torch.rand(len(clean))) / len(clean)
        if settings.timestep_sampling == "proportional":
            places = places.sqrt()
        timesteps = (places * schedule.config.num_train_timesteps).long().to(self.device)
        noisy = schedule.add_noise(clean, noise, timesteps)
        seen = (noisy, timesteps, text.expand(len(clean), -1, -1))
        predicted = unet(*seen).sample
        target = noise
        if schedule.config.prediction_type == "v_prediction":
            target = schedule.get_velocity(clean, noise, timesteps)
        if not settings.preserve_weight:
            return torch.nn.functional.mse_loss(predicted, target)
        with torch.no_grad():
            plain = self.plain(*seen).sample
        outside = settings.preserve_weight * (1 - mask)
        error = mask * (predicted - target) ** 2 + outside * (predicted - plain) ** 2
        return (error / (mask + outside).mean(dim=(2, 3), keepdim=True)).mean()

    @torch.no_grad()
    def _latents(self, spec: ConceptSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scaled mean and standard deviation ``[M 2 c h w]`` of the images and their mirrors, and
        their masks ``[M 2 1 h w]``, 1 without one.
        """
        images = load_concept_images(spec, resolution=self.resolution)
        pixels = np.stack([image.pixels.transpose(2, 0, 1) for image in images])
        batch = torch.from_numpy(np.stack([pixels, pixels[..., ::-1]], axis=1)).to(self.device)
        posterior = self.vae.encode(batch.flatten(0, 1)).latent_dist
        scale = self.vae.config.scaling_factor
        mean, std = (
            (scale * part).unflatten(0, batch.shape[:2]) for part in (posterior.mean, posterior.std)
        )
        whole = np.ones((self.resolution, self.resolution), np.float32)
        masks = np.stack([whole if image.mask is None else image.mask for image in images])
        both = torch.from_numpy(np.stack([masks, masks[..., ::-1]], axis=1)).to(self.device)
        return mean, std, torch.nn.functional.adaptive_avg_pool2d(both, mean.shape[-2:])[:, :, None]

    @torch.no_grad()
    def _encode(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device))[0]
