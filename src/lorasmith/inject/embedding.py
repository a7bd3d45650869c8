"""LoRA on an embedding: token t gets row t of Aᵀ, times Bᵀ."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lorasmith.inject.layer import LoRALayer


class LoRAEmbedding(LoRALayer):
    """y = W[t] + scaling · B @ A[:, t], times `embed_scale` where the base scales its rows.

    Dropout does not apply: there is no input whose elements could be dropped.
    """

    def _add_to_base(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        return y + self.low_rank(x).to(y.dtype)

    def low_rank(self, ids: Tensor) -> Tensor:
        """scaling · B @ A[:, t] for each token id t, shape (…, embedding_dim)."""
        u = F.embedding(ids, self.lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)  # type: ignore[arg-type]
        return F.linear(u, self.lora_B * self.lora_scaling) * self.embed_scale_or_one

    @property
    def embed_scale_or_one(self) -> Tensor | float:
        """What a scaled embedding (Gemma's) multiplies its rows by."""
        scale: Tensor | float = getattr(self, "embed_scale", 1.0)
        return scale
