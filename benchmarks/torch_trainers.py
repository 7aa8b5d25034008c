"""What a PyTorch user would write: CatVersion, and Textual Inversion as diffusers' example does it.

As a program it trains one concept with CatVersion and writes what it learned:

    python benchmarks/torch_trainers.py tiny-sd CONCEPT_FOLDER --steps 200 --out FILE

Stock diffusers and transformers, scaled-dot-product attention, AdamW. CatVersion's keys and values
enter through this package's own PyTorch loader, and autograd stops at them: the networks are
frozen, the latents encoded once. Textual Inversion (diffusers
``examples/textual_inversion/textual_inversion.py``) encodes the images in every step and takes the
gradient of the whole embedding table, of which it restores all rows but one.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from catversion_jax.assets import embedded_folder
from catversion_jax.concepts import ConceptSpec, read_concepts
from catversion_jax.concepts.latents import load_concept_images
from catversion_jax.integrations.encoder_state import EncoderState
from catversion_jax.integrations.loaded_concept import LoadedConcept

BATCH = 2
LEARNING_RATE = 3e-2


class Trainer:
    """One model, one concept; a subclass says what is learned and how images become latents."""

    learned: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __init__(
        self, folder: str, spec: ConceptSpec, dtype: torch.dtype, *, compiled: bool = False
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.pipe = pipe.to(self.device, dtype)
        self.vae, self.text_encoder = pipe.vae, pipe.text_encoder
        for part in (pipe.vae, pipe.unet, pipe.text_encoder):
            part.requires_grad_(False)
        pipe.unet.to(memory_format=torch.channels_last)
        self.unet: Any = torch.compile(pipe.unet) if compiled else pipe.unet
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.dtype, self.spec = dtype, spec
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        images = [image.pixels for image in load_concept_images(spec, resolution=side)]
        self.pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).to(self.device, dtype)
        self.word = tuple(pipe.tokenizer(spec.base_class, add_special_tokens=False).input_ids)
        prompt = pipe.tokenizer(
            f"a {spec.base_class}",
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            return_tensors="pt",
        )
        self.ids = prompt.input_ids.to(self.device).expand(BATCH, -1)

    def latents(self, chosen: torch.Tensor) -> torch.Tensor:
        """Clean latents of the images of a step."""
        raise NotImplementedError

    def after_update(self) -> None:
        """What has to be put right after an update."""

    def step(self) -> torch.Tensor:
        """One update; returns the loss, still on the device."""
        clean = self.latents(torch.randint(len(self.pixels), (BATCH,)))
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (BATCH,), device=self.device)
        loss = self.loss(clean, noise, timesteps)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.after_update()
        return loss.detach()

    def loss(
        self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The denoising objective on one batch."""
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        context = self.text_encoder(self.ids)[0]
        noisy = noisy.to(memory_format=torch.channels_last)
        predicted = self.unet(noisy, timesteps, context).sample
        is_v = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(clean, noise, timesteps) if is_v else noise
        return torch.nn.functional.mse_loss(predicted.float(), target.float())


class CatVersion(Trainer):
    """Keys and values of the last three layers, four each."""

    def __init__(self, folder: str, spec: ConceptSpec, dtype: torch.dtype, **options: Any):
        super().__init__(folder, spec, dtype, **options)
        config = self.text_encoder.config
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        shape = (3, 4, heads, config.hidden_size // heads)
        # float32 like their moments, whatever the networks compute in
        pair = [torch.nn.Parameter(torch.randn(shape, device=self.device)) for _ in range(2)]
        self.learned = pair
        self.concept = LoadedConcept(
            layers=tuple(range(layers - 3, layers)),
            key=pair[0],
            value=pair[1],
            logit_bias=0.0,
            scope="from_class_word",
            name=spec.name,
            base_class=spec.base_class,
            when="class_word",
            base_model="",
            text_encoder_sha256="",
            class_ids=(self.word,),
        )
        state = EncoderState(self.pipe.tokenizer)
        state.loaded, state.active = {spec.name: self.concept}, {spec.name: 1.0}
        state.select()
        state.install(self.text_encoder)
        self.optimizer = torch.optim.AdamW(self.learned, lr=LEARNING_RATE)
        with torch.no_grad():
            self.posterior = self.vae.encode(self.pixels).latent_dist

    def latents(self, chosen: torch.Tensor) -> torch.Tensor:
        """Drawn from the posterior that was computed once."""
        mean, std = self.posterior.mean[chosen], self.posterior.std[chosen]
        return (mean + std * torch.randn_like(mean)) * self.vae.config.scaling_factor


class TextualInversion(Trainer):
    """One new token, as diffusers' example trains it."""

    def __init__(self, folder: str, spec: ConceptSpec, dtype: torch.dtype, **options: Any):
        super().__init__(folder, spec, dtype, **options)
        self.text_encoder.float()  # the example keeps what is trained in float32
        table = self.text_encoder.get_input_embeddings().weight
        table.requires_grad_(True)
        self.learned = [table]
        self.before = table.detach().clone()
        self.row = self.word[0]
        self.optimizer = torch.optim.AdamW(self.learned, lr=5e-4)

    def latents(self, chosen: torch.Tensor) -> torch.Tensor:
        """Encoded anew."""
        with torch.no_grad():
            drawn = self.vae.encode(self.pixels[chosen]).latent_dist.sample()
        return drawn * self.vae.config.scaling_factor

    def step(self) -> torch.Tensor:
        """Under autocast where the networks compute in half precision."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device, self.dtype) if half else contextlib.nullcontext():
            return super().step()

    def after_update(self) -> None:
        """Every other token's embedding stays what it was."""
        others = torch.ones(len(self.before), dtype=torch.bool, device=self.device)
        others[self.row] = False
        with torch.no_grad():
            self.learned[0][others] = self.before[others]


def main() -> None:
    """Train one concept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("concept", help="folder of one concept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    args = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    spec = read_concepts(args.concept).concepts[0]
    model = str(embedded_folder(args.model) or args.model)
    trainer = CatVersion(model, spec, torch.float32, compiled=args.compile)
    loss = torch.tensor(float("nan"))
    for _ in range(args.steps):
        loss = trainer.step()
    pair = {name: p.detach() for name, p in zip(("key", "value"), trainer.learned, strict=True)}
    save_file(pair, args.out)
    print(f"{args.steps} steps, {time.perf_counter() - started:.1f} s, last loss {loss:.3f}")


if __name__ == "__main__":
    main()
