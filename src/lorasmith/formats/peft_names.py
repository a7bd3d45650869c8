"""PEFT's tensor names: `base_model.model.<module path>.lora_A.weight` and its relatives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["A", "B", "bias", "shift", "magnitude", "rows", "weight"]
"""`shift` is the bias inside the factors, `magnitude` DoRA's, `rows` are trained tokens, `weight` is whole."""

PREFIX = "base_model.model."
MAX_PATH_LENGTH = 512
_COMPONENT = re.compile(r"[^\s./\\\x00-\x1f\x7f]+")
# "default" is the adapter name that PEFT strips on save, and that hand-made files forget to
_TAILS: tuple[tuple[str, Part], ...] = (
    (r"\.lora_(?P<letter>[AB])(\.default)?\.weight", "A"),
    (r"\.(?P<embedding>lora_embedding)_(?P<letter>[AB])(\.default)?", "A"),
    (r"\.lora_B(\.default)?\.bias", "shift"),
    (r"\.lora_magnitude_vector(\.default(\.weight)?)?", "magnitude"),
    (r"\.token_adapter\.trainable_tokens_delta(\.default)?", "rows"),
)
_KINDS = tuple((re.compile(rf"(?P<path>.+?){tail}", re.DOTALL), part) for tail, part in _TAILS)
_BIAS = re.compile(r"(?P<path>.+?)(\.base_layer)?\.bias", re.DOTALL)
_REFUSED = (
    (
        r".*\.lora_(embedding_)?[AB]\.[^.]+(\.(weight|bias))?",
        'carries an adapter name other than "default"; save it with PEFT again',
    ),
    (
        r".*\.(modules_to_save|original_module)\..*",
        'is written twice by PEFT, which does so for bias="all" with modules_to_save; save it with bias="none"',
    ),
    (r".*\.lora_.*", "is unexpected"),
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """What a tensor is.

    Attributes:
        path: of its module; of the parameter itself for a whole `weight`.
        is_embedding: the factors are those of an embedding.
        is_copy: a whole weight that PEFT keeps under `base_layer`: the base's own, beside factors.
        depth: how many `base_layer` stand at the end of the path of factors of bare parameters.
    """

    path: str
    part: Part
    is_embedding: bool = False
    is_copy: bool = False
    depth: int = 0


def tensor_name(path: str, part: Part, *, has_factors: bool = True, is_embedding: bool = False) -> str:
    """Return the name that PEFT gives a tensor.

    Args:
        path: of the module; of the parameter for a whole `weight`.
        has_factors: the module carries LoRA, so PEFT keeps its own tensors under `base_layer`.
    """
    if part in ("A", "B"):
        return (
            f"{PREFIX}{path}.lora_embedding_{part}" if is_embedding else f"{PREFIX}{path}.lora_{part}.weight"
        )
    if part in ("bias", "weight"):
        path, _, last = f"{path}.bias".rpartition(".") if part == "bias" else path.rpartition(".")
        return f"{PREFIX}{path}.base_layer.{last}" if has_factors else f"{PREFIX}{path}.{last}"
    endings = {
        "shift": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "rows": "token_adapter.trainable_tokens_delta",
    }
    return f"{PREFIX}{path}.{endings[part]}"


def parse_name(name: str) -> TensorName:
    """Return what the tensor called `name` is.

    Raises:
        ValueError: with the reason, for a name that PEFT does not write.
    """
    if not name.startswith(PREFIX):
        raise ValueError(f"does not start with {PREFIX!r}, as PEFT's names do")
    found = _parse(name.removeprefix(PREFIX))
    _check_path(found.path)
    return found


def _parse(rest: str) -> TensorName:
    for pattern, part in _KINDS:
        if match := pattern.fullmatch(rest):
            groups = match.groupdict()
            path, depth = _without_base_layers(match["path"])
            if part == "A" and groups["letter"] == "B":
                part = "B"
            return TensorName(path, part, is_embedding="embedding" in groups, depth=depth)
    for kind, why in _REFUSED:
        if re.fullmatch(kind, rest, re.DOTALL):
            raise ValueError(why)
    if match := _BIAS.fullmatch(rest):
        return TensorName(match["path"], "bias")
    if "." not in rest:
        raise ValueError("is unexpected")
    owner, _, last = rest.rpartition(".")
    is_copy = owner.endswith(".base_layer")
    return TensorName(f"{owner.removesuffix('.base_layer')}.{last}", "weight", is_copy=is_copy)


def _without_base_layers(path: str) -> tuple[str, int]:
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return path, depth


def _check_path(path: str) -> None:
    if len(path) > MAX_PATH_LENGTH:
        raise ValueError(
            f"has a module path of {len(path)} characters; at most {MAX_PATH_LENGTH} are allowed"
        )
    components = path.split(".")
    if not all(_COMPONENT.fullmatch(c) and c.isprintable() for c in components):
        raise ValueError("has a module path with empty parts, spaces, slashes or control characters")
    if "base_layer" in components:
        raise ValueError("has base_layer inside its module path, as no name of PEFT's does")
