"""One loop: one adapter on one base, or every weight; packed, accumulated, resumable to the bit.

May import: baselines, inject, lora, formats, data, bases, analysis, planning, native, quantised, drawing, errors.
"""

from lorasmith.train.batch import Batch, Layout, choose_layout, collate
from lorasmith.train.checkpoint import Progress
from lorasmith.train.config import TrainConfig, default_lr
from lorasmith.train.evaluate import EvalLoss, evaluate_loss
from lorasmith.train.forward import Forward
from lorasmith.train.loop import Run, train
from lorasmith.train.loss import Head, cross_entropy
from lorasmith.train.outputs import (
    Metrics,
    commit,
    make_writable,
    plot_loss,
    read_metrics,
    versions,
    write_atomically,
)
from lorasmith.train.parts import Parts, split_model
from lorasmith.train.policy import computing, limit_kept_kernels
from lorasmith.train.preflight import RECOMPUTES, computing_of, passes_of
from lorasmith.train.probing import Bench, measure_dimension, nats_of_completions, range_test, run_in
from lorasmith.train.result import TrainResult
from lorasmith.train.sets import Sets
from lorasmith.train.show import Show, peak_rss_bytes
from lorasmith.train.signals import Signals
from lorasmith.train.world import ALONE, World, is_first_to_say, partners, wait_for, world

__all__ = [
    "ALONE",
    "RECOMPUTES",
    "Batch",
    "Bench",
    "EvalLoss",
    "Forward",
    "Head",
    "Layout",
    "Metrics",
    "Parts",
    "Progress",
    "Run",
    "Sets",
    "Show",
    "Signals",
    "TrainConfig",
    "TrainResult",
    "World",
    "choose_layout",
    "collate",
    "commit",
    "computing",
    "computing_of",
    "cross_entropy",
    "default_lr",
    "evaluate_loss",
    "is_first_to_say",
    "limit_kept_kernels",
    "make_writable",
    "measure_dimension",
    "nats_of_completions",
    "partners",
    "passes_of",
    "peak_rss_bytes",
    "plot_loss",
    "range_test",
    "read_metrics",
    "run_in",
    "split_model",
    "train",
    "versions",
    "wait_for",
    "world",
    "write_atomically",
]
