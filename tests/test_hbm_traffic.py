"""The reader of optimized TPU programs, ``benchmarks/hbm_traffic.py``, against sums by hand."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from hbm_traffic import hbm_bytes, hbm_operations, padded_hbm_bytes

PROGRAM = """
%body (p: (f32[256]{0})) -> (f32[256]{0}) {
  %p = (f32[256]{0:T(256)}) parameter(0)
  %g = f32[256]{0:T(256)} get-tuple-element(%p), index=0
  %n = f32[256]{0:T(256)} negate(%g)
  ROOT %t = (f32[256]{0:T(256)}) tuple(%n)
}

ENTRY %main (a: bf16[100,40]) -> bf16[100,40] {
  %a = bf16[100,40]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (bf16[100,40]{1,0:T(8,128)(2,1)S(1)}, bf16[100,40]{1,0:T(8,128)(2,1)}, u32[]) copy-start(%a)
  %done = bf16[100,40]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %w = (f32[256]{0:T(256)}) while(%init), condition=%cond, body=%body
  ROOT %f = bf16[100,40]{1,0:T(8,128)(2,1)} fusion(%done, %a), kind=kLoop, calls=%c
}
"""  # noqa: E501


def test_tiles_are_filled_up_and_fast_memory_is_free() -> None:
    assert padded_hbm_bytes("bf16[100,40]{1,0:T(8,128)(2,1)}") == 104 * 128 * 2
    assert padded_hbm_bytes("bf16[100,40]{0,1:T(8,128)(2,1)}") == 128 * 40 * 2
    assert padded_hbm_bytes("bf16[3,8,128]{2,1,0:T(8,128)(2,1)}") == 3 * 8 * 128 * 2
    assert padded_hbm_bytes("(f32[2]{0:T(128)S(1)}, s32[])") == 4
    assert padded_hbm_bytes("pred[7,9]") == 63


def test_every_operation_reads_its_operands_and_writes_its_results() -> None:
    kinds = {operation.kind: operation.traffic for operation in hbm_operations(PROGRAM)}
    array = 104 * 128 * 2
    assert kinds == {"copy-start": array, "negate": 2 * 1024, "fusion:Loop": 2 * array}
    assert hbm_bytes(PROGRAM) == 3 * array + 2 * 1024


def test_a_sum_on_a_real_chip_moves_three_arrays() -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
    from catversion_jax.runtime.sharding import replicated
    from catversion_jax.training.planning.chips import parse_slice
    from catversion_jax.training.planning.compiled import tpu_mesh

    sharding = replicated(tpu_mesh(parse_slice("v5e:1x1")))
    # more than the fast memory holds
    one = jax.ShapeDtypeStruct((64, 1024, 1024), jnp.float32, sharding=sharding)
    traced = jax.jit(lambda a, b: a + b).trace(one, one)
    program = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert hbm_bytes(program) == 3 * 64 * 1024 * 1024 * 4
