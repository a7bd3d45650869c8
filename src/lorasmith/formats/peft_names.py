"""PEFT's tensor names: `base_model.model.<module path>.lora_A.weight` and its relatives."""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["A", "B", "bias"]

PREFIX = "base_model.model."
MAX_PATH_LENGTH = 512
# "default" is the adapter name that PEFT strips on save, and that hand-made files forget to
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])(\.default)?\.weight", re.DOTALL)
_BIAS = re.compile(r"(?P<path>.+?)(\.base_layer)?\.bias", re.DOTALL)
_COMPONENT = re.compile(r"[^\s./\\\x00-\x1f\x7f]+")

_OTHER_KINDS = (
    (r".*\.lora_magnitude_vector(\..*)?", "is a magnitude vector (DoRA), which cannot be applied yet"),
    (r".*\.lora_embedding_[AB](\..*)?", "is LoRA on an embedding, which cannot be applied yet"),
    (
        r".*\.lora_[AB](\.default)?\.bias",
        "is a bias inside the factors (lora_bias), which cannot be applied yet",
    ),
    (
        r".*\.lora_[AB]\.[^.]+\.weight",
        'carries an adapter name other than "default"; save it with PEFT again',
    ),
    (r".*\.token_adapter\..*", "holds trained tokens (trainable_token_indices), which cannot be applied yet"),
    (r".*\.base_layer\.weight", "is a copy of the base's own weight; save with save_embedding_layers=False"),
    (r".*\.weight", "is a whole trained weight (modules_to_save), which cannot be applied yet"),
)


def tensor_name(path: str, part: Part, *, has_factors: bool) -> str:
    """Return the name that PEFT gives a tensor.

    Args:
        has_factors: the module carries LoRA, so PEFT keeps its bias under `base_layer`.
    """
    if part == "bias":
        return f"{PREFIX}{path}.base_layer.bias" if has_factors else f"{PREFIX}{path}.bias"
    return f"{PREFIX}{path}.lora_{part}.weight"


def parse_name(name: str) -> tuple[str, Part]:
    """Return (module path, part).

    Raises:
        ValueError: with the reason, for a tensor that is none of A, B and bias.
    """
    if not name.startswith(PREFIX):
        raise ValueError(f"does not start with {PREFIX!r}, as PEFT's names do")
    rest = name.removeprefix(PREFIX)
    if match := _FACTOR.fullmatch(rest):
        path = match["path"]
        part: Part = "A" if match["part"] == "A" else "B"
    elif (match := _BIAS.fullmatch(rest)) and not re.fullmatch(r".*\.lora_[AB](\.default)?\.bias", rest):
        path, part = match["path"], "bias"
    else:
        raise ValueError(_why_not(rest))
    _check_path(path)
    return path, part


def _why_not(rest: str) -> str:
    return next((why for kind, why in _OTHER_KINDS if re.fullmatch(kind, rest, re.DOTALL)), "is unexpected")


def _check_path(path: str) -> None:
    if len(path) > MAX_PATH_LENGTH:
        raise ValueError(
            f"has a module path of {len(path)} characters; at most {MAX_PATH_LENGTH} are allowed"
        )
    components = path.split(".")
    if not all(_COMPONENT.fullmatch(c) and c.isprintable() for c in components):
        raise ValueError("has a module path with empty parts, spaces, slashes or control characters")
    if "base_layer" in components:
        raise ValueError("is LoRA on a bare parameter (target_parameters), which cannot be applied yet")
