"""The residual identity, in closed form and against an independent PyTorch implementation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_networks import (
    HEAD_DIM,
    HEADS,
    attention_layer,
    default_encoders,
    make_residual,
    token_ids,
    torch_encoder,
)
from torch_reference import draw, relative_error

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.layer_choice import resolve_layers
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.clip.adaptation import ExtraKeys
from catversion_jax.models.clip.text import causal_bias


@pytest.mark.parametrize("logit_bias", [0.0, 1.0, -2.5])
def test_identity_of_the_method(logit_bias):
    """Equations (1) and (2) of residual.py, written out in float64."""
    layer, hidden = attention_layer()
    key, value = draw(1, HEADS, HEAD_DIM, seed=6), draw(1, HEADS, HEAD_DIM, seed=7)
    bias = causal_bias(7)
    plain = np.asarray(layer(hidden, bias), np.float64).reshape(2, 7, HEADS, HEAD_DIM)
    ours = layer(hidden, bias, [ExtraKeys(key, value, logit_bias)])

    def project(name):
        weights = layer.params[name]
        out = np.float64(hidden) @ np.float64(weights["kernel"]) + np.float64(weights["bias"])
        return out.reshape(2, 7, HEADS, HEAD_DIM)

    query, keys = project("q_proj"), project("k_proj")
    own = np.einsum("BTNH,BSNH->BTNS", query, keys) / math.sqrt(HEAD_DIM)
    own = np.where(np.tril(np.ones((7, 7)))[None, :, None, :] > 0, np.exp(own), 0.0).sum(-1)
    odds = np.exp(
        np.einsum("BTNH,NH->BTN", query, np.float64(key[0])) / math.sqrt(HEAD_DIM) + logit_bias
    )
    weight = (odds / (odds + own))[..., None]
    expected = plain + weight * (np.float64(value[0]) - plain)
    assert weight.min() < 0.2  # the case is not degenerate
    assert weight.max() > 0.5
    assert relative_error(ours, expected.reshape(2, 7, 48)) < 1e-5


def test_none_is_bit_equal_and_traces_to_the_same_program():
    _, encoder = default_encoders()
    ids = token_ids(2, 20)
    plain = encoder(ids)
    np.testing.assert_array_equal(encoder(ids, None), plain)
    np.testing.assert_array_equal(encoder(ids, ()), plain)
    np.testing.assert_array_equal(encoder(ids, make_residual().scaled(0)), plain)
    assert str(jax.make_jaxpr(encoder)(ids)) == str(
        jax.make_jaxpr(lambda i: encoder(i, make_residual().scaled(0)))(ids)
    )


class ConcatenatedAttention(torch.nn.Module):
    """A CLIPAttention with keys and values prepended, from its weights; written for this test."""

    def __init__(self, attention, pieces):
        super().__init__()
        self.attention, self.pieces = attention, pieces  # pieces: (key [P N H], value, logit_bias)

    def forward(self, hidden_states, *args, **kwargs):
        length = hidden_states.shape[1]
        rows = []
        for row in hidden_states:
            query = self.attention.q_proj(row) * HEAD_DIM**-0.5
            key, value = self.attention.k_proj(row), self.attention.v_proj(row)
            outs = []
            for head in range(HEADS):
                at = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                keys = torch.cat([*(k[:, head] for k, _, _ in self.pieces), key[:, at]])
                values = torch.cat([*(v[:, head] for _, v, _ in self.pieces), value[:, at]])
                logits = query[:, at] @ keys.T
                mask = [torch.full((length, k.shape[0]), b) for k, _, b in self.pieces]
                mask.append(torch.full((length, length), -torch.inf).triu(1))
                outs.append((logits + torch.cat(mask, dim=1)).softmax(-1) @ values)
            rows.append(self.attention.out_proj(torch.cat(outs, dim=-1)))
        return torch.stack(rows), None


def torch_with(residuals, ids, parameters=None):
    """The transformers encoder whose adapted layers are ConcatenatedAttention."""
    model = torch_encoder()
    parameters = parameters or [(torch.tensor(r.key), torch.tensor(r.value)) for r in residuals]
    for layer in {i for r in residuals for i in r.layers}:
        pieces = [
            (key[r.layers.index(layer)], value[r.layers.index(layer)], r.logit_bias)
            for r, (key, value) in zip(residuals, parameters, strict=True)
            if layer in r.layers
        ]
        model.encoder.layers[layer].self_attn = ConcatenatedAttention(
            model.encoder.layers[layer].self_attn, pieces
        )
    return model(torch.tensor(ids)).last_hidden_state


@pytest.mark.parametrize(
    "residuals",
    [
        [make_residual()],
        [make_residual(logit_bias=1.0)],
        [make_residual(positions=4, logit_bias=-0.5)],
        [make_residual(layers=(0, 1, 2, 3, 4), positions=2)],
        [make_residual(layers=(1, 4))],
        [make_residual(), make_residual(layers=(1, 4), positions=3, logit_bias=1.0, seed=9)],
    ],
    ids=["published", "bias", "positions", "all_layers", "explicit_layers", "two_concepts"],
)
def test_equals_an_independent_torch_implementation(residuals):
    _, encoder = default_encoders()
    ids = token_ids(2, 9)
    ours = encoder(ids, residuals if len(residuals) > 1 else residuals[0])
    assert relative_error(ours, torch_with(residuals, ids)) < 1e-4
    assert relative_error(ours, encoder(ids)) > 1e-2  # it does something


def test_gradients_equal_torch_autograd():
    _, encoder = default_encoders()
    ids, weights = token_ids(2, 9), draw(2, 9, 48, seed=8)
    residual = make_residual(positions=2, logit_bias=1.0)
    ours = jax.jit(jax.grad(lambda r: (encoder(ids, r) * weights).sum()))(residual)
    parameters = [
        (
            torch.tensor(residual.key, requires_grad=True),
            torch.tensor(residual.value, requires_grad=True),
        )
    ]
    (torch_with([residual], ids, parameters) * torch.tensor(weights)).sum().backward()
    assert relative_error(ours.key, parameters[0][0].grad) < 1e-4
    assert relative_error(ours.value, parameters[0][1].grad) < 1e-4


def test_order_of_several_residuals_does_not_matter():
    _, encoder = default_encoders()
    ids = token_ids(1, 9)
    a, b = make_residual(), make_residual(positions=3, logit_bias=1.0, seed=9)
    assert relative_error(encoder(ids, [a, b]), encoder(ids, [b, a])) < 1e-5


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_scale_multiplies_the_odds(scale):
    """With v_c orthogonal to all own values, the output along it is lambda itself."""
    layer, hidden = attention_layer()
    layer.params["v_proj"] = {"kernel": jnp.zeros((48, 48)), "bias": jnp.zeros(48)}
    residual = KVResidual(
        draw(1, 1, HEADS, HEAD_DIM, seed=6), np.ones((1, 1, HEADS, HEAD_DIM), np.float32), (0,), 0.5
    )

    def weights(r):
        return np.asarray(layer(hidden, causal_bias(7), [ExtraKeys(*r.at_layer(0), r.logit_bias)]))

    trained = weights(residual)
    # odds l / (1 - l) times scale, solved for l
    expected = scale * trained / (1 - trained + scale * trained)
    assert relative_error(weights(residual.scaled(scale)), expected) < 1e-5


def test_scale_one_changes_nothing_and_zero_is_the_plain_encoder():
    _, encoder = default_encoders()
    ids, residual = token_ids(1, 20), make_residual(logit_bias=1.0)
    np.testing.assert_array_equal(encoder(ids, residual.scaled(1.0)), encoder(ids, residual))
    np.testing.assert_array_equal(encoder(ids, residual.scaled(0)), encoder(ids))
    other = make_residual(seed=9)
    np.testing.assert_array_equal(encoder(ids, [residual.scaled(0), other]), encoder(ids, other))


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
def test_scale_out_of_range(scale):
    with pytest.raises(CatVersionError, match=r"scale=.*must be a finite number >= 0"):
        make_residual().scaled(scale)


def test_upper_with_residual_is_the_whole():
    _, encoder = default_encoders()
    ids, residual = token_ids(2, 20), make_residual()
    hidden = encoder.call("lower", ids, 2)
    np.testing.assert_array_equal(
        encoder.call("upper", hidden, residual, 2), encoder(ids, residual)
    )


def test_vmap_over_concepts_equals_one_after_another():
    _, encoder = default_encoders()
    ids = token_ids(2, 9)
    concepts = [make_residual(seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *concepts)
    together = jax.jit(jax.vmap(lambda r: encoder(ids, r)))(stacked)
    for row, concept in enumerate(concepts):
        assert relative_error(together[row], encoder(ids, concept)) < 1e-5


def test_penultimate_leaves_the_last_layer_out():
    """SDXL reads hidden_states[-2]; a residual on the unused layer would silently do nothing."""
    _, encoder = default_encoders()
    with pytest.raises(CatVersionError, match=r"layers \(2, 3, 4\).*only layers 0..3 run"):
        encoder(token_ids(1, 9), make_residual(), output="penultimate")
    moved = encoder(token_ids(1, 9), make_residual(layers=(1, 2, 3)), output="penultimate")
    assert relative_error(moved, encoder(token_ids(1, 9), output="penultimate")) > 1e-2


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (make_residual(layers=(9, 10, 11)), r"layers \(9, 10, 11\): only layers 0..4 run"),
        (
            dataclasses.replace(make_residual(), key=draw(3, 1, 12, 64)),
            r"key \[3, 1, 12, 64\].*\[3, 1, 6, 8\]",
        ),
        (dataclasses.replace(make_residual(), layers=(3, 4)), r"\[2, 1, 6, 8\]"),
        (
            dataclasses.replace(
                make_residual(), key=draw(2, 3, 1, 6, 8), value=draw(2, 3, 1, 6, 8)
            ),
            r"vmap over concepts",
        ),
    ],
    ids=["layers", "width", "count", "stacked"],
)
def test_residual_of_another_encoder(residual, message):
    _, encoder = default_encoders()
    with pytest.raises(CatVersionError, match=message):
        encoder(token_ids(1, 9), residual)


def test_upper_refuses_a_residual_below_it():
    _, encoder = default_encoders()
    with pytest.raises(CatVersionError, match=r"only layers 3..4 run"):
        encoder.call("upper", encoder.call("lower", token_ids(1, 9), 3), make_residual(), 3)


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("last3", 12, (9, 10, 11)),
        ("last3", 23, (20, 21, 22)),
        ("all", 3, (0, 1, 2)),
        ("last1", 12, (11,)),
        ("11, 9,10", 12, (9, 10, 11)),
        ([4, 2], 5, (2, 4)),
    ],
)
def test_layers_as_users_write_them(layers, count, expected):
    assert resolve_layers(layers, count) == expected


@pytest.mark.parametrize(
    "layers",
    ["last0", "last13", "last\u00b2", "12", "-1", "1,1", "", "first3", [], [12], [1, 1], ["1"]],
)
def test_layers_that_do_not_exist(layers):
    with pytest.raises(CatVersionError, match=r"layers=.*must be 'all', 'last<k>'.*0\.\.11"):
        resolve_layers(layers, 12)
