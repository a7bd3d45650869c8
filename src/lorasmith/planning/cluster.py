"""Many devices: what each of them holds, and how long a step waits for the network.

The frozen base lies on `shard` devices together (1: every device has it whole), as `estimate.weights_here` says: its
layers are gathered one after another, in the forward and again in the backward pass, the next one while this one
computes. Factors are replicated; each device has rows of its own, and their gradients are summed once a step. With P
bytes of the layers' weights on N devices in groups of S, each device

    receives   2 · P · (S − 1)/S a step for the base, 2 · T · (N − 1)/N for T bytes of trained numbers' gradients
    waits      max(compute, receive the base) + receive the gradients + latency · steps of the collectives

In full fine-tuning gradients and moments lie in shards too, and the gradients are scattered at the same rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lorasmith.errors import ConfigError
from lorasmith.planning.activations import Trained
from lorasmith.planning.decoder import Decoder
from lorasmith.planning.estimate import GATHERED_LAYERS, MARGIN, Job, estimate
from lorasmith.planning.machine import Machine
from lorasmith.planning.work import work_of

COLLECTIVES_PER_LAYER = 2
"""A layer is gathered in the forward and in the backward pass."""


@dataclass(frozen=True)
class Network:
    """What joins the devices.

    Attributes:
        per_node: devices in one machine.
        node_bytes_per_s: into a device from others of its machine.
        net_bytes_per_s: into a device from other machines.
        latency_s: of one message.
        share: of these rates that collectives reach.
    """

    per_node: int = 8
    node_bytes_per_s: float = 450e9
    net_bytes_per_s: float = 50e9
    latency_s: float = 10e-6
    share: float = 0.7

    def rate(self, devices: int) -> float:
        """Bytes per second into each of `devices` while they gather something together.

        Across machines, a byte comes into a machine once, through the adapters of all its devices.
        """
        if devices <= self.per_node:
            return self.node_bytes_per_s * self.share
        return min(self.node_bytes_per_s, self.net_bytes_per_s * self.per_node) * self.share

    def wait(self, devices: int) -> float:
        """Latency of one collective: its messages go along a tree."""
        return self.latency_s * math.ceil(math.log2(devices)) if devices > 1 else 0.0


@dataclass(frozen=True)
class Spread:
    """One job on many devices, each with the job's passes of its own.

    Attributes:
        shard: devices that hold one copy of the base together.
        memory_bytes: of each device at the worst moment.
        compute_s, gather_s, reduce_s: of a step; gathering happens while layers compute.
    """

    devices: int
    shard: int
    memory_bytes: int
    fits: bool
    compute_s: float
    gather_s: float
    reduce_s: float
    tokens: int

    @property
    def step_s(self) -> float:
        """What a step takes."""
        return max(self.compute_s, self.gather_s) + self.reduce_s

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.devices * self.tokens / self.step_s

    @property
    def efficiency(self) -> float:
        """Share of a step in which products are computed."""
        return self.compute_s / self.step_s


def spread(
    job: Job, machine: Machine, network: Network, *, devices: int, shard: int, base_bits: float | None = None
) -> Spread:
    """Predict a step of `job` on each of `devices`.

    Args:
        job: its passes are those of one device.
        shard: devices per copy of the base; a divisor of `devices`.
        base_bits: of a weight of the linear layers, where they are quantised; embeddings and head are not.

    Raises:
        ConfigError: `devices` is no multiple of `shard`, or full fine-tuning of a quantised base is asked.
    """
    if shard < 1 or devices % shard:
        raise ConfigError(f"devices={devices}, shard={shard}: use a divisor of the devices")
    if base_bits is not None and job.trained.is_full:
        raise ConfigError("a quantised base can't be trained in full")
    d, here = job.decoder, replace(job, sharded_over=shard)
    one = estimate(here, machine, runtime_bytes=0)
    memory = one.peak_bytes
    if base_bits is not None:
        memory -= _saved_bytes(here, base_bits)
    if job.trained.is_full:
        memory -= int(3 * one.gradient_bytes * (1 - 1 / shard))
    layers = d.linear_params * (d.itemsize if base_bits is None else base_bits / 8)
    passes = [p for step in job.passes for p in step]
    share = 1 / len(job.passes)
    reduced = 2 * one.gradient_bytes * (devices - 1) / devices / network.rate(devices)
    received = 2 * layers * (shard - 1) / shard / network.rate(shard)
    collectives = COLLECTIVES_PER_LAYER * d.layers * network.wait(shard)
    return Spread(
        devices=devices,
        shard=shard,
        memory_bytes=memory,
        fits=MARGIN * memory <= machine.memory_bytes,
        compute_s=sum(work_of(d, job.trained, p, job.computing).seconds(machine) for p in passes) * share,
        gather_s=(received + collectives) * len(passes) * share,
        reduce_s=reduced + network.wait(devices),
        tokens=int(sum(p.slots for p in passes) * share),
    )


def smallest_shard(
    job: Job, machine: Machine, network: Network, *, devices: int, base_bits: float | None = None
) -> Spread:
    """`spread` with the fewest devices per copy that fit (1, 2, 4, …), or all of them where none do."""
    shards = [2**k for k in range(devices.bit_length()) if devices % 2**k == 0]
    tried = [
        spread(job, machine, network, devices=devices, shard=s, base_bits=base_bits)
        for s in (*shards, devices)
    ]
    return next((found for found in tried if found.fits), tried[-1])


def llama_like(
    *,
    width: int,
    mlp_width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    is_tied: bool = False,
    itemsize: int = 2,
) -> Decoder:
    """A decoder of the Llama family from its published sizes, without a file of it."""
    head_dim = width // heads
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_heads * head_dim, width),
        "self_attn.v_proj": (kv_heads * head_dim, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp_width, width),
        "mlp.up_proj": (mlp_width, width),
        "mlp.down_proj": (width, mlp_width),
    }
    linears = {f"model.layers.{n}.{path}": shape for n in range(layers) for path, shape in shapes.items()}
    table = vocabulary * width
    blocks = sum(a * b for a, b in linears.values()) + 2 * layers * width
    return Decoder(
        params=blocks + width + table * (1 if is_tied else 2),
        itemsize=itemsize,
        linears=linears,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        vocabulary=vocabulary,
        untied_embeddings=0 if is_tied else table,
        layer_params=blocks,
        largest_layer_params=blocks // layers,
    )


def everywhere(decoder: Decoder, rank: int) -> Trained:
    """LoRA of one rank on every linear layer."""
    return Trained(dict.fromkeys(decoder.linears, rank))


def _saved_bytes(job: Job, base_bits: float) -> int:
    """What packed weights spare one device: of its part and of the gathered layers, less one matrix unpacked."""
    d, n = job.decoder, job.sharded_over
    held = d.linear_params / n + (GATHERED_LAYERS * d.linear_params / d.layers if n > 1 else 0)
    largest = max(rows * columns for rows, columns in d.linears.values())
    return int(held * (d.itemsize - base_bits / 8)) - largest * d.itemsize
