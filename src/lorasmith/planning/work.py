"""FLOPs of a pass, and the time they take: products at the machine's rate, the rest at memory speed."""

from __future__ import annotations

from dataclasses import dataclass

from lorasmith.planning.activations import Computing, Pass, Trained, saved_bytes
from lorasmith.planning.decoder import Decoder, ends_block, is_in_mlp
from lorasmith.planning.machine import Machine

TRAFFIC_PER_SAVED_BYTE = 5
"""A saved element is written, read by the next operation, read again in backward, and its gradient is
written and read."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one pass by purpose, and bytes that elementwise operations move."""

    linear: int
    low_rank: int
    attention: int
    head: int
    traffic_bytes: int

    @property
    def flops(self) -> int:
        """All operations."""
        return self.linear + self.low_rank + self.attention + self.head

    def seconds(self, machine: Machine) -> float:
        """Time of the pass if products run at the machine's rate and all else at its memory's."""
        return self.flops / machine.flops + self.traffic_bytes / machine.bytes_per_s


def work_of(decoder: Decoder, trained: Trained, p: Pass, how: Computing) -> Work:
    """Forward and backward of one pass.

    A product costs 2 operations per weight and token; the gradient of its input as much again, that of
    its weight (full fine-tuning, and the factors) once more. So 4·P per token with LoRA, 6·P in full.
    Attention: two products of n·L·q forward (half of them, where the mask is causal), five backward.
    """
    n, d = p.slots, decoder
    layers = int(how.again == "layers")
    times = 3 if trained.is_full else 2
    numbers = 0 if trained.is_full else trained.params(d)
    scores = 2 * n * p.length * d.query_width * d.layers // (1 if p.is_masked else 2)
    again = {"none": 0, "mlp": _gate_and_up(d), "layers": d.linear_params}[how.again]
    saved = saved_bytes(d, trained, p, Computing(how.is_block, how.is_tiled))
    return Work(
        linear=2 * n * (d.linear_params * times + again),
        low_rank=2 * n * numbers * (3 + layers),
        attention=scores * (7 + 2 * layers),
        head=2 * p.supervised * d.vocabulary * d.width * (3 if trained.is_full else 2),
        traffic_bytes=saved * (TRAFFIC_PER_SAVED_BYTE + 2 * layers),
    )


def _gate_and_up(d: Decoder) -> int:
    return sum(
        rows * columns
        for path, (rows, columns) in d.linears.items()
        if is_in_mlp(path) and not ends_block(path)
    )
