"""Images to scores: the paper's metric and its neighbours, for any method's images.

``prompts`` knows the prompt sets, ``subjects`` what a run learned, ``generation`` draws into the
layout that ``image_folders`` reads, ``masked_crops`` and ``alignment`` define the scores,
``scoring`` applies them to folders, ``prior`` asks what other prompts lost, ``intervals`` says how
sure a mean is, ``tables`` writes it all down.
"""

from catversion_jax.evaluation.intervals import Interval, bootstrap_interval
from catversion_jax.evaluation.prompts import EvaluationPrompt, PromptSet, load_prompt_set

__all__ = [
    "EvaluationPrompt",
    "Interval",
    "PromptSet",
    "bootstrap_interval",
    "load_prompt_set",
]
