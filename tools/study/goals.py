"""What the study set out to show, each claim beside the figures that decide it.

The thresholds were written down before any arm was trained. Each recipe is held against the other
methods with the same loss: the paper's keys and values against the plain ones, what preserves the
plain model against those that preserve it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARE_OF_CEILING = 0.85
TEXT_LOSS = 0.05
DRIFT_FACTOR = 3.0
RIVALS = {
    "longer_context": (
        "textual_inversion_preserving_1",
        "textual_inversion_preserving",
        "dreambooth_preserving",
    ),
    "catversion": ("textual_inversion", "dreambooth"),
}
ABOVE = {"overall_masked": "masked overall", "dino_masked": "the judge's score"}

Figure = Mapping[str, Any]


def goals(arms: Mapping[str, Any], ours: str) -> list[tuple[str, str, bool]]:
    """(claim, the figures that decide it, whether it holds) of every claim whose arms are there.

    Args:
      arms: of ``results.json``.
      ours: the arm whose goals they are, of ``RIVALS``.
    """
    if ours not in arms:
        return []
    mean = arms[ours]["total"]["mean"]
    found = []
    for other in RIVALS[ours]:
        if other in arms:
            text = arms[other]["text"]
            for key, score in ABOVE.items():
                if pair := _both(mean, arms[other]["total"]["mean"], key):
                    claim = f"{score} above {text}, intervals apart"
                    found.append((claim, _shown(*pair), _low(pair[0]) > _high(pair[1])))
            samples = arms[ours]["compute"]["samples_per_concept"]
            most = arms[other]["compute"]["samples_per_concept"]
            claim = f"UNet samples at most those of {text}"
            found.append((claim, f"{samples} and {most}", samples <= most))
    if share := mean.get("share_of_ceiling_masked"):
        claim = f"masked image score at least {SHARE_OF_CEILING} of real images'"
        found.append((claim, _shown(share), share["mean"] >= SHARE_OF_CEILING))
    if loss := arms[ours]["total"]["against"].get("none", {}).get("text_alignment_edit"):
        claim = f"text score at most {TEXT_LOSS} below no personalization"
        found.append((claim, _shown(loss), loss["mean"] >= -TEXT_LOSS))
    theirs = arms.get(RIVALS[ours][-1], {}).get("total", {}).get("mean", {})
    for key, how in (("drift_as_used", "as used"), ("drift_forced", "forced")):
        if pair := _both(mean, theirs, key):
            claim = f"drift of unrelated prompts ({how}) {DRIFT_FACTOR:g}x below DreamBooth's"
            holds = DRIFT_FACTOR * pair[0]["mean"] <= pair[1]["mean"]
            found.append((claim, _shown(*pair), holds))
    return found


def _both(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> list[Figure]:
    return [ours[key], theirs[key]] if key in ours and key in theirs else []


def _low(figure: Figure) -> float:
    return figure["mean"] if figure["low"] is None else figure["low"]


def _high(figure: Figure) -> float:
    return figure["mean"] if figure["high"] is None else figure["high"]


def _shown(*figures: Figure) -> str:
    texts = [f"{f['mean']:.3f} [{_low(f):.3f}, {_high(f):.3f}]" for f in figures]
    return " and ".join(texts)
