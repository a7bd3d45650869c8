"""Bytes and FLOPs predicted before they are spent.

`activations.py` is the one place with the memory formulas; `estimate` adds them up at the worst moment.

May import: lora, quantised, errors.
"""

from lorasmith.planning.activations import (
    Computing,
    Pass,
    Recompute,
    Trained,
    backward_bytes,
    logit_bytes,
    logit_chunk,
    saved_by_layer,
    saved_bytes,
)
from lorasmith.planning.cluster import Network, Spread, everywhere, llama_like, smallest_shard, spread
from lorasmith.planning.decoder import Decoder, decoder_of
from lorasmith.planning.estimate import Estimate, Job, estimate, gib, has_many_shapes, require_fit
from lorasmith.planning.fit import Fit, fit
from lorasmith.planning.machine import (
    DEVICES,
    Machine,
    cgroup_limits,
    known_device,
    resident_bytes,
    this_machine,
    trim_heap,
    usable_memory,
)
from lorasmith.planning.memory import Memory, Shapes, full_memory, hundred_tasks_bytes, lora_memory
from lorasmith.planning.work import Work, work_of

__all__ = [
    "DEVICES",
    "Computing",
    "Decoder",
    "Estimate",
    "Fit",
    "Job",
    "Machine",
    "Memory",
    "Network",
    "Pass",
    "Recompute",
    "Shapes",
    "Spread",
    "Trained",
    "Work",
    "backward_bytes",
    "cgroup_limits",
    "decoder_of",
    "estimate",
    "everywhere",
    "fit",
    "full_memory",
    "gib",
    "has_many_shapes",
    "hundred_tasks_bytes",
    "known_device",
    "llama_like",
    "logit_bytes",
    "logit_chunk",
    "lora_memory",
    "require_fit",
    "resident_bytes",
    "saved_by_layer",
    "saved_bytes",
    "smallest_shard",
    "spread",
    "this_machine",
    "trim_heap",
    "usable_memory",
    "work_of",
]
