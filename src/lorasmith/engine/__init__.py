"""Batched generation on one frozen base; each row of a batch may use a different adapter.

May import: inject, lora, formats, bases, native, errors
"""

from lorasmith.engine.engine import Engine
from lorasmith.engine.prompts import encode_prompt
from lorasmith.engine.requests import FinishReason, OnToken, Prompt, Request, Result, TokenEvent
from lorasmith.engine.rows import Handle

__all__ = [
    "Engine",
    "FinishReason",
    "Handle",
    "OnToken",
    "Prompt",
    "Request",
    "Result",
    "TokenEvent",
    "encode_prompt",
]
