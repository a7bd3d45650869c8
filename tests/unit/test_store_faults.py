"""The registry when processes are killed and disks fill: nothing acknowledged is lost, nothing is half there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lorasmith.errors import ConfigError, LoraSmithError, OutputError
from lorasmith.formats import read_adapter
from lorasmith.store import Store
from lorasmith.store.names import is_digest
from tests.support.adapters import write_small

# Children live for milliseconds and only use the store.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
CALLS = ("open", "write", "fsync", "rename", "chmod", "close", "mkdir")


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory where there is one: a killed process loses nothing there, and fsync costs nothing."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return [write_small(folder, seed) for seed in range(6)]


def assert_sound(root: Path, acknowledged: dict[str, str]) -> None:
    """Every invariant of a store, and every `name@version` → digest that was acknowledged."""
    for entry in (root / "objects").iterdir():
        assert is_digest(entry.name)
        assert read_adapter(entry).digest == entry.name, "a half object is visible"
    store = Store(root, create=False)
    with closing(sqlite3.connect(root / "registry.sqlite")) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        added = raw.execute("SELECT name, version, digest FROM audit WHERE action = 'add'").fetchall()
        rows = raw.execute("SELECT name, version, digest FROM versions").fetchall()
        assert sorted(added) == sorted(rows), "the audit log and the registry disagree"
    assert acknowledged.items() <= {f"{name}@{version}": digest for name, version, digest in rows}.items()
    live = {v.model: v.digest for v in store.versions()}
    assert all(live[f"{a.name}@{a.version}"] == a.digest for a in store.aliases())
    store.collect()
    assert {entry.name for entry in (root / "objects").iterdir()} == set(live.values())
    assert not list((root / "staging").iterdir())
    for digest in set(live.values()):
        assert store.read(digest).digest == digest
    store.close()


def busy(root: Path, sources: list[Path], acknowledge: Callable[[str], None], seed: int) -> None:
    """Change a store for ever, and say each version when it is in."""
    store, rng = Store(root), random.Random(seed)
    while True:
        name = rng.choice("abc")
        with suppress(ConfigError, LookupError):
            version = store.add(name, rng.choice(sources), promote=rng.random() < 0.7)
            acknowledge(f"{version.model} {version.digest}\n")
            store.set_alias("prod", rng.choice(store.versions()).model)
            store.rollback(name)
            store.remove(rng.choice(store.versions()).model, drop_aliases=True)


def kill_while_busy(root: Path, sources: list[Path], seed: int) -> dict[str, str]:
    """Kill a process in the middle of its work; return what it had acknowledged."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            busy(root, sources, lambda line: os.write(writing, line.encode()), seed)
        finally:
            os._exit(3)
    os.close(writing)
    time.sleep(random.Random(seed).uniform(0.002, 0.08))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the worker stopped by itself"
    with os.fdopen(reading) as pipe:
        lines = [line.split() for line in pipe if line.endswith("\n")]
    return dict(lines)


def kill_again_and_again(root: Path, sources: list[Path], times: int) -> None:
    Store(root).close()
    acknowledged: dict[str, str] = {}
    for seed in range(times):
        acknowledged |= kill_while_busy(root, sources, seed)
        if seed % 5 == 4:
            assert_sound(root, acknowledged)
    assert_sound(root, acknowledged)
    assert len(acknowledged) > times / 4, "too little happened between the kills to prove anything"


def test_kill_at_random_instants(memory_path, sources):
    kill_again_and_again(memory_path / "store", sources, 30)


@pytest.mark.slow
def test_kill_at_random_instants_two_hundred_times(memory_path, sources):
    kill_again_and_again(memory_path / "store", sources, 200)


