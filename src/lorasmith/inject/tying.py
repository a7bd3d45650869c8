"""Memory that several parameters of a model share, as tied embeddings do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor, nn


def parameter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter slot once: a module that the model holds under two paths is one owner."""
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{key}" if path else key, parameter


def shared_parameters(
    parameters: Mapping[str, nn.Parameter], names: set[str], are_equal: Callable[[str, str], bool]
) -> tuple[set[str], set[str]]:
    """Which of `names`, all about to change, cannot change where they lie.

    A change that every owner of the memory is to get is made once, and the memory stays shared.
    Any other would reach an owner that it is not meant for, so it needs memory of its own.

    Args:
        parameters: as `parameter_slots` gives them, in the base's own state.
        are_equal: whether two of `names` get the same new value.

    Returns:
        Names that need memory of their own; names that follow from another one's change.
    """
    separate, follow = set(), set()
    for group in _overlapping(parameters):
        changed = [name for name, _ in group if name in names]
        if not changed:
            continue
        first = group[0][1]
        is_one_tensor = all(_place(p) == _place(first) for _, p in group)
        if (
            len(changed) == len(group)
            and is_one_tensor
            and all(are_equal(a, b) for a, b in pairwise(changed))
        ):
            follow.update(changed[1:])
        else:
            separate.update(changed)
    return separate, follow


def tied_configs(model: nn.Module) -> list[Any]:
    """The model's configurations (transformers' `config`) that say its head shares the embedding's weight."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    configs = [config, text() if callable(text) else None]
    distinct = {id(c): c for c in configs}.values()
    return [c for c in distinct if getattr(c, "tie_word_embeddings", False) is True]


def head_is_tied(model: nn.Module) -> bool:
    """Whether the head and the input embedding are one tensor now."""
    try:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    weights = [getattr(end, "weight", None) for end in ends]
    return weights[0] is not None and weights[0] is weights[1]


def _overlapping(parameters: Mapping[str, nn.Parameter]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Groups of two or more parameters, of different modules or attributes, that share any byte."""
    group: list[tuple[str, nn.Parameter]] = []
    end = (0, 0)
    for name, parameter in sorted(parameters.items(), key=lambda item: _span(item[1])):
        storage, start, stop = _span(parameter)
        if not parameter.numel():
            continue
        if group and storage == end[0] and start < end[1]:
            group.append((name, parameter))
            end = (storage, max(stop, end[1]))
            continue
        if len(group) > 1:
            yield group
        group, end = [(name, parameter)], (storage, stop)
    if len(group) > 1:
        yield group


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """(storage, first byte, byte after the last)."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), begin * size, (begin + reach) * size


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
