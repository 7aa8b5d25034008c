"""What ``torch.compile`` and ``peft.get_peft_model`` put around a model of transformers."""

from __future__ import annotations

from typing import Any


def innermost(encoder: Any) -> Any:
    """The transformers model inside what ``torch.compile`` and ``peft.get_peft_model`` make."""
    while encoder is not None:
        children = vars(encoder).get("_modules", {})
        if "_orig_mod" in children:
            encoder = children["_orig_mod"]
        elif hasattr(type(encoder), "get_base_model"):
            encoder = encoder.get_base_model()
        else:
            break
    return encoder


def is_compiled(encoder: Any) -> bool:
    """Whether ``torch.compile`` was applied to a text encoder, in either of its forms."""
    inner = innermost(encoder)
    if inner is None:
        return False
    wrapped = "_orig_mod" in vars(encoder).get("_modules", {})
    return wrapped or getattr(inner, "_compiled_call_impl", None) is not None
