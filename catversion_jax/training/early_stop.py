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

from catversion_jax.config.training import TrainConfig, early_stop_rule


def should_stop(evaluations: Sequence[tuple[int, float]], config: TrainConfig) -> bool:
    """Whether a concept with these (step, evaluation loss), oldest first, is done.

    The last one is of the current step. Values are rounded as the checkpoint stores them.
    """
    if config.early_stop == "none" or not evaluations:
        return False
    now, (eps, length) = evaluations[-1][0], early_stop_rule(config)
    if now < max(config.early_stop_min_steps or 0, length):
        return False
    window = [loss for step, loss in evaluations if step > now - length]
    before = [loss for step, loss in evaluations if step <= now - length]
    if config.early_stop == "dvar":
        # equation (1); a loss that does not move at all has nothing left to learn
        return bool(np.var(window) <= eps * np.var(window + before))
    return min(window) > (1 - eps) * min(before)  # equation (2)
