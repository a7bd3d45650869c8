"""What each parameter becomes when an adapter is folded into it, for adapters of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lorasmith.errors import MergeStateError
from lorasmith.inject.experts import merged_stack, stacks_by_module, stores_in_by_out
from lorasmith.inject.kinds import layer_shape
from lorasmith.inject.layer import shape_of
from lorasmith.lora import Adapter, add_delta, compute_dtype, dora_weight, rows_of


def parameter_names(adapter: Adapter) -> set[str]:
    """Names of the parameters that folding `adapter` in changes."""
    extras = adapter.extras
    stacks = {p.rpartition(".")[0] for p, f in adapter.factors.items() if f.layout.kind == "expert"}
    weights = {f"{p}.weight" for p, f in adapter.factors.items() if f.layout.kind != "expert"}
    biases = {f"{p}.bias" for p in (*adapter.biases, *extras.shifts)}
    return stacks | weights | biases | set(extras.weights) | {f"{p}.weight" for p in extras.rows}


def base_matrices(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Path → the base's matrix (out_features, in_features) that scaling · B @ A is added to: views, no copies."""
    found: dict[str, Tensor] = {}
    for path, factors in adapter.factors.items():
        if factors.layout.kind == "expert":
            name, _, number = path.rpartition(".")
            W = model.get_parameter(name).detach()[int(number)]
            is_flipped = stores_in_by_out(model.get_submodule(name.rpartition(".")[0]))
            found[path] = W.T if is_flipped else W
        else:
            module = model.get_submodule(path)
            W = model.get_parameter(f"{path}.weight").detach()
            found[path] = rows_of(W, transposed=shape_of(module).transposed)
    return found


def folded_weight(module: nn.Module, path: str, W: Tensor, adapter: Adapter) -> Tensor:
    """W0 + scaling · B @ A, or DoRA's m · V / ‖V‖, formed in at least float32 and rounded once."""
    factors, transposed = adapter.factors[path], shape_of(module).transposed
    magnitude = adapter.extras.magnitudes.get(path)
    if magnitude is None:
        return add_delta(W, factors, transposed=transposed)
    return dora_weight(W, factors, magnitude, transposed=transposed)


def folded_extras(
    model: nn.Module, adapter: Adapter, pristine: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name, new value) of every parameter that is not the weight of one layer with factors."""
    for path, bias in adapter.biases.items():
        yield f"{path}.bias", bias
    for name, value in adapter.extras.weights.items():
        if name.removesuffix(".weight") not in adapter.factors:
            yield name, value
    for path, rows in adapter.extras.rows.items():
        W = pristine[f"{path}.weight"]
        ids = torch.tensor(rows.indices, device=W.device)
        yield f"{path}.weight", W.index_copy(0, ids, rows.values.to(W.device, W.dtype))
    for path, shift in adapter.extras.shifts.items():
        b = adapter.biases.get(path, pristine[f"{path}.bias"])
        wide = compute_dtype(b.dtype)
        yield f"{path}.bias", b.to(wide) + adapter.factors[path].scaling * shift.to(b.device, wide)
    for owner, by_name in stacks_by_module(adapter).items():
        for name, pairs in by_name.items():
            full = f"{owner}.{name}"
            yield full, merged_stack(model.get_submodule(owner), pristine[full], pairs)


def refuse_unmergeable(model: nn.Module, adapter: Adapter) -> None:
    """Raise for what has no weight to be folded into.

    Raises:
        MergeStateError: with every module and the reason.
    """
    modules, faults = dict(model.named_modules()), []
    for path, factors in adapter.factors.items():
        shape = layer_shape(modules[path]) if path in modules else None
        if shape is not None and shape.layout.groups > 1:
            faults.append(
                f"{path} is a convolution with {shape.layout.groups} groups; A reads all input channels, "
                "which no weight of that layer does"
            )
        own = f"{path}.weight"
        if own in adapter.extras.weights and factors.layout.kind != "expert":
            same = adapter.extras.weights[own].to(modules[path].weight)
            if not torch.equal(same, modules[path].weight):
                faults.append(f"{path}: the file's copy of the base weight differs from this base's")
    for path in adapter.extras.shifts:
        if getattr(modules[path], "bias", None) is None:
            faults.append(
                f"{path} has a bias inside its factors (lora_bias), but the layer has none to add it to"
            )
    if faults:
        raise MergeStateError(
            "merge: nothing was changed; serve this adapter unmerged.\n  " + "\n  ".join(faults)
        )
