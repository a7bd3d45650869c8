"""Many adapters on one frozen base in one process: every combination of a grid, each as if trained alone.

May import: train, inject, lora, formats, data, bases, drawing, errors.
"""

from lorasmith.sweep.grid import Point, parse_grid, points
from lorasmith.sweep.halving import Halving
from lorasmith.sweep.result import SweepResult
from lorasmith.sweep.sweep import sweep

__all__ = ["Halving", "Point", "SweepResult", "parse_grid", "points", "sweep"]
