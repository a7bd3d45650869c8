"""The registry's tables, and one connection to them.

Every change is one transaction that also writes the audit log; nothing is ordered by a clock.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasmith.errors import OutputError

BUSY_TIMEOUT_S = 30.0
SCHEMA_VERSION = 1
SCHEMA = (
    """CREATE TABLE versions (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, base TEXT,
        added_at REAL NOT NULL, is_removed INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (name, version))""",
    "CREATE INDEX versions_by_digest ON versions (digest) WHERE NOT is_removed",
    """CREATE TABLE aliases (
        alias TEXT PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL,
        canary_version INTEGER, canary_share REAL NOT NULL DEFAULT 0,
        FOREIGN KEY (name, version) REFERENCES versions (name, version),
        FOREIGN KEY (name, canary_version) REFERENCES versions (name, version))""",
    """CREATE TABLE past_targets (
        number INTEGER PRIMARY KEY AUTOINCREMENT, alias TEXT NOT NULL,
        name TEXT NOT NULL, version INTEGER NOT NULL)""",
    """CREATE TABLE audit (
        number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
        name TEXT NOT NULL, version INTEGER, digest TEXT, detail TEXT NOT NULL)""",
    "CREATE TRIGGER audit_keeps BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    "CREATE TRIGGER audit_stays BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


class Database:
    """Thread-safe: one connection behind a lock."""

    def __init__(self, path: Path, actor: str) -> None:
        self.path = path
        self.actor = actor
        self._lock = threading.RLock()
        with self._explained():
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            try:
                self._set_up()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of one query."""
        with self._lock, self._explained():
            return self._connection.execute(sql, parameters).fetchall()

    @contextmanager
    def write(self) -> Iterator[Database]:
        """One transaction: all of it is there afterwards, on the disk, or nothing.

        Raises:
            OutputError: the disk is full or broken; then nothing changed.
        """
        with self._lock, self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def log(
        self, action: str, name: str, version: int | None = None, digest: str | None = None, detail: str = ""
    ) -> None:
        """Add an audit entry to the transaction at hand."""
        values = (time.time(), self.actor, action, name, version, digest, detail)
        self.read(
            "INSERT INTO audit (at, actor, action, name, version, digest, detail) VALUES (?,?,?,?,?,?,?)",
            values,
        )

    def _set_up(self) -> None:
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._switch_to_wal()
        # FULL: a transaction that was acknowledged outlives a power cut, not only a crash.
        self._connection.execute("PRAGMA synchronous = FULL")
        with self.write():
            found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                for statement in SCHEMA:
                    self._connection.execute(statement)
            elif found != SCHEMA_VERSION:
                raise OutputError(
                    f"{self.path} has format {found}, this lorasmith reads {SCHEMA_VERSION}. Update lorasmith."
                )

    def _switch_to_wal(self) -> None:
        """SQLite answers "locked" at once, whatever the timeout, while another process switches too."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise OutputError(f"{self.path} cannot be used: {error}. Nothing was changed.") from error
