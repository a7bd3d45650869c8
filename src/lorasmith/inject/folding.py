"""What each parameter becomes when an adapter is folded into it, for adapters of every kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorasmith.errors import MergeStateError
from lorasmith.inject.experts import merged_stack, stacks_by_module, stores_in_by_out
from lorasmith.inject.kinds import layer_shape
from lorasmith.inject.layer import shape_of
from lorasmith.inject.rows import tied_faults
from lorasmith.lora import Adapter, Factors, TokenRows, add_delta, compute_dtype, dora_weight, rows_of
from lorasmith.quantised import QuantisedLinear


def changed_names(adapter: Adapter) -> set[str]:
    """Names of the parameters that folding `adapter` in changes, but for those that follow by a shared weight."""
    extras = adapter.extras
    weights = {f"{p}.weight" for p, f in adapter.factors.items() if f.layout.kind != "expert"}
    biases = {f"{p}.bias" for p in (*adapter.biases, *extras.shifts)}
    return expert_stacks(adapter).keys() | weights | biases | set(extras.weights)


def expert_stacks(adapter: Adapter) -> dict[str, list[Factors]]:
    """Name of each stacked parameter → the factors of its experts, in their order."""
    return {
        f"{owner}.{name}": pairs
        for owner, by_name in stacks_by_module(adapter).items()
        for name, pairs in by_name.items()
    }


def is_low_rank(adapter: Adapter, name: str) -> bool:
    """Whether the parameter `name` becomes W0 + scaling · B @ A and no more, so that rows can be formed apart."""
    path, _, kind = name.rpartition(".")
    return kind == "weight" and path in adapter.factors and path not in adapter.extras.magnitudes


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


def folded_value(
    module: nn.Module,
    name: str,
    W: Tensor,
    adapter: Adapter,
    *,
    pairs: list[Factors] | None = None,
    rows: TokenRows | None = None,
) -> Tensor:
    """What the parameter `name` of `module`, W in the base, becomes; on W's device.

    Args:
        pairs: the factors of its experts, if it is a stack.
        rows: the trained token rows that it gets.
    """
    path, extras = name.rpartition(".")[0], adapter.extras
    if pairs is not None:
        return merged_stack(module, W, pairs)
    if name.endswith(".bias") and (path in adapter.biases or path in extras.shifts):
        return _folded_bias(path, W, adapter)
    if name.endswith(".weight") and path in adapter.factors:
        return folded_weight(module, path, W, adapter)
    if rows is not None:
        return W.index_copy(0, torch.tensor(rows.indices, device=W.device), rows.values.to(W.device, W.dtype))
    return extras.weights[name]


def folded_weight(module: nn.Module, path: str, W: Tensor, adapter: Adapter) -> Tensor:
    """W0 + scaling · B @ A, or DoRA's m · V / ‖V‖, formed in at least float32 and rounded once."""
    factors, transposed = adapter.factors[path], shape_of(module).transposed
    magnitude = adapter.extras.magnitudes.get(path)
    if magnitude is None:
        return add_delta(W, factors, transposed=transposed)
    return dora_weight(W, factors, magnitude, transposed=transposed)


def _folded_bias(path: str, b: Tensor, adapter: Adapter) -> Tensor:
    b = adapter.biases.get(path, b)
    shift = adapter.extras.shifts.get(path)
    if shift is None:
        return b
    wide = compute_dtype(b.dtype)
    return b.to(wide) + adapter.factors[path].scaling * shift.to(b.device, wide)


def same_change(
    model: nn.Module, adapter: Adapter, rows: Mapping[str, TokenRows], one: str, other: str
) -> bool:
    """Whether two parameters that are one tensor provably get the same value; biases never count as such."""
    if one in rows and other in rows:
        return rows[one] is rows[other]
    if is_low_rank(adapter, one) and is_low_rank(adapter, other):
        return _same_delta(model, adapter, one.removesuffix(".weight"), other.removesuffix(".weight"))
    saved = [adapter.extras.weights.get(name) for name in (one, other)]
    if any(name.rpartition(".")[0] in adapter.factors for name in (one, other)):
        return (
            False  # DoRA, whose rows are normalised one way or the other; a file's copy of the base's weight
        )
    return saved[0] is not None and saved[1] is not None and _same_tensor(saved[0], saved[1])


def _same_delta(model: nn.Module, adapter: Adapter, one: str, other: str) -> bool:
    f, g = adapter.factors[one], adapter.factors[other]
    C, D = g.A, g.B
    if shape_of(model.get_submodule(one)).transposed != shape_of(model.get_submodule(other)).transposed:
        C, D = D.T, C.T
    return f.scaling == g.scaling and _same_tensor(f.A, C) and _same_tensor(f.B, D)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def refuse_quantised(model: nn.Module, adapter: Adapter) -> None:
    """Raise if a weight that `adapter` changes is quantised: rounding to its codes would eat the update.

    Raises:
        MergeStateError: with the format and what to do instead.
    """
    modules = dict(model.named_modules())
    kinds = [m.kind for path in adapter.factors if isinstance(m := modules.get(path), QuantisedLinear)]
    if kinds:
        raise MergeStateError(
            f"merge: {len(kinds)} of {len(adapter.factors)} adapted layers hold {kinds[0]} codes, not weights; "
            "nothing was changed.\n  Serve the adapter unmerged, or merge into the dequantised base: "
            f"dequantise_linears(base.model), or `lorasmith merge ADAPTER --base B --quantize {kinds[0]} --out DIR`."
        )


def refuse_unmergeable(
    model: nn.Module,
    adapter: Adapter,
    parameters: Mapping[str, nn.Parameter],
    base: Mapping[str, Tensor],
) -> None:
    """Raise for what has no weight to be folded into.

    Args:
        parameters: as `parameter_slots` gives them, in the base's own state.
        base: name → the bits of the base.

    Raises:
        MergeStateError: with every module and the reason.
    """
    modules = dict(model.named_modules())
    faults = [
        f"{name} has no place of its own; is its module known under another path?"
        for name in sorted(changed_names(adapter) - parameters.keys() - _missing_biases(adapter, modules))
    ]
    faults += tied_faults(parameters, adapter)
    for path, factors in adapter.factors.items():
        shape = layer_shape(modules[path]) if path in modules else None
        if shape is not None and shape.layout.groups > 1:
            faults.append(
                f"{path} is a convolution with {shape.layout.groups} groups; A reads all input channels, "
                "which no weight of that layer does"
            )
        copy = adapter.extras.weights.get(own := f"{path}.weight")
        is_layer = factors.layout.kind != "expert" and own in base
        if copy is not None and is_layer and not torch.equal(copy.to(base[own]), base[own]):
            faults.append(f"{path}: the file's copy of the base weight differs from this base's")
    faults += [
        f"{name.removesuffix('.bias')} has a bias inside its factors (lora_bias), "
        "but the layer has none to add it to"
        for name in sorted(_missing_biases(adapter, modules))
    ]
    if faults:
        raise MergeStateError(
            "merge: nothing was changed; serve this adapter unmerged.\n  " + "\n  ".join(faults)
        )


def _missing_biases(adapter: Adapter, modules: Mapping[str, nn.Module]) -> set[str]:
    return {f"{path}.bias" for path in adapter.extras.shifts if getattr(modules[path], "bias", None) is None}
