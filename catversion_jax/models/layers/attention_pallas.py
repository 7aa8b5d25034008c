r"""Exact attention of an image's positions on a TPU, with the positions in the lanes.

    (1)  S = K^T Q,   P = 2^(S - m),   l = sum_keys P,   O = V P / l,   L = m + log2 l
    (2)  P = 2^(S - L),   D = sum_h O dO,   dP = V^T dO,   dS = P (dP - D)
    (3)  dV = dO P^T,   dK = Q dS^T / log2 e,   dQ = scale K dS

Arrays are ``[heads, head dim, positions]``; Q is multiplied by ``scale log2 e`` beforehand. The
recomputation of P in the backward pass is flash attention's (arXiv 2205.14135, 2307.08691). What is
different is the layout: with the head dimension in the lanes (FlashAttention, splash attention)
heads of 40 are padded to 128 in every array of the forward and the backward pass, and in the matrix
unit. Here the products whose result has the head dimension in it (O, dV, dK, dQ) stream 40 rows
instead of filling 128 columns, and nothing is stored padded. ``docs/results/performance.md`` has
what the compiler says of both.

Every m gives the same O and L. The largest logit so far, as in an online softmax, would have to be
looked for in every block, and what is summed up scaled again whenever it grows. Instead m lies a
fixed number of powers of two below ``|q| max |k|``, which no logit exceeds (Cauchy-Schwarz). Where
that bound is so high that all weights of a query are tiny, the block is computed once more with the
largest logit of each query, found in a pass of its own.

All keys and values of a head stay in the fast memory: 4096 positions of 40 are a third of a MB. The
programs of the backward pass go over a head's blocks of keys and add up dQ there. A number of keys
that fills no lanes (77 tokens of a prompt) is filled up, and the logits of the filling hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from catversion_jax.array_types import Array, Float

Ref = Any  # a Pallas reference to a block in the fast memory
LOG2_E = math.log2(math.e)
LANES = 128
BLOCKS = (512, 256, LANES)
"""Positions of a block of queries or keys, the largest that divides. The logits of 512 x 512 are
1 MB."""
FORWARD_QUERIES = (1024, *BLOCKS)
"""Of queries in the forward pass, where one block of keys then serves twice as many
(docs/notes/attention_kernel.md)."""
HEADROOM = 64
"""Weights are at most 2^64, and their sums at least 2^-64: between these and the ends of float32 is
room for the number of keys and the values, and for the bits of small weights."""
MAX_RESIDENT = 9216 * 64
"""Positions x head dimension of one head, as far as was compiled: 768 pixels in SD 2.x."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def transposed_attention(
    query: Float[Array, "G H T"],
    key: Float[Array, "G H S"],
    value: Float[Array, "G H S"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "G H T"]:
    """softmax(scale Q^T K) V for each of G heads.

    Args:
      query: head dimension before positions; see :func:`is_supported`.
      key: ``[G H S]``.
      value: ``[G H S]``.
      scale: of the logits.
      interpret: run the kernel's operations one by one, on any platform.
    """
    return _forward(query, key, value, scale, interpret)[0]


def is_supported(queries: int, keys: int, head_dim: int) -> bool:
    """Whether the queries fill the lanes, and a head the fast memory does not overflow."""
    return queries % LANES == 0 and max(queries, keys) * head_dim <= MAX_RESIDENT


