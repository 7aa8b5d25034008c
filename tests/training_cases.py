"""Eight concepts for the compiled step, without files: random latents, real text states."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from catversion_jax.config import TrainConfig, make_config
from catversion_jax.diffusion import noise_schedule
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import Backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.training.state import ConceptData, concept_key, make_optimizer
from catversion_jax.training.step import TrainStep, make_train_step

LAYERS = (1, 2, 3)
NUM_CONCEPTS = 8


def config(**options: object) -> TrainConfig:
    return make_config(
        {"concepts": "unused", "steps_per_dispatch": 6, "learning_rate": 1e-3, **options}
    )


def optimizer(options: TrainConfig) -> optax.GradientTransformation:
    return make_optimizer(options.optimizer_options, options.method_options)


def train_step(
    backbone: Backbone, tx: optax.GradientTransformation, mesh: Mesh, options: TrainConfig
) -> TrainStep:
    return make_train_step(
        noise_schedule(backbone.noise_schedule),
        tx,
        mesh,
        options.objective_options,
        options.device_options,
        ema_decay=options.ema_decay,
    )


def concept_data(backbone: Backbone, seed: int = 0) -> tuple[KVResidual, ConceptData]:
    """Eight concepts with 1..4 images and 1..2 prompts."""
    rng = np.random.default_rng(seed)
    token_ids = backbone.tokenizer(["a teapot", "the cat"])
    hidden = backbone.text_encoder.call("lower", token_ids, LAYERS[0])
    text = jax.tree.map(
        lambda leaf: np.stack([np.asarray(leaf)] * NUM_CONCEPTS), LowerStates(hidden, token_ids)
    )
    shape = (NUM_CONCEPTS, 4, 2, 8, 8, 4)
    data = ConceptData(
        rng=jnp.stack([concept_key(i) for i in range(NUM_CONCEPTS)]),
        latent_mean=rng.normal(size=shape).astype(np.float32),
        latent_std=np.full(shape, 0.1, np.float32),
        mask=None,
        num_images=1 + np.arange(NUM_CONCEPTS, dtype=np.int32) % 4,
        flip=np.full(NUM_CONCEPTS, 0.5, np.float32),
        text=(text,),
        num_prompts=1 + np.arange(NUM_CONCEPTS, dtype=np.int32) % 2,
        empty_text=None,
    )
    leaf = (NUM_CONCEPTS, len(LAYERS), 2, 4, 8)
    residual = KVResidual(
        rng.normal(size=leaf).astype(np.float32),
        rng.normal(size=leaf).astype(np.float32),
        LAYERS,
        0.0,
    )
    return residual, data


def distance(a: KVResidual, b: KVResidual) -> float:
    """Largest difference, in units of the distance travelled in six steps of 1e-3."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs) / 6e-3
