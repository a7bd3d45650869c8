"""The encoded data of a run, and what was left out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorasmith.bases import Base
from lorasmith.data import Encoded, RecordSet, encode, read_records, refuse_systematic
from lorasmith.train.config import TrainConfig


@dataclass(frozen=True)
class Sets:
    """`problems`: one line for each record that was left out or looks odd."""

    train: Encoded
    evaluation: Encoded | None
    problems: list[str]

    @classmethod
    def read(cls, base: Base, data: Any, eval_data: Any, settings: TrainConfig) -> Sets:
        """Read and encode what is trained on and, where there is any, what is held out.

        Raises:
            DataError: nothing can be used, or most of the training records have one and the same fault.
        """
        problems: list[str] = []

        def load(source: Any, *, is_trained_on: bool = False) -> Encoded:
            records = source if isinstance(source, RecordSet) else read_records(source)
            encoded = encode(records, base.tokenizer, max_length=settings.max_length)
            if is_trained_on:
                refuse_systematic(records, encoded, base.tokenizer)
            problems.extend(f"line {p.line}: {p.message}" for p in (*records.problems, *encoded.problems))
            return encoded

        return cls(
            load(data, is_trained_on=True), load(eval_data) if eval_data is not None else None, problems
        )
