"""When a concept has learned what it will: rules on its deterministic evaluation losses.

The training loss is dominated by its random timesteps and tells nothing; the evaluation loss (fixed
images, noise and timesteps) does.

    (1)  dvar:     Var(losses of the last W steps) < eps Var(all losses)        (arXiv 2302.04841)
    (2)  plateau:  min(losses of the last W steps) > (1 - eps) min(all before)

Both wait for ``early_stop_min_steps``. What the options leave open is calibrated
(docs/how_to/many_concepts.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from catversion_jax.config import OptimizerOptions


def should_stop(evaluations: Sequence[tuple[int, float]], options: OptimizerOptions) -> bool:
    """Whether a concept has learned what it will.

    Args:
      evaluations: (step, evaluation loss) of the concept, oldest first; the last one is of the
        current step. Losses are rounded as the checkpoint stores them.
      options: ``early_stop`` and what belongs to it.
    """
    if options.early_stop == "none" or not evaluations:
        return False
    now, (eps, length) = evaluations[-1][0], options.early_stop_rule
    if now < max(options.early_stop_min_steps or 0, length):
        return False
    window = [loss for step, loss in evaluations if step > now - length]
    before = [loss for step, loss in evaluations if step <= now - length]
    if options.early_stop == "dvar":
        # equation (1); a loss that does not move at all has nothing left to learn
        return bool(np.var(window) <= eps * np.var(window + before))
    return min(window) > (1 - eps) * min(before)  # equation (2)
