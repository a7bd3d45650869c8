"""Phase one: an autoencoder learns to describe frames in a few numbers, with no reward in sight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorasmith.errors import ConfigError

# (channels, kernel, stride, padding) of each convolution, by the side of the frame
SMALL = ((16, 3, 1, 1), (32, 4, 2, 1))
NATURE = ((32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0))  # Mnih et al. 2015, for 84 × 84
PLANS = {10: SMALL, 84: NATURE}


class Encoder(nn.Module):
    """(batch, channels, side, side) in [0, 1] → (batch, latent): convolutions, then one linear layer.

    The side is 10 (MinAtar) or 84 (Atari).
    """

    def __init__(self, channels: int, side: int, latent: int) -> None:
        super().__init__()
        self.shape = {"channels": channels, "side": side, "latent": latent}
        self.targets: tuple[str, ...] = ()
        for number, (out, kernel, stride, padding) in enumerate(_plan(side), 1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, out, kernel, stride, padding))
            channels, side = out, (side + 2 * padding - kernel) // stride + 1
            self.targets += (f"conv{number}",)
        self.map_shape = (channels, side, side)
        self.to_latent = nn.Linear(channels * side * side, latent)
        self.targets += ("to_latent",)

    def forward(self, frames: Tensor) -> Tensor:
        """Describe the frames."""
        for conv in self.convs():
            frames = conv(frames).relu()
        latent: Tensor = self.to_latent(frames.flatten(1))
        return latent

    def convs(self) -> list[nn.Conv2d]:
        """From the frame inwards."""
        return [module for module in self.children() if isinstance(module, nn.Conv2d)]


class Decoder(nn.Module):
    """(batch, latent) → (batch, channels, side, side): the encoder's mirror image."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.map_shape = encoder.map_shape
        self.from_latent = nn.Linear(encoder.to_latent.out_features, encoder.to_latent.in_features)
        plan = list(zip(encoder.convs(), _plan(encoder.shape["side"]), strict=True))
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(conv.out_channels, conv.in_channels, kernel, stride, padding)
            for conv, (_, kernel, stride, padding) in reversed(plan)
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Draw what the numbers describe; values outside [0, 1] are the decoder's error."""
        x: Tensor = self.from_latent(latent).view(-1, *self.map_shape)
        for conv in self.convs:
            x = conv(x.relu())
        return x


def _plan(side: int) -> tuple[tuple[int, int, int, int], ...]:
    if side not in PLANS:
        raise ConfigError(f"frames are {side} pixels wide; this recipe has encoders for {sorted(PLANS)}.")
    return PLANS[side]


def train_autoencoder(
    frames: Tensor, *, latent: int, updates: int, batch: int, learning_rate: float, seed: int
) -> tuple[Encoder, Decoder, list[float]]:
    """Fit both halves to the mean squared error of `frames`, uint8 (count, channels, side, side).

    Returns:
        Encoder, decoder, and the loss of every update.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(frames.shape[1], frames.shape[2], latent)
        decoder = Decoder(encoder)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=learning_rate)
    losses = []
    for _ in range(updates):
        chosen = torch.randint(len(frames), (batch,), generator=generator)
        x = frames[chosen].float() / 255
        loss = nn.functional.mse_loss(decoder(encoder(x)), x)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return encoder, decoder, losses
