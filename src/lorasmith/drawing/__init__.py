"""The look that all plots share, and how they become files: whole or not at all.

May import: errors.
"""

from lorasmith.drawing.panels import BLUE, COLOURS, GREY, INK, ORANGE, SOFT, TEAL, label, panels

__all__ = ["BLUE", "COLOURS", "GREY", "INK", "ORANGE", "SOFT", "TEAL", "label", "panels"]
