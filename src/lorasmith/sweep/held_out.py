"""Records to rank runs by, where none were given."""

from __future__ import annotations

import hashlib
import json

from lorasmith.data import Record, RecordSet
from lorasmith.errors import DataError

SHARE, MOST = 0.1, 256


def hold_out(records: RecordSet) -> tuple[RecordSet, RecordSet]:
    """Split into what is trained on and a tenth (at most 256 records) that is not.

    Records of one prompt stay together, so no question is on both sides. Which ones are held out depends
    on their text alone.

    Raises:
        DataError: there are not two different prompts.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(hashlib.sha256(_question(record).encode()).hexdigest(), []).append(record)
    if len(groups) < 2:
        raise DataError(
            f"{records.source}: nothing can be held out to rank the runs by, since all {len(records)} records "
            "share one prompt. Name held-out records with --eval-data."
        )
    wanted = max(1, min(MOST, round(SHARE * len(records))))
    held: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(held) >= wanted or len(held) + len(group) >= len(records):
            break
        held |= {id(record) for record in group}
    if not held:  # the first prompt alone has nearly all records
        held = {id(record) for record in min(groups.values(), key=len)}
    return (
        RecordSet([r for r in records if id(r) not in held], records.problems, records.source),
        RecordSet([r for r in records if id(r) in held], [], f"{records.source}, held out"),
    )


def _question(record: Record) -> str:
    if record.kind == "messages":
        return json.dumps(next((m["content"] for m in record.messages if m["role"] == "user"), ""))
    return record.prompt if record.kind == "completion" else record.text
