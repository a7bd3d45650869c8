"""`lorasmith serve` as a process of its own; and any application on a socket of this process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import uvicorn

from lorasmith.server.guard import App
from tests.support.server import BASE_ID


class Served:
    """A running server: its address, its log, its process."""

    def __init__(self, place, *options: object) -> None:
        command = [
            sys.executable,
            "-c",
            "from lorasmith.cli import main; main()",
            "serve",
            "--base",
            place / BASE_ID,
        ]
        command += ["--store", place / "store", "--port", 0, "--dtype", "fp32", "--max-rows", 4, *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            list(map(str, command)),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self.url = self._wait_for_address()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _wait_for_address(self) -> str:
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving on (\S+)/v1", line):
                return found[1]
        raise AssertionError("the server did not start:\n" + "".join(self.lines))

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def stop(self, sent: int = signal.SIGTERM, *, timeout_s: float = 30.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sent)
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        self.process.stdout.close()
        self.process.stderr.close()
        return code


@contextmanager
def in_thread(app: App) -> Iterator[str]:
    """An application on a real socket, in a thread of this process; yields its address."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
