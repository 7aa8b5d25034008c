"""The UNet against torch diffusers' UNet2DConditionModel: blocks, whole network, gradients,
configurations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip(
    "torch", reason="parity needs torch and diffusers: pip install '.[test]'"
)
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install '.[test]'")

from diffusers.models.embeddings import get_timestep_embedding  # noqa: E402
from small_networks import (  # noqa: E402
    FORWARD,
    POOLED,
    QUICK,
    SD1_LIKE,
    SD2_KEYS,
    SD2_LIKE,
    TIME_WIDTH,
    XL_LIKE,
    build,
    forward,
)
from torch_reference import (  # noqa: E402
    draw,
    nchw,
    nhwc,
    randomise,
    relative_error,
)

from catversion_jax.errors import CatVersionError  # noqa: E402
from catversion_jax.models.layers.recompute import recomputed  # noqa: E402
from catversion_jax.models.layers.resnet import LayerFactory  # noqa: E402
from catversion_jax.models.unet.config import UNetConfig  # noqa: E402
from catversion_jax.models.unet.embeddings import (  # noqa: E402
    AddedConditions,
    timestep_embedding,
)
from catversion_jax.models.unet.transformer import (  # noqa: E402
    FEED_FORWARD_SLICE,
    BasicTransformerBlock,
)
from catversion_jax.models.unet.unet import UNet2DConditionModel  # noqa: E402
from catversion_jax.models.weights.convert import load_network  # noqa: E402
from catversion_jax.models.weights.network import Network, abstract_network  # noqa: E402

WITH_GRADIENT = {
    "sd1": SD1_LIKE,
    "sd2": SD1_LIKE | SD2_KEYS | {"attention_head_dim": [2, 3]},
}


@pytest.fixture(scope="module")
def one_block_pair():
    return build(FORWARD["one-block"])


@pytest.fixture(scope="module")
def sd2_pair():
    return build(SD2_LIKE)


@jax.jit(compiler_options=QUICK)
def text_gradient(unet, weight, sample, timesteps, text):
    def weighted(text):
        prediction = unet(sample, timesteps, text)
        return (prediction * weight).sum(), prediction

    (_, prediction), gradient = jax.value_and_grad(weighted, has_aux=True)(text)
    return prediction, gradient


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_whole_network_and_text_gradient_equal_diffusers(name):
    config = WITH_GRADIENT[name]
    reference, unet = build(config)
    sample, weight, timesteps = (
        draw(2, 8, 12, 4, seed=1),
        draw(2, 8, 12, 4, seed=3),
        np.array([3, 981]),
    )
    text = draw(2, 7, 24, seed=2)
    torch_text = torch.tensor(text, requires_grad=True)
    expected = reference(nchw(sample), torch.tensor(timesteps), torch_text).sample
    (expected * nchw(weight)).sum().backward()

    prediction, gradient = text_gradient(unet, weight, sample, timesteps, text)
    assert relative_error(prediction, nhwc(expected)) < 1e-4
    assert relative_error(gradient, torch_text.grad.numpy()) < 1e-3


@pytest.mark.parametrize("name", FORWARD)
def test_other_configurations_equal_diffusers(name):
    config = FORWARD[name]
    reference, unet = build(config)
    sample, text, timesteps = (
        draw(2, 8, 12, config["in_channels"], seed=1),
        draw(2, 7, 24, seed=2),
        np.array([3, 981]),
    )
    expected = reference(nchw(sample), torch.tensor(timesteps), torch.tensor(text)).sample
    assert relative_error(forward(unet, sample, timesteps, text), nhwc(expected)) < 1e-4


TIME_IDS = np.array([[768, 1024, 0, 96, 1024, 1024], [512, 640, 12, 0, 896, 1152]], np.float32)


@pytest.fixture(scope="module")
def xl_pair():
    return build(XL_LIKE)


def test_added_conditions_equal_diffusers(xl_pair):
    """The prediction, and its gradient to the states of the prompt and to their pooled state."""
    reference, unet = xl_pair
    sample, weight, steps = draw(2, 8, 12, 4, seed=1), draw(2, 8, 12, 4, seed=3), np.array([3, 981])
    text, pooled = draw(2, 7, 24, seed=2), draw(2, POOLED, seed=4)
    given = [torch.tensor(array, requires_grad=True) for array in (text, pooled)]
    added = {"text_embeds": given[1], "time_ids": torch.tensor(TIME_IDS)}
    expected = reference(
        nchw(sample), torch.tensor(steps), given[0], added_cond_kwargs=added
    ).sample
    (expected * nchw(weight)).sum().backward()

    @jax.jit(compiler_options=QUICK)
    def gradients(unet, text, pooled):
        def weighted(text, pooled):
            prediction = unet(sample, steps, text, added=AddedConditions(pooled, TIME_IDS))
            return (prediction * weight).sum(), prediction

        return jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(text, pooled)

    (_, prediction), found = gradients(unet, text, pooled)
    assert relative_error(prediction, nhwc(expected)) < 1e-4
    for ours, tensor in zip(found, given, strict=True):
        assert relative_error(ours, tensor.grad.numpy()) < 1e-3


def test_the_vector_of_added_conditions_equals_diffusers(xl_pair):
    reference, unet = xl_pair
    ours = nnx.merge(unet.graphdef, unet.params)
    pooled = draw(2, POOLED)
    waves = reference.add_time_proj(torch.tensor(TIME_IDS).flatten()).reshape(2, 6 * TIME_WIDTH)
    both = torch.cat([torch.tensor(pooled), waves], dim=-1)
    assert relative_error(ours.add_embedding(both.numpy()), reference.add_embedding(both)) < 1e-5


def test_added_conditions_are_needed_where_they_belong_and_refused_elsewhere(xl_pair, sd2_pair):
    sample, text, added = draw(2, 8, 8, 4), draw(2, 7, 24), AddedConditions(draw(2, 12), TIME_IDS)
    _, unet = xl_pair
    with pytest.raises(CatVersionError, match=r"added=None: .*time ids. Give AddedConditions"):
        unet(sample, 3, text)
    for wrong in (AddedConditions(draw(2, 13), TIME_IDS), AddedConditions(draw(2, 12), draw(2, 5))):
        with pytest.raises(CatVersionError, match=r"must be projection_class.* = 60"):
            unet(sample, 3, text, added=wrong)
    with pytest.raises(CatVersionError, match=r"takes none. Leave it out"):
        sd2_pair[1](sample, 3, text, added=added)


def test_sizes_that_do_not_halve_evenly(sd2_pair):
    reference, unet = sd2_pair
    sample, text = draw(1, 7, 13, 4), draw(1, 7, 24)
    expected = reference(nchw(sample), torch.tensor([500]), torch.tensor(text)).sample
    assert relative_error(forward(unet, sample, 500, text), nhwc(expected)) < 1e-4


def test_each_part_equals_diffusers(sd2_pair):
    reference, unet = sd2_pair
    ours = nnx.merge(unet.graphdef, unet.params)
    temb, text = draw(2, 64, seed=4), draw(2, 7, 24, seed=5)
    torch_temb, torch_text = torch.tensor(temb), torch.tensor(text)
    errors = {
        "time_embedding": relative_error(
            ours.time_embedding(temb[:, :16]), reference.time_embedding(torch_temb[:, :16]).numpy()
        )
    }

    def compare(path, inputs, *, ours_args=(), torch_args=()):
        module, torch_module = ours, reference.get_submodule(path)
        for part in path.split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        expected = torch_module(nchw(inputs), *torch_args)
        expected = expected if isinstance(expected, torch.Tensor) else expected.sample
        errors[path, inputs.shape] = relative_error(module(inputs, *ours_args), nhwc(expected))

    time_and_text = {"ours_args": (temb,), "torch_args": (torch_temb,)}
    compare("down_blocks.0.resnets.0", draw(2, 8, 6, 16), **time_and_text)
    compare("down_blocks.1.resnets.0", draw(2, 8, 6, 16), **time_and_text)  # with conv_shortcut
    compare("mid_block.resnets.1", draw(2, 8, 6, 48), **time_and_text)
    compare("down_blocks.0.downsamplers.0", draw(2, 8, 6, 16))
    compare("down_blocks.0.downsamplers.0", draw(2, 7, 5, 16))
    compare("up_blocks.0.upsamplers.0", draw(2, 8, 6, 48))
    compare(
        "up_blocks.0.upsamplers.0", draw(2, 4, 3, 48), ours_args=((7, 5),), torch_args=((7, 5),)
    )
    text_args = {"ours_args": (text,), "torch_args": (torch_text,)}
    for path, width in (("down_blocks.0", 16), ("mid_block", 48), ("up_blocks.2", 16)):
        compare(f"{path}.attentions.0", draw(2, 8, 6, width), **text_args)
    for part in ("attn1", "attn2", "ff", "norm1"):
        path = f"mid_block.attentions.0.transformer_blocks.0.{part}"
        positions, context = draw(2, 48, 48), part == "attn2"
        module = getattr(ours.mid_block.attentions[0].transformer_blocks[0], part)
        expected = reference.get_submodule(path)(
            torch.tensor(positions), *([torch_text] if context else [])
        )
        errors[path] = relative_error(
            module(positions, *([text] if context else [])), expected.numpy()
        )
    assert {path: error for path, error in errors.items() if not error < 1e-5} == {}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_block_equals_diffusers(level, sd2_pair):
    reference, unet = sd2_pair
    ours = nnx.merge(unet.graphdef, unet.params)
    temb, text = draw(2, 64, seed=4), draw(2, 7, 24, seed=5)
    torch_temb, torch_text = torch.tensor(temb), torch.tensor(text)

    inputs = draw(2, 8, 6, [16, 16, 32][level])
    block = reference.down_blocks[level]
    extra = {"encoder_hidden_states": torch_text} if hasattr(block, "has_cross_attention") else {}
    expected, expected_skips = block(nchw(inputs), torch_temb, **extra)
    hidden, skips = ours.down_blocks[level](inputs, temb, text)
    assert relative_error(hidden, nhwc(expected)) < 1e-5
    assert len(skips) == len(expected_skips)
    for skip, expected_skip in zip(skips, expected_skips, strict=True):
        assert relative_error(skip, nhwc(expected_skip)) < 1e-5

    inputs = draw(2, 8, 6, 48, seed=6)
    expected = reference.mid_block(nchw(inputs), torch_temb, encoder_hidden_states=torch_text)
    assert relative_error(ours.mid_block(inputs, temb, text), nhwc(expected)) < 1e-5

    block = reference.up_blocks[level]
    inputs = draw(2, 8, 6, [48, 48, 32][level], seed=7)
    widths = [[32, 48], [16, 32], [16, 16]][level]
    skips = [draw(2, 8, 6, width, seed=8 + i) for i, width in enumerate(widths)]
    extra = {"encoder_hidden_states": torch_text} if hasattr(block, "has_cross_attention") else {}
    expected = block(nchw(inputs), tuple(map(nchw, skips)), torch_temb, **extra)
    hidden = ours.up_blocks[level](inputs, [jnp.asarray(s) for s in skips], temb, text, size=None)
    assert relative_error(hidden, nhwc(expected)) < 1e-5


@pytest.mark.parametrize("width", [15, 32, 320])
@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1)])
def test_timestep_embedding_equals_diffusers(width, flip, shift):
    timesteps = np.array([0.0, 1.0, 20.5, 981.0, 999.0], np.float32)
    expected = get_timestep_embedding(
        torch.tensor(timesteps), width, flip_sin_to_cos=flip, downscale_freq_shift=shift
    )
    ours = timestep_embedding(jnp.asarray(timesteps), width, flip_sin_to_cos=flip, freq_shift=shift)
    # An angle t * w carries t times the rounding of w < 1, half a unit in whose last place is
    # 2 ** -25, and torch's exp is one unit off for some w: at t = 999 torch is 5e-5 away from the
    # exact embedding itself.
    bound = 1e-5 + timesteps[:, None] * 2.0**-24
    assert (np.abs(np.asarray(ours) - expected.numpy()) <= bound).all()


def test_one_timestep_serves_the_batch(one_block_pair):
    _, unet = one_block_pair
    sample, text = draw(2, 8, 8, 4), draw(2, 7, 24)
    np.testing.assert_array_equal(
        forward(unet, sample, 7, text), forward(unet, sample, jnp.array([7, 7]), text)
    )


@pytest.mark.slow
def test_concept_axis_scan_and_rematerialisation_change_nothing(one_block_pair):
    _, unet = one_block_pair
    sample, text = draw(3, 2, 4, 4, 4), draw(3, 2, 7, 24)
    timesteps = jnp.arange(6).reshape(3, 2) * 150

    def loss(text, unet, sample, timesteps):
        return jnp.square(unet(sample, timesteps, text)).mean()

    @jax.jit(compiler_options=QUICK)
    def stacked(unet):
        return jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, 0, 0))(
            text, unet, sample, timesteps
        )

    @jax.jit(compiler_options=QUICK)
    def scanned(unet):
        step = jax.value_and_grad(jax.checkpoint(loss))
        return jax.lax.scan(
            lambda _, inputs: (None, step(inputs[0], unet, *inputs[1:])),
            None,
            (text, sample, timesteps),
        )[1]

    for ours, reference in zip(stacked(unet), scanned(unet), strict=True):
        assert relative_error(ours, reference) < 1e-5


@pytest.mark.slow
def test_a_transformer_computed_again_in_slices_is_the_same():
    layers = LayerFactory(nnx.Rngs(0))
    options = {"num_heads": 2, "context_dim": 12, "only_cross_attention": False, "layers": layers}
    graphdef, state = nnx.split(BasicTransformerBlock(8, **options))
    block = nnx.merge(graphdef, jax.tree.map(lambda leaf: 0.3 * draw(*leaf.shape), state))
    hidden, text = draw(1, 2 * FEED_FORWARD_SLICE, 8), draw(1, 7, 12)

    def loss(text, recompute):
        again = recomputed(lambda h, t: block(h, t, None, recompute), recompute == "blocks")
        return jnp.square(again(hidden, text)).mean()

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=QUICK)
    for found, expected in zip(compute(text, "blocks"), compute(text, "none"), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_bfloat16_is_as_close_to_float32_as_torchs(one_block_pair):
    reference, unet = one_block_pair
    sample, text = draw(2, 8, 8, 4), draw(2, 7, 24)
    exact = nhwc(reference(nchw(sample), torch.tensor([999, 998]), torch.tensor(text)).sample)
    half = randomise(diffusers.UNet2DConditionModel.from_config(FORWARD["one-block"])).to(
        torch.bfloat16
    )
    torch_half = half(
        nchw(sample).bfloat16(), torch.tensor([999, 998]), torch.tensor(text).bfloat16()
    ).sample
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), unet.params)
    graphdef = abstract_network(
        lambda rngs: UNet2DConditionModel(
            UNetConfig.from_hf(FORWARD["one-block"]), layers=LayerFactory(rngs, jnp.bfloat16)
        )
    ).graphdef
    ours = forward(Network(params, graphdef), sample, jnp.array([999, 998]), text)
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours, exact) < 1.5 * relative_error(nhwc(torch_half.float()), exact)


@pytest.mark.slow
def test_the_embedded_model(embedded_model):
    folder = embedded_model / "unet"
    reference = diffusers.UNet2DConditionModel.from_pretrained(folder).eval()
    unet = load_network(
        lambda rngs: UNet2DConditionModel(
            UNetConfig.from_hf(reference.config), layers=LayerFactory(rngs)
        ),
        folder,
    )
    sample, text = draw(2, 16, 16, 4), draw(2, 77, reference.config.cross_attention_dim)
    with torch.no_grad():
        expected = reference(nchw(sample), torch.tensor([10, 900]), torch.tensor(text)).sample
    assert relative_error(forward(unet, sample, jnp.array([10, 900]), text), nhwc(expected)) < 1e-4
