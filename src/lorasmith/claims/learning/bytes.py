"""The smallest model that has something to learn: the next byte from those before it, a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorasmith.baselines import MethodOptions, make_method
from lorasmith.data import read_records, sample_path

WINDOW, WIDTH, ALPHABET = 6, 32, 96
BATCH = 512


class Body(nn.Module):
    """Embeddings of the last bytes, side by side, through residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, 8)
        self.down = nn.Linear(8 * WINDOW, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, windows: Tensor) -> Tensor:
        """(n, WINDOW) byte numbers to (n, WIDTH)."""
        hidden = self.down(self.embed(windows).flatten(1))
        for layer in self.layers:
            hidden = hidden + layer(torch.relu(hidden))
        return torch.relu(hidden)


class ByteModel(nn.Module):
    """Logits of the next byte."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Body()
            self.head = nn.Linear(WIDTH, ALPHABET)

    def forward(self, windows: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(self.model(windows))
        return logits


def windows_of(part: str, column: str, most: int) -> tuple[Tensor, Tensor]:
    """(windows, next bytes) of a column of a sample's records, at most `most` of them."""
    records = read_records(sample_path(part)).records
    text = "\n".join(getattr(r, column) for r in records).encode("ascii", "replace")[: most + WINDOW]
    codes = torch.tensor([min(max(b - 32, 0), ALPHABET - 1) for b in text])
    rows = codes.unfold(0, WINDOW + 1, 1)
    return rows[:, :WINDOW].contiguous(), rows[:, WINDOW].contiguous()


def loss_on(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Nats per byte."""
    with torch.no_grad():
        return float(cross_entropy(model(data[0]), data[1]))


def fit(
    model: nn.Module,
    parameters: list[nn.Parameter],
    data: tuple[Tensor, Tensor],
    *,
    lr: float,
    steps: int,
    seed: int,
) -> None:
    """Adam with a rate that falls to zero, random batches."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(data[1]), (BATCH,), generator=random)
        optimizer.zero_grad()
        cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def in_dimensions(
    make: Callable[[], nn.Module], dimension: int, data: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor],
    *, rates: tuple[float, ...], steps: int, seed: int,
) -> float:  # fmt: skip
    """Loss after training `dimension` numbers through a Fastfood projection onto every weight (DID); best rate."""
    losses = []
    for lr in rates:
        model = make()
        options = MethodOptions(dimension=dimension, projection="fastfood").resolved("intrinsic")
        method = make_method("intrinsic", options)
        method.attach(model, seed=seed)
        fit(model, list(method.parameters(model).values()), data, lr=lr, steps=steps, seed=seed)
        losses.append(loss_on(model, held_out))
        method.detach(model)
    return min(losses)
