"""Where the parts of a decoder are, found by what they are and never by an architecture's name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorasmith.errors import TargetError


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path → decoder layer: the longest list of modules of one class.

    Raises:
        TargetError: there is none.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    }
    if not lists:
        raise TargetError(f"{type(model).__name__} has no list of like layers, so no decoder layers.")
    path = max(lists, key=lambda p: len(lists[p]))
    return {f"{path}.{k}": layer for k, layer in enumerate(lists[path])}


def body_of(model: nn.Module) -> nn.Module:
    """What turns tokens into hidden states: the part below the output layer."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if not isinstance(body, nn.Module):
        raise TargetError(f"{type(model).__name__} is not a body with an output layer on it.")
    return body


def width_of(model: nn.Module) -> int:
    """Width of the hidden states."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.get_parameter("weight").shape[1])


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of every norm: of the modules that have only vectors and are called a norm."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if _is_norm(module)
        for name, parameter in module.named_parameters(recurse=False)
    }


def final_norm(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the norms of the body that lie in no decoder layer."""
    layers = tuple(f"{path}." for path in decoder_layers(model))
    return {name: p for name, p in norm_parameters(model).items() if not name.startswith(layers)}


def sublayers(layer: nn.Module) -> list[nn.Module]:
    """The attention and the MLP of a decoder layer: what each gives goes to its residual.

    Raises:
        TargetError: the layer does not consist of two such parts, and norms.
    """
    found = {n: m for n, m in layer.named_children() if any(p.ndim > 1 for p in m.parameters())}
    if len(found) != 2:
        raise TargetError(
            f"{type(layer).__name__} has {len(found)} parts with matrices ({', '.join(found) or 'none'}); "
            "a Houlsby adapter goes after the attention and after the MLP."
        )
    return list(found.values())


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Path and module of each linear layer, the output layer left out."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return ((p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in own)
