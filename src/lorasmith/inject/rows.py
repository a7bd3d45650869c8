"""Trained rows of an embedding (PEFT's `trainable_token_indices`), seen by every layer tied to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasmith.inject.kinds import AdaptedLayer
from lorasmith.inject.layer import adapt_class
from lorasmith.lora import Adapter, TokenRows


class TokenRowsLayer(AdaptedLayer):
    """Computes with the base's weight in which row `lora_row_ids[i]` is `lora_rows[i]`."""

    lora_rows: nn.Parameter
    lora_row_ids: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """What the base's class computes with those rows in place."""
        if not self.lora_is_active:
            return super().forward(x)  # type: ignore[no-any-return]
        ids = torch.tensor(self.lora_row_ids, device=x.device)
        return self._embed(x, ids) if isinstance(self, nn.Embedding) else self._project(x, ids)

    def _embed(self, x: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        is_row = x[..., None] == ids
        row = self.lora_rows[is_row.int().argmax(-1)] * getattr(self, "embed_scale", 1.0)
        return torch.where(is_row.any(-1, keepdim=True), row.to(y.dtype), y)

    def _project(self, x: Tensor, ids: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return F.linear(x, weight.index_copy(0, ids, self.lora_rows.to(weight.dtype)), bias)


def attach_rows(model: nn.Module, path: str, rows: TokenRows) -> None:
    """Put trained rows on the embedding at `path` and on every layer that shares its weight."""
    weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
    parameter = nn.Parameter(rows.values.detach().to(weight.device, weight.dtype, copy=True))
    for module in sharing(model, weight):
        adapt_class(module, (TokenRowsLayer,))
        module.register_parameter("lora_rows", parameter)
        module.lora_row_ids = rows.indices  # type: ignore[assignment]


def sharing(model: nn.Module, weight: Any) -> list[nn.Module]:
    """Modules whose weight is this very parameter."""
    return [m for m in model.modules() if m._parameters.get("weight") is weight]


def rows_by_weight(parameters: Mapping[str, nn.Parameter], adapter: Adapter) -> dict[str, TokenRows]:
    """Name of every weight that gets trained rows → those rows: an embedding's, and all that share its memory.

    A weight that the adapter holds whole is the layer's own, so it gets none.

    Args:
        parameters: as `parameter_slots` gives them, in the base's own state.
    """
    return {
        name: rows
        for path, rows in adapter.extras.rows.items()
        for name, p in parameters.items()
        if p is parameters[f"{path}.weight"] and name not in adapter.extras.weights
    }


def tied_faults(parameters: Mapping[str, nn.Parameter], adapter: Adapter) -> list[str]:
    """Trained rows whose weight is shared with a layer that the adapter changes in another way too."""
    taken = {f"{path}.weight" for path in (*adapter.factors, *adapter.extras.rows)}
    return [
        f"{path}: {name} shares its weight, so the trained token rows are that layer's too, "
        "and it has rows or factors of its own"
        for path in adapter.extras.rows
        for name, p in parameters.items()
        if p is parameters.get(own := f"{path}.weight") and name != own and name in taken
    ]


def rows_fault(model: nn.Module, path: str, rows: TokenRows) -> str | None:
    """Why these rows have no place at `path`."""
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, nn.Embedding):
        return f"{path}: trained token rows need an embedding there"
    odd = [
        type(m).__name__ for m in sharing(model, module.weight) if not isinstance(m, nn.Embedding | nn.Linear)
    ]
    if odd:
        return f"{path}: its weight is shared with {odd[0]}, whose rows cannot be replaced"
    if rows.values.shape != (len(rows.indices), module.embedding_dim):
        wanted = (len(rows.indices), module.embedding_dim)
        return f"{path}: trained rows of shape {tuple(rows.values.shape)}, {wanted} are needed"
    if max(rows.indices) >= module.num_embeddings:
        return f"{path}: token {max(rows.indices)} is beyond its {module.num_embeddings} rows"
    return None
