"""One tiny model for each kind of layer that can carry LoRA, and float64 loops that say what LoRA on it means."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Two stacked parameters, (experts, out, in) or, transposed, (experts, in, out), used by index."""

    def __init__(
        self, experts: int = 3, width: int = 6, hidden: int = 5, *, is_transposed: bool = False
    ) -> None:
        super().__init__()
        up, down = (experts, hidden, width), (experts, width, hidden)
        if is_transposed:
            up, down = (experts, width, hidden), (experts, hidden, width)
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(down) * 0.3)
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(len(self.gate_up_proj)):
            up, down = self.gate_up_proj[e], self.down_proj[e]
            if self.is_transposed:
                up, down = up.T, down.T
            y = y + torch.tanh(x @ up.T) @ down.T
        return y


class MixtureBlock(nn.Module):
    """`experts` one level down, since PEFT cannot wrap a model's own root."""

    def __init__(self, **keywords: bool) -> None:
        super().__init__()
        self.experts = Experts(**keywords)
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x + self.experts(x))


class Named(nn.Module):
    """One layer under the name `layer`, between nothing and nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TiedLM(nn.Module):
    """Embedding, one linear layer, head; the head may share the embedding's weight."""

    def __init__(self, vocab: int = 11, width: int = 6, *, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width)
        self.mid = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mid(self.embed_tokens(ids))))


def correlate(x: Tensor, W: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """Cross-correlation of x (batch, in, …) with W (out, in, …) by plain loops; zero padding."""
    dims = len(stride)
    pads = [p for size in reversed(padding) for p in (size, size)]
    x = nn.functional.pad(x, pads)
    sizes = [(x.shape[2 + d] - W.shape[2 + d]) // stride[d] + 1 for d in range(dims)]
    y = x.new_zeros(x.shape[0], W.shape[0], *sizes)
    for place in itertools.product(*(range(s) for s in sizes)):
        window = (..., *(slice(p * s, p * s + k) for p, s, k in zip(place, stride, W.shape[2:], strict=True)))
        patch = x[window].reshape(x.shape[0], -1)
        y[(..., *place)] = patch @ W.reshape(W.shape[0], -1).T
    return y
