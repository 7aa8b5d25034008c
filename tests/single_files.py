"""Single-file checkpoints of small random models, made from the real classes: the names that the
original code gives the parameters of diffusers and transformers. ``test_single_file.py`` proves
them by diffusers' own conversion.
"""

import dataclasses
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from catversion_jax.models.clip.vocabulary import write_clip_tokenizer
from catversion_jax.models.weights.families import SD1, SD2, SDXL, Family

UNET = {
    "block_out_channels": [16, 24],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
WIDE = {"hidden_size": 24, "intermediate_size": 48, "projection_dim": 24}


def small(family: Family) -> Family:
    """The family in small; the number of text layers stays where a file has one that is unused."""
    few = {} if family is SD2 else {"num_hidden_layers": 2}
    extra = {
        "text_encoder": TEXT | few,
        "text_encoder_2": TEXT | few | WIDE,
        "unet": UNET | ({"cross_attention_dim": 40} if family is SDXL else {}),
        "vae": VAE,
    }
    if family is SDXL:
        extra["unet"] |= {
            "transformer_layers_per_block": [1, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        }
    configs = {name: {**config, **extra[name]} for name, config in family.configs.items()}
    return dataclasses.replace(family, configs=configs, epsilon_sample_size=None)


def random_parts(family: Family) -> dict[str, torch.nn.Module]:
    """The family's networks of the real classes."""
    configs = family.configs
    parts = {
        "unet": UNet2DConditionModel(**configs["unet"]),
        "vae": AutoencoderKL(**configs["vae"]),
    }
    for name in family.text_encoders:
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        parts[name] = kind(CLIPTextConfig(**configs[name]))
    return parts


def random_pipeline(family: Family, folder: Path):
    """A random pipeline of diffusers' class, saved to ``folder``."""
    torch.manual_seed(0)
    parts = random_parts(family)
    for name, place in family.text_encoders.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        (folder / tokenizer).mkdir(parents=True)
        write_clip_tokenizer(folder / tokenizer, place.pad_token, 77)
        parts[tokenizer] = CLIPTokenizer.from_pretrained(folder / tokenizer)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():  # no two alike: norms start as ones and zeros
                torch.nn.init.normal_(parameter)
    kind = {SD1.name: PNDMScheduler, SD2.name: DDIMScheduler, SDXL.name: EulerDiscreteScheduler}
    prediction = {"prediction_type": family.prediction_type or "v_prediction"}
    parts["scheduler"] = kind[family.name].from_config({**family.scheduler, **prediction})
    if family.name == SDXL.name:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)
    return pipe


def original_state_dict(pipe, family: Family) -> dict[str, torch.Tensor]:
    """The pipeline's parameters by the names of the original code."""
    made = {}
    layers = family.configs["unet"]["layers_per_block"]
    for name, tensor in pipe.unet.state_dict().items():
        made[f"model.diffusion_model.{unet_name(name, layers)}"] = tensor
    blocks = len(family.configs["vae"]["block_out_channels"])
    for name, tensor in pipe.vae.state_dict().items():
        convolution = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
        stored = tensor[:, :, None, None] if convolution else tensor
        made[f"first_stage_model.{vae_name(name, blocks)}"] = stored
    for component, place in family.text_encoders.items():
        state = getattr(pipe, component).state_dict()
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        if place.layout == "clip":
            made |= {f"{place.prefix}text_model.{name}": tensor for name, tensor in state.items()}
        else:
            made |= {place.prefix + k: v for k, v in open_clip_state_dict(state).items()}
    attending = {name.split(".")[3] for name in made if re.search(r"output_blocks\.\d+\.1\.", name)}
    for name in [name for name in made if "UPSAMPLER" in name]:
        behind = "2" if name.split(".")[3] in attending else "1"
        made[name.replace("UPSAMPLER", behind)] = made.pop(name)
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}


def unet_name(name: str, layers: int) -> str:
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    place, _, kind = name.rpartition(".")
    if place in ends:
        return f"{ends[place]}.{kind}"
    if "resnets" in name:
        for here, there in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ):
            name = name.replace(f".{here}.", f".{there}.")
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        number = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{number}.{found[3]}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name)
    assert found, name
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.UPSAMPLER.{rest}"
    number = first + layer + (1 if way == "down" else 0)
    module = 1 if kind == "attentions" else 0
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{module}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    for here, there in (("group_norm", "norm"), ("to_out.0", "proj_out")):
        name = name.replace(f"attentions.0.{here}", f"attentions.0.{there}")
    name = re.sub(r"attentions\.0\.to_([qkv])", r"attentions.0.\1", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
    return (
        name.replace("up_blocks", "up")
        .replace("resnets", "block")
        .replace("upsamplers.0", "upsample")
    )


def open_clip_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    width = made["ln_final.weight"].shape[0]
    if "text_projection.weight" in state:
        made["text_projection"] = state["text_projection.weight"].T
    else:
        made["text_projection"] = torch.randn(width, width)
    pairs = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    layer = 0
    while f"encoder.layers.{layer}.mlp.fc1.weight" in state:
        here, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for ours, theirs in pairs.items():
                made[f"{there}.{theirs}.{kind}"] = state[f"{here}.{ours}.{kind}"]
            thirds = [state[f"{here}.self_attn.{third}_proj.{kind}"] for third in "qkv"]
            made[f"{there}.attn.in_proj_{kind}"] = torch.cat(thirds)
        layer += 1
    return made


def single_file(pipe, family: Family, path: Path, *, extra=None, metadata=None) -> Path:
    """Write ``pipe`` as one file, with what files of the family carry besides weights."""
    state = original_state_dict(pipe, family)
    if family.name == SD2.name:  # the layer behind the one that feeds the UNet
        prefix = "cond_stage_model.model.transformer.resblocks."
        last = {k: v for k, v in state.items() if k.startswith(f"{prefix}22.")}
        state |= {k.replace(".22.", ".23."): v.clone() for k, v in last.items()}
    state |= {
        "alphas_cumprod": torch.ones(4),
        "betas": torch.ones(4),
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
    }
    save_file(state | (extra or {}), path, metadata=metadata)
    return path