class Countdown:
    """Calls `action` at the n-th system call that matters; SQLite's statements count too."""

    def __init__(self, at: int, action: Callable[[], None], calls: tuple[str, ...]) -> None:
        self.at, self.action, self.calls, self.seen = at, action, calls, 0

    def hit(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.action()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in self.calls:
            original = getattr(os, name)
            monkeypatch.setattr(os, name, self._wrapped(original))

    def _wrapped(self, original: Callable) -> Callable:
        def call(*args, **kwargs):
            self.hit()
            return original(*args, **kwargs)

        return call


def change(root: Path, sources: list[Path], trace: Callable[[], None] | None = None) -> None:
    store = Store(root)
    if trace is not None:
        store._db._connection.set_trace_callback(lambda _: trace())
    store.add("a", sources[1])
    store.remove("a@1")
    store.close()


def test_kill_at_every_step_of_adding_and_removing(memory_path, sources):
    prepared = memory_path / "prepared"
    first = Store(prepared)
    digest = first.add("a", sources[0]).digest
    first.close()
    step = 0
    while True:
        step += 1
        root = memory_path / "store"
        shutil.copytree(prepared, root)
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                countdown = Countdown(step, lambda: os.kill(os.getpid(), signal.SIGKILL), CALLS)
                countdown.patch(pytest.MonkeyPatch())
                change(root, sources, countdown.hit)
                os._exit(0)
            finally:
                os._exit(4)
        _, status = os.waitpid(child, 0)
        assert_sound(root, {"a@1": digest})
        store = Store(root)
        was_removed = [v.version for v in store.versions()] == [2]
        if not was_removed:
            change(root, sources)
        assert [v.model for v in store.versions()] == ["a@2"], "the work can be done again"
        store.close()
        shutil.rmtree(root)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert step > 40, "the steps were not counted"


def error_of(call: Callable[[], object]) -> OutputError | None:
    try:
        call()
    except OutputError as error:
        return error
    return None


def raise_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_every_call(memory_path, sources):
    """A fake: the n-th call that needs space fails, for every n."""
    for step in range(1, 200):
        root = memory_path / f"store-{step}"
        store = Store(root)
        digest = store.add("a", sources[0]).digest
        countdown = Countdown(step, raise_full, ("write", "fsync", "rename", "mkdir"))
        with pytest.MonkeyPatch.context() as patch:
            countdown.patch(patch)
            error = error_of(lambda: store.add("a", sources[1]))  # noqa: B023
        failed = error is not None
        assert not failed or "the disk is full. Nothing was changed" in str(error)
        assert len(store.versions()) == (1 if failed else 2)
        assert store.add("a", sources[1]).version == 2, "the store works again when there is space"
        store.close()
        assert_sound(root, {"a@1": digest})
        if not failed:
            break
    assert step > 8


def test_a_file_system_that_is_really_full(tmp_path, sources):
    """A tmpfs of every size from too small for a registry up to large enough."""
    place = tmp_path / "tiny"
    place.mkdir()
    acknowledged_at = []
    for kilobytes in range(64, 400, 16):
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("mounting needs root")
        try:
            acknowledged: dict[str, str] = {}
            failures = 0
            with suppress(OutputError):  # too small for a registry at all
                store = Store(place / "store")
                for source in sources:
                    try:
                        version = store.add("a", source)
                        acknowledged[version.model] = version.digest
                    except OutputError:
                        failures += 1
                store.close()
                subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True)
                assert_sound(place / "store", acknowledged)
                acknowledged_at.append(len(acknowledged))
                assert failures + len(acknowledged) == len(sources)
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert len(acknowledged_at) > 0
    assert acknowledged_at[-1] == len(sources), "the largest was too small to hold everything"
    assert min(acknowledged_at) < len(sources), "no size was too small"


def test_a_refused_add_names_the_reason_not_the_private_copy(tmp_path, sources):
    broken = tmp_path / "broken"
    shutil.copytree(sources[0], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    store = Store(tmp_path / "store")
    with pytest.raises(LoraSmithError) as told:
        store.add("a", broken)
    assert str(broken) in str(told.value)
    assert "staging" not in str(told.value)
