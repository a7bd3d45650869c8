"""The policy: an encoder, treated in one of four ways, under two small heads that always train."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from lorasmith.formats import read_adapter, write_adapter
from lorasmith.inject import extract, inject
from lorasmith.lora import LoRAConfig
from lorasmith.recipes.pixels.autoencoder import Encoder
from lorasmith.recipes.pixels.settings import Arm

HEADS, WHOLE, ADAPTER = "heads.safetensors", "encoder.safetensors", "adapter"
HIDDEN = 64


class Eyes(BaseFeaturesExtractor):
    """What the heads get: the positive part of the encoder's description of a frame."""

    def __init__(self, observation_space: spaces.Box, latent: int) -> None:
        super().__init__(observation_space, latent)
        channels, side, _ = observation_space.shape
        self.encoder = Encoder(channels, side, latent)

    def forward(self, frames: Tensor) -> Tensor:
        """(batch, channels, side, side) in [0, 1] → (batch, latent)."""
        features: Tensor = self.encoder(frames).relu()
        return features


def policy_options(latent: int) -> dict[str, Any]:
    """Arguments of stable-baselines3's `ActorCriticPolicy`."""
    return {
        "features_extractor_class": Eyes,
        "features_extractor_kwargs": {"latent": latent},
        "net_arch": {"pi": [HIDDEN], "vf": [HIDDEN]},
        "activation_fn": nn.ReLU,
    }


def encoder_of(policy: ActorCriticPolicy) -> Encoder:
    """The one that both heads share."""
    eyes = policy.features_extractor
    assert isinstance(eyes, Eyes)
    return eyes.encoder


def prepare_encoder(encoder: Encoder, arm: Arm, base: dict[str, Tensor], *, alpha: float, seed: int) -> None:
    """Bring the encoder to where `arm` starts.

    Args:
        base: the autoencoder's half; "scratch" leaves the random start that the policy made.
    """
    if arm.way == "scratch":
        return
    encoder.load_state_dict(base)
    if arm.way == "frozen":
        encoder.requires_grad_(False)
    elif arm.rank is not None:
        config = LoRAConfig(rank=arm.rank, alpha=alpha, targets=encoder.targets)
        inject(encoder, config, seed=seed)


def renew_optimizer(policy: ActorCriticPolicy) -> None:
    """Give the policy an optimizer over what trains now: it had made one before the encoder was prepared."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    policy.optimizer = policy.optimizer_class(trainable, lr=1.0, **policy.optimizer_kwargs)  # type: ignore[call-arg]


def save_policy(policy: ActorCriticPolicy, arm: Arm, directory: Path, provenance: dict[str, Any]) -> None:
    """Write what PPO learned: the heads, and an adapter or a whole encoder where that trained too."""
    save_file(_heads(policy), directory / HEADS)
    encoder = encoder_of(policy)
    if arm.way == "lora":
        adapter = extract(encoder)
        adapter.provenance = provenance
        write_adapter(adapter, directory / ADAPTER, base_name=provenance["base"]["name"])
    elif arm.way != "frozen":
        save_file(encoder.state_dict(), directory / WHOLE)


def load_policy(
    directory: Path, base: dict[str, Tensor], game: gymnasium.Env[Any, Any], latent: int
) -> ActorCriticPolicy:
    """Read what `save_policy` wrote, over the autoencoder's half that it was trained on."""
    policy = ActorCriticPolicy(
        game.observation_space, game.action_space, lambda _: 0.0, **policy_options(latent)
    )
    encoder, whole = encoder_of(policy), directory / WHOLE
    encoder.load_state_dict(load_file(whole) if whole.exists() else base)
    if (directory / ADAPTER).exists():
        inject(encoder, read_adapter(directory / ADAPTER))
    policy.load_state_dict(load_file(directory / HEADS), strict=False)
    return policy


@torch.no_grad()
def scores(policy: ActorCriticPolicy, frames: Tensor) -> Tensor:
    """Log-probabilities of the actions, (batch, actions), for uint8 frames."""
    logits: Tensor = policy.get_distribution(frames).distribution.logits  # type: ignore[union-attr]
    return logits


def _heads(policy: ActorCriticPolicy) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in policy.state_dict().items() if not _is_encoder(name)}


def _is_encoder(name: str) -> bool:
    return ".encoder." in name


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor], names: Iterable[str]) -> bool:
    """Whether two sets of tensors agree bit for bit."""
    return all(torch.equal(a[name], b[name]) for name in names)
