"""Choose targets in an `nn.Module`; put LoRA on, read it back, take it off; merge, unmerge, switch.

`inject` changes the class of each target in place (`Linear` becomes a `Linear` that also holds
`lora_A` and `lora_B`), so paths, weights, hooks and tied tensors of the base stay what they were.

May import: lora, errors.
"""

from lorasmith.inject.attach import check_fit, eject, extract, inject, lora_layers
from lorasmith.inject.folding import base_matrices
from lorasmith.inject.groups import group_shared_inputs, ungroup
from lorasmith.inject.layer import LoRALayer
from lorasmith.inject.merging import Keep, is_merged, merge, merged, switch, unmerge
from lorasmith.inject.report import InjectReport
from lorasmith.inject.targets import resolve_targets

__all__ = [
    "InjectReport",
    "Keep",
    "LoRALayer",
    "base_matrices",
    "check_fit",
    "eject",
    "extract",
    "group_shared_inputs",
    "inject",
    "is_merged",
    "lora_layers",
    "merge",
    "merged",
    "resolve_targets",
    "switch",
    "ungroup",
    "unmerge",
]
