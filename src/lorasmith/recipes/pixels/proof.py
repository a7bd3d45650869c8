"""A pixels adapter is an adapter like any other: read, injected, merged and taken out again, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import torch
from torch import Tensor

from lorasmith.analysis import singular_values
from lorasmith.formats import read_adapter
from lorasmith.inject import eject, merged
from lorasmith.recipes.pixels.policy import ADAPTER, encoder_of, load_policy, same_bits, scores


def prove_adapter(
    directory: Path, base: dict[str, Tensor], game: gymnasium.Env[Any, Any], frames: Tensor, latent: int
) -> dict[str, Any]:
    """Compare the policy that carries the adapter with the one whose encoder has it folded in.

    Args:
        directory: of an arm's policy.
        frames: uint8, what both are asked about.

    Returns:
        How many frames get the same best action, the largest difference of a log-probability, whether
        the base's bits came back, and each layer's effective rank.
    """
    policy = load_policy(directory, base, game, latent)
    encoder, adapter = encoder_of(policy), read_adapter(directory / ADAPTER)
    injected = scores(policy, frames)
    eject(encoder)
    with merged(encoder, adapter):
        folded = scores(policy, frames)
    return {
        "adapter": directory.name, "digest": adapter.digest, "params": adapter.num_params, "frames": len(frames),
        "same_best_action": int((injected.argmax(1) == folded.argmax(1)).sum()),
        "max_abs_difference": float((injected - folded).abs().max()),
        "unmerge_bit_identical": same_bits(encoder.state_dict(), base, base),
        "singular_values": {path: _values(s) for path, s in singular_values(adapter).items()},
    }  # fmt: skip


def _values(singular_values: torch.Tensor) -> list[float]:
    return [round(float(value), 5) for value in singular_values]
