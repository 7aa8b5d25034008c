"""Small CLIP encoders and UNets with random weights, in torch and in ours."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch_reference import SD15_UNET, as_network, draw, randomise

from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.clip.encoder import CLIPAttention, EncoderConfig
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.unet.unet import UNet2DConditionModel
from catversion_jax.models.weights.network import Network, random_network

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "max_position_embeddings": 20,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
HEADS, HEAD_DIM = 6, 8
SD1_LIKE = SD15_UNET | {
    "block_out_channels": [16, 24],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "sample_size": 16,
}
SD2_KEYS = {"use_linear_projection": True, "upcast_attention": True, "dual_cross_attention": False}
SD2_LIKE = (
    SD1_LIKE
    | SD2_KEYS
    | {
        "block_out_channels": [16, 32, 48],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4, 6],
    }
)
POOLED, TIME_WIDTH = 12, 8
XL_LIKE = SD2_LIKE | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": TIME_WIDTH,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "projection_class_embeddings_input_dim": POOLED + 6 * TIME_WIDTH,
    "transformer_layers_per_block": [1, 2],
}
FORWARD = {
    "only-cross": SD1_LIKE
    | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "only_cross_attention": [False, True],
    },
    "deep-inside": SD1_LIKE
    | {
        "transformer_layers_per_block": [1, 2],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": [24, 24],
    },
    "uneven-depth": SD1_LIKE | {"layers_per_block": [1, 2], "act_fn": "gelu"},
    "inpainting-channels": SD1_LIKE
    | {"in_channels": 9, "out_channels": 5, "flip_sin_to_cos": False},
    "other-details": SD1_LIKE
    | {"freq_shift": 1, "norm_eps": 1e-3, "only_cross_attention": True, "mid_block_type": None},
    # SSD-1B's kind of depths, which differ between the way down, the way up and residual blocks.
    "nested-depths": SD1_LIKE
    | {
        "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, [2]],
        "reverse_transformer_layers_per_block": [[1, 3], 1],
    },
    "one-block": SD1_LIKE
    | {
        "block_out_channels": [24],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
}
# Each of these programs runs once: compiling well would cost more than it saves.
QUICK = {"xla_backend_optimization_level": 0}


def torch_encoder(**changes) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(**(SIZES | changes), attn_implementation="eager")
    return randomise(transformers.CLIPTextModel(config))


def our_config(reference: torch.nn.Module) -> CLIPTextConfig:
    return CLIPTextConfig.from_hf(reference.config.to_dict(), source="config.json")


def our_encoder(reference: torch.nn.Module) -> Network:
    config = our_config(reference)
    return as_network(
        reference, lambda rngs: CLIPTextModel(config, param_dtype=jnp.float32, rngs=rngs)
    )


@functools.cache
def default_encoders() -> tuple[transformers.CLIPTextModel, Network]:
    """The torch encoder of SIZES and ours, for tests that change neither."""
    reference = torch_encoder()
    return reference, our_encoder(reference)


def token_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, shape, dtype=np.int32)


def make_residual(layers=(2, 3, 4), positions=1, logit_bias=0.0, seed=0) -> KVResidual:
    shape = (len(layers), positions, HEADS, HEAD_DIM)
    return KVResidual(
        draw(*shape, seed=seed), draw(*shape, seed=seed + 100), tuple(layers), logit_bias
    )


def attention_layer() -> tuple:
    config = EncoderConfig(48, 80, 1, HEADS, "quick_gelu", 1e-5)
    layer = random_network(
        lambda rngs: CLIPAttention(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
    )
    # The output projection is a matter of its own: make it the identity to see the heads' outputs.
    layer.params["out_proj"] = {"kernel": jnp.eye(48), "bias": jnp.zeros(48)}
    layer.params["q_proj"]["kernel"] *= 4.0
    return layer, draw(2, 7, 48, seed=5)


def build(config):
    """A torch UNet with random weights and our network holding the same."""
    reference = randomise(diffusers.UNet2DConditionModel.from_config(config))
    return reference, as_network(
        reference,
        lambda rngs: UNet2DConditionModel(UNetConfig.from_hf(config), layers=LayerFactory(rngs)),
    )


@jax.jit(compiler_options=QUICK)
def forward(unet, *args):
    return unet(*args)


class StoreProbabilities:
    """diffusers' classic processor, which also keeps what it attends to in the text."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        query, key, value = (
            attn.head_to_batch_dim(layer(states))
            for layer, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        probabilities = attn.get_attention_scores(query, key)  # [B*N S T]
        if cross:
            self.kept.append(probabilities.unflatten(0, (-1, attn.heads)).numpy())
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ value))
