"""What LoRA was compared with: each a `Method` that the one training loop trains, exact to its paper.

| method | trains | paper |
|---|---|---|
| `full` | every weight | – |
| `top-k` | the last k decoder layers and the final norm | Li & Liang 2021 (FT-Top2) |
| `bitfit` | biases | Ben Zaken et al. 2021 |
| `houlsby` | two bottleneck layers a decoder layer, and the norms | Houlsby et al. 2019 |
| `lin` | one bottleneck layer with a norm of its own, after each decoder layer | Lin et al. 2020 |
| `prefix` | keys and values of virtual tokens, in every layer | Li & Liang 2021 |
| `prompt` | input embeddings of virtual tokens | Lester et al. 2021 |
| `intrinsic` | d numbers, which a fixed random projection spreads over every weight | Aghajanyan et al. 2020 |

May import: inject, lora, formats, bases, errors.
"""

from lorasmith.baselines.files import METHOD_FILES, Tuned, is_method, read_method, write_method
from lorasmith.baselines.method import METHODS, Method, Report, applied, apply_method, make_method
from lorasmith.baselines.options import MethodOptions, option_faults

__all__ = [
    "METHODS",
    "METHOD_FILES",
    "Method",
    "MethodOptions",
    "Report",
    "Tuned",
    "applied",
    "apply_method",
    "is_method",
    "make_method",
    "option_faults",
    "read_method",
    "write_method",
]
