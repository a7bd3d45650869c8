"""Records become checked, masked token examples, and examples become optimizer steps.

May import: errors
"""

from __future__ import annotations

from lorasmith.data.batches import Steps, fingerprint, steps
from lorasmith.data.doctor import Report, View, check, refuse_systematic
from lorasmith.data.encode import Encoded, Example, Stats, encode
from lorasmith.data.packing import Row, pack, shared_length
from lorasmith.data.records import Message, Problem, Record, RecordSet, read_records, references
from lorasmith.data.sample import sample_path
from lorasmith.data.template import Tokenizer, render_prompt

__all__ = [
    "Encoded",
    "Example",
    "Message",
    "Problem",
    "Record",
    "RecordSet",
    "Report",
    "Row",
    "Stats",
    "Steps",
    "Tokenizer",
    "View",
    "check",
    "encode",
    "fingerprint",
    "pack",
    "read_records",
    "references",
    "refuse_systematic",
    "render_prompt",
    "sample_path",
    "shared_length",
    "steps",
]
