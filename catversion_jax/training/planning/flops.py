"""FLOPs of a traced program: matrix products and convolutions, from their shapes.

    (1)  product:      2 x elements of the result x length of the contraction
    (2)  convolution:  2 x elements of the result x kernel positions x input channels of a group

The compiler's own count takes the body of a loop once and a Pallas kernel for nothing. Here a scan
counts as often as it runs, and a kernel as often as its grid has cells. A ``while`` loop counts
once: the training program's is one over steps. Of the branches of a condition the largest counts,
so of the kernels for several platforms the one with most recomputation; within a kernel the
smallest, so that the way round of the attention kernel, for a bound far above every logit, counts
as not taken.
Padding is multiplied like anything else; what is neither product nor convolution is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(jaxpr: Any) -> float:
    """FLOPs of a jaxpr; of one device's part inside ``shard_map``.

    Args:
      jaxpr: a ``Jaxpr`` or ``ClosedJaxpr``, for instance ``jax.jit(f).trace(x).jaxpr``.
    """
    return _flops(jaxpr, max)


def _flops(jaxpr: Any, branch: Callable[[list[float]], float]) -> float:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(equation, branch) for equation in jaxpr.eqns)


def _equation_flops(equation: Any, branch: Callable[[list[float]], float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        length = math.prod(lhs[axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * length
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "pallas_call":
        branch = min
    programs = jax.tree.leaves(_programs(params), is_leaf=_is_program)
    inner = [_flops(part, branch) for part in programs]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return branch(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return sum(inner)


def _convolution_flops(equation: Any) -> float:
    params, kernel = equation.params, equation.invars[1].aval.shape
    spec = params["dimension_numbers"].rhs_spec  # (out, in of a group, *positions)
    per_result = math.prod(kernel[axis] for axis in spec[1:])
    # Zeros that dilation puts between the inputs (the gradient of a stride) are not multiplied.
    real = per_result / math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * real / params["batch_group_count"]


def _programs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found: list[Any] = []
    for value in params.values():
        parts = value if isinstance(value, tuple | list) else (value,)
        found += [part for part in parts if _is_program(part)]
    return found


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