def _forward(
    query: Array, key: Array, value: Array, scale: float, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    scaled = (query.astype(jnp.float32) * (scale * LOG2_E)).astype(query.dtype)
    groups, head_dim, queries = query.shape
    keys, values = _filled_up(key), _filled_up(value)
    size = _block(queries, FORWARD_QUERIES)
    whole = pl.BlockSpec((None, *keys.shape[1:]), lambda g, i: (g, 0, 0))
    block = pl.BlockSpec((None, head_dim, size), lambda g, i: (g, 0, i))
    row = pl.BlockSpec((None, 1, size), lambda g, i: (g, 0, i))
    out, log_sum = pl.pallas_call(
        functools.partial(_forward_kernel, num_keys=key.shape[2]),
        grid=(groups, queries // size),
        in_specs=[block, whole, whole],
        out_specs=[block, row],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct((groups, 1, queries), jnp.float32),
        ],
        scratch_shapes=[pltpu.SMEM((1,), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="transposed_attention_forward",
    )(scaled, keys, values)
    return out, (scaled, key, value, out, log_sum)


def _forward_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    log_sum_ref: Ref,
    longest_ref: Ref,
    *,
    num_keys: int,
) -> None:
    q = q_ref[...]
    size = _block(k_ref.shape[1])
    blocks = k_ref.shape[1] // size

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        longest_ref[0] = jnp.max(_lengths(k_ref[...]))

    def logits(j: Array) -> Array:
        return _without_filling(_product(k_ref[:, pl.ds(j * size, size)], q, 0, 0), j, num_keys)

    def attend(shift: Array) -> Array:
        def add(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            out, total = carry
            weights = jnp.exp2(logits(j) - shift)
            v = v_ref[:, pl.ds(j * size, size)]
            out += _product(v, weights.astype(v.dtype), 1, 0)
            return out, total + weights.sum(axis=0, keepdims=True)

        start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros((1, q.shape[1]), jnp.float32))
        out, total = jax.lax.fori_loop(0, blocks, add, start)
        out_ref[...] = (out / total).astype(out_ref.dtype)
        log_sum_ref[...] = shift + jnp.log2(total)
        return total

    total = attend(_lengths(q) * longest_ref[0] - HEADROOM)

    @pl.when(jnp.min(total) < 2.0**-HEADROOM)
    def _() -> None:
        def larger(j: Array, largest: Array) -> Array:
            return jnp.maximum(largest, logits(j).max(axis=0, keepdims=True))

        lowest = jnp.full((1, q.shape[1]), -jnp.inf, jnp.float32)
        attend(jax.lax.fori_loop(0, blocks, larger, lowest))


def _lengths(vectors: Float[Array, "H N"]) -> Float[Array, "1 N"]:
    wide = vectors.astype(jnp.float32)
    return jnp.sqrt((wide * wide).sum(axis=0, keepdims=True))


def _backward(
    scale: float, interpret: bool, kept: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array]:
    query, key, value, out, log_sum = kept
    keys, values = _filled_up(key), _filled_up(value)
    groups, head_dim, num_keys = key.shape
    size = _block(keys.shape[2])
    whole = pl.BlockSpec((None, *query.shape[1:]), lambda g, j: (g, 0, 0))
    row = pl.BlockSpec((None, 1, query.shape[2]), lambda g, j: (g, 0, 0))
    block = pl.BlockSpec((None, head_dim, size), lambda g, j: (g, 0, j))
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, scale=scale, num_keys=num_keys),
        grid=(groups, keys.shape[2] // size),
        in_specs=[whole, block, block, whole, row, whole],
        out_specs=[whole, block, block],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, keys, values)],
        scratch_shapes=[pltpu.VMEM(query.shape[1:], jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="transposed_attention_backward",
    )(query, keys, values, out, log_sum, grad)
    return dq, dk[:, :, :num_keys], dv[:, :, :num_keys]


def _backward_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    log_sum_ref: Ref,
    grad_ref: Ref,
    dq_ref: Ref,
    dk_ref: Ref,
    dv_ref: Ref,
    sum_ref: Ref,
    *,
    scale: float,
    num_keys: int,
) -> None:
    j = pl.program_id(1)
    k, v = k_ref[...], v_ref[...]
    size = _block(q_ref.shape[1])

    @pl.when(j == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        queries = pl.ds(i * size, size)
        q, grad = q_ref[:, queries], grad_ref[:, queries]
        logits = _without_filling(_product(k, q, 0, 0), j, num_keys)
        weights = jnp.exp2(logits - log_sum_ref[:, queries])
        dv += _product(grad, weights.astype(grad.dtype), 1, 1)
        wide = grad.astype(jnp.float32) * out_ref[:, queries].astype(jnp.float32)
        shift = wide.sum(axis=0, keepdims=True)
        dlogits = (weights * (_product(v, grad, 0, 0) - shift)).astype(q.dtype)
        dk += _product(q, dlogits, 1, 1)
        sum_ref[:, queries] += _product(k, dlogits, 1, 0)
        return dk, dv

    zero = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1] // size, add, (zero, zero))
    dk_ref[...] = (dk * (1 / LOG2_E)).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        dq_ref[...] = (sum_ref[...] * scale).astype(dq_ref.dtype)


transposed_attention.defvjp(_forward, _backward)


def _block(positions: int, sizes: Sequence[int] = BLOCKS) -> int:
    return next(size for size in sizes if positions % size == 0)


def _filled_up(array: Float[Array, "G H S"]) -> Float[Array, "G H S2"]:
    """With zeros, to whole lanes."""
    return jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % LANES)))


def _without_filling(logits: Array, block: Array, num_keys: int) -> Array:
    """Logits ``[keys queries]`` of a block of keys, ``-inf`` beyond ``num_keys``."""
    if num_keys % LANES == 0:
        return logits
    key = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) + block * logits.shape[0]
    return jnp.where(key < num_keys, logits, -jnp.inf)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Matrix product over one axis of each, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    # A default precision that asks for all bits of float32 is none that Mosaic has for bfloat16.
    precision = None if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        left, right, axes, precision=precision, preferred_element_type=jnp.float32
    )
