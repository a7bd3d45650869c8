"""Choose targets in an `nn.Module`; put LoRA on, read it back, take it off; merge, unmerge, switch.

`inject` changes the class of each target in place (`Linear` becomes a `Linear` that also holds
`lora_A` and `lora_B`), so paths, weights, hooks and tied tensors of the base stay what they were.

May import: lora, quantised, errors.
"""

from lorasmith.inject.attach import carries_any, check_fit, eject, extract, inject, lora_layers
from lorasmith.inject.autograd import Segmented, Spec, linear_gradients, linear_outputs
from lorasmith.inject.bank import Bank, Tenant, can_join
from lorasmith.inject.folding import base_matrices
from lorasmith.inject.groups import group_shared_inputs, ungroup
from lorasmith.inject.layer import LoRALayer, is_plain_linear, linear_parts
from lorasmith.inject.merging import is_merged, merge, merged, switch, unmerge
from lorasmith.inject.pristine import Keep
from lorasmith.inject.report import InjectReport
from lorasmith.inject.targets import resolve_targets

__all__ = [
    "Bank",
    "InjectReport",
    "Keep",
    "LoRALayer",
    "Segmented",
    "Spec",
    "Tenant",
    "base_matrices",
    "can_join",
    "carries_any",
    "check_fit",
    "eject",
    "extract",
    "group_shared_inputs",
    "inject",
    "is_merged",
    "is_plain_linear",
    "linear_gradients",
    "linear_outputs",
    "linear_parts",
    "lora_layers",
    "merge",
    "merged",
    "resolve_targets",
    "switch",
    "ungroup",
    "unmerge",
]
