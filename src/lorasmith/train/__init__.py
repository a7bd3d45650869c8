"""One loop: one adapter on one base, or every weight; packed, accumulated, resumable to the bit.

May import: inject, lora, formats, data, bases, planning, native, errors.
"""

from lorasmith.train.batch import Layout, choose_layout
from lorasmith.train.config import TrainConfig, default_lr
from lorasmith.train.evaluate import EvalLoss, evaluate_loss
from lorasmith.train.forward import Forward
from lorasmith.train.loop import train
from lorasmith.train.loss import Head, cross_entropy
from lorasmith.train.outputs import commit, plot_loss, read_metrics, versions, write_atomically
from lorasmith.train.parts import Parts, split_model
from lorasmith.train.preflight import RECOMPUTES, computing_of, passes_of
from lorasmith.train.result import TrainResult
from lorasmith.train.show import Show, peak_rss_bytes

__all__ = [
    "RECOMPUTES",
    "EvalLoss",
    "Forward",
    "Head",
    "Layout",
    "Parts",
    "Show",
    "TrainConfig",
    "TrainResult",
    "choose_layout",
    "commit",
    "computing_of",
    "cross_entropy",
    "default_lr",
    "evaluate_loss",
    "passes_of",
    "peak_rss_bytes",
    "plot_loss",
    "read_metrics",
    "split_model",
    "train",
    "versions",
    "write_atomically",
]
