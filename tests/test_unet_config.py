"""The UNet's ``config.json``: what published ones make, and what is refused, by name."""

import jax
import pytest

torch = pytest.importorskip(
    "torch", reason="parity needs torch and diffusers: pip install '.[test]'"
)
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install '.[test]'")

from small_networks import SD1_LIKE  # noqa: E402
from torch_reference import (  # noqa: E402
    BK_SDM_UNETS,
    SD15_UNET,
    SD21_UNET,
    SDXL_UNET,
    SEGMIND_UNETS,
)

from catversion_jax.errors import CatVersionError  # noqa: E402
from catversion_jax.models.layers.resnet import LayerFactory  # noqa: E402
from catversion_jax.models.unet.config import UNetConfig  # noqa: E402
from catversion_jax.models.unet.unet import UNet2DConditionModel  # noqa: E402
from catversion_jax.models.weights.convert import Parameter  # noqa: E402
from catversion_jax.models.weights.network import abstract_network  # noqa: E402


@pytest.mark.parametrize(
    ("config", "count"),
    [(SD15_UNET, 859_520_964), (SD21_UNET, 865_910_724), (SDXL_UNET, 2_567_463_684)],
)
def test_published_configs_make_the_published_number_of_parameters(config, count):
    unet = abstract_network(
        lambda rngs: UNet2DConditionModel(UNetConfig.from_hf(config), layers=LayerFactory(rngs))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(unet.params)) == count


@pytest.mark.parametrize("name", [*BK_SDM_UNETS, *SEGMIND_UNETS])
def test_distilled_models_have_the_tensors_that_diffusers_has(name):
    """Names and shapes of the published depths and widths."""
    config = SD15_UNET | {**BK_SDM_UNETS, **SEGMIND_UNETS}[name]
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel.from_config(config)
    unet = abstract_network(
        lambda rngs: UNet2DConditionModel(UNetConfig.from_hf(config), layers=LayerFactory(rngs))
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(unet.params)
    parameters = [Parameter.of(path, leaf.shape) for path, leaf in leaves]
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert {one.name: one.torch_shape for one in parameters} == expected


def test_equal_configs_make_equal_structures():
    first, second = (
        abstract_network(
            lambda rngs: UNet2DConditionModel(
                UNetConfig.from_hf(SD1_LIKE), layers=LayerFactory(rngs)
            )
        )
        for _ in range(2)
    )
    assert first.graphdef == second.graphdef
    assert hash(first.graphdef) == hash(second.graphdef)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"addition_embed_type": "text"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim = None"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
            "projection_class_embeddings_input_dim = None",
        ),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        ({"num_class_embeds": 1000}, "num_class_embeds"),
        ({"time_cond_proj_dim": "256"}, "time_cond_proj_dim"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"downsample_padding": 0}, "downsample_padding"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "must be 2"),
        ({"attention_head_dim": [4, 4, 4]}, "attention_head_dim"),
        ({"attention_head_dim": 5}, "number of heads"),
        ({"attention_head_dim": [4, None]}, "attention_head_dim"),
        ({"transformer_layers_per_block": [1, [1]]}, "reverse_transformer_layers_per_block must"),
        (
            {"transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": [[1], 1]},
            r"one for each residual block, here \[2, 2\]",
        ),
        ({"transformer_layers_per_block": [1, 0]}, "transformer_layers_per_block"),
        ({"transformer_layers_per_block": "11"}, "transformer_layers_per_block"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"block_out_channels": "320"}, "block_out_channels"),
    ],
)
def test_unsupported_config_is_named(change, named):
    with pytest.raises(CatVersionError, match=named):
        UNetConfig.from_hf(SD1_LIKE | change)
