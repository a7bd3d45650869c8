"""Logical form of WikiSQL's statements: SELECT [AGG(]"column"[)] FROM t [WHERE "column" op 'value' AND …]."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

IDENTIFIER = r'"(?:[^"]|"")*"|[\w.%/#]+'
LITERAL = r"'(?:[^']|'')*'|[-+]?[\w.,%]+"
STATEMENT = re.compile(
    rf"\s*SELECT\s+(?:(COUNT|MAX|MIN|SUM|AVG)\s*\(\s*)?({IDENTIFIER})(?:\s*(\)))?\s+FROM\s+(?:\"t\"|t)"
    r"(?:\s+WHERE\s+(.+?))?\s*;?\s*",
    re.IGNORECASE | re.DOTALL,
)
CONDITION = re.compile(rf"\s*({IDENTIFIER})\s*(<=|>=|!=|<>|=|<|>)\s*({LITERAL})\s*", re.DOTALL)


@dataclass(frozen=True)
class LogicalForm:
    """Aggregate ("" for none), selected column, and the conditions, in any order but as often as they stand."""

    aggregate: str
    column: str
    conditions: frozenset[tuple[tuple[str, str, str], int]]


def logical_form(statement: str) -> LogicalForm | None:
    """The statement's parts, names and values without case; None for a statement of another shape."""
    match = STATEMENT.fullmatch(statement)
    if match is None or bool(match[1]) != bool(match[3]):
        return None
    conditions: Counter[tuple[str, str, str]] = Counter()
    rest = match[4]
    while rest:
        found = CONDITION.match(rest)
        if found is None:
            return None
        conditions[_bare(found[1]), found[2].replace("<>", "!="), _bare(found[3])] += 1
        rest = rest[found.end() :]
        if rest:
            joined = re.match(r"AND\s+", rest, re.IGNORECASE)
            if joined is None or joined.end() == len(rest):
                return None
            rest = rest[joined.end() :]
    return LogicalForm((match[1] or "").lower(), _bare(match[2]), frozenset(conditions.items()))


def logical_form_accuracy(outputs: Sequence[str], statements: Sequence[str]) -> float:
    """Share, in 0…1, of outputs with the same logical form as the statement expected."""
    hits = [is_same_form(o, s) for o, s in zip(outputs, statements, strict=True)]
    return sum(hits) / max(1, len(hits))


def is_same_form(output: str, statement: str) -> bool:
    """Whether both have a logical form, and the same."""
    form = logical_form(output)
    return form is not None and form == logical_form(statement)


def valid_sql_rate(outputs: Sequence[str], columns: Sequence[Sequence[str]]) -> float:
    """Share, in 0…1, of outputs that SQLite prepares for an empty table `t` with the columns of its question."""
    hits = [is_valid_sql(o, c) for o, c in zip(outputs, columns, strict=True)]
    return sum(hits) / max(1, len(hits))


def is_valid_sql(output: str, columns: Sequence[str]) -> bool:
    """Whether SQLite accepts it as one question to such a table; nothing is executed but the question.

    A name in double quotes must be a column: SQLite would otherwise take it for a text.
    """
    names = {name.lower() for name in columns}
    quoted = re.findall(r'"((?:[^"]|"")*)"', re.sub(r"'(?:[^']|'')*'", "", output))
    if any(name.lower() not in names | {"t"} for name in quoted):
        return False
    connection = sqlite3.connect(":memory:")
    try:
        listed = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
        connection.execute(f"CREATE TABLE t ({listed})")
        connection.execute(f"EXPLAIN {output}")
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return False
    finally:
        connection.close()
    return output.lstrip().upper().startswith("SELECT")


def _bare(token: str) -> str:
    """Without quotes, case and doubled space."""
    token = token.strip()
    for quote in "'\"":
        if len(token) >= 2 and token[0] == token[-1] == quote:
            token = token[1:-1].replace(quote * 2, quote)
            break
    return " ".join(token.lower().split())
