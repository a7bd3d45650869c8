"""The registry: what a name means, after every kind of change, in one process and in two."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import time

import pytest
import torch

from lorasmith.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    OutputError,
    UnknownAdapterError,
)
from lorasmith.formats import read_adapter, write_adapter
from lorasmith.store import BaseFacts, Store
from tests.support.adapters import SHAPES, small_adapter, write_small

# Children live for milliseconds and only use the store.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture
def sources(tmp_path):
    return [write_small(tmp_path / "sources", seed) for seed in range(4)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_an_adapter_is_found_by_alias_version_and_digest_and_reads_back_bit_for_bit(store, sources):
    first = store.add("support", sources[0])
    second = store.add("support", sources[1])
    assert (first.version, second.version) == (1, 2)
    assert first.digest == read_adapter(sources[0]).digest
    assert store.resolve("support").digest == second.digest
    assert store.resolve("support@1").digest == first.digest
    assert store.resolve(first.digest).model == "support@1"
    assert second.aliases == ("support",)
    assert store.versions("support")[0].aliases == ()
    assert store.read(first.digest).digest == first.digest
    for name in ("adapter_model.safetensors", "adapter_config.json", "lorasmith.json"):
        assert (store.path(first.digest) / name).read_bytes() == (sources[0] / name).read_bytes()


def test_everything_is_there_after_reopening(store, sources, tmp_path):
    store.add("a", sources[0])
    store.add("a", sources[1], promote=False)
    store.set_alias("prod", "a@2")
    store.set_canary("a", 2, 0.25)
    store.close()
    again = Store(tmp_path / "store", create=False)
    assert [(x.alias, x.name, x.version) for x in again.aliases()] == [("a", "a", 1), ("prod", "a", 2)]
    assert again.alias("a").canary.share == 0.25
    assert [v.version for v in again.versions()] == [1, 2]


def test_adding_the_same_content_again_makes_no_second_version(store, sources, tmp_path):
    first = store.add("a", sources[0])
    assert store.add("a", sources[0]).version == first.version
    assert store.add("b", sources[0]).digest == first.digest
    assert len(list((tmp_path / "store" / "objects").iterdir())) == 1
    assert {v.model for v in store.by_digest(first.digest)} == {"a@1", "b@1"}


def test_rollback_goes_back_step_by_step_and_ends_a_canary(store, sources):
    for source in sources[:3]:
        store.add("a", source)
    store.set_canary("a", 1, 0.5)
    assert store.rollback("a").version == 2
    assert store.alias("a").canary is None
    assert store.rollback("a").version == 1
    with pytest.raises(ConfigError, match="never pointed to another version"):
        store.rollback("a")


def test_rollback_skips_a_version_that_was_removed(store, sources):
    for source in sources[:3]:
        store.add("a", source)
    store.remove("a@2")
    assert store.rollback("a").version == 1


def test_a_canary_gets_its_share_and_the_same_key_always_the_same_version(store, sources):
    store.add("a", sources[0])
    store.add("a", sources[1], promote=False)
    store.set_canary("a", 2, 0.3)
    got = [store.resolve("a", key=f"user {i}").version for i in range(2000)]
    assert got == [store.resolve("a", key=f"user {i}").version for i in range(2000)]
    share = got.count(2) / len(got)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert store.resolve("a@1", key="user 0").version == 1
    store.set_canary("a", 2, 1.0)
    assert {store.resolve("a", key=f"user {i}").version for i in range(50)} == {2}
    store.set_canary("a", 2, 0)
    assert {store.resolve("a", key=f"user {i}").version for i in range(50)} == {1}


def test_version_numbers_are_never_given_again(store, sources):
    store.add("a", sources[0])
    store.add("a", sources[1])
    store.remove("a", drop_aliases=True)
    with pytest.raises(UnknownAdapterError, match="no adapter"):
        store.resolve("a")
    assert store.add("a", sources[2]).version == 3


def test_what_an_alias_points_to_is_not_removed_by_accident(store, sources):
    store.add("a", sources[0])
    store.add("a", sources[1])
    store.set_alias("prod", "a@1")
    with pytest.raises(ConfigError, match="what prod points to"):
        store.remove("a@1")
    with pytest.raises(ConfigError, match="what prod points to"):
        store.remove("a")
    with pytest.raises(ConfigError, match="what a points to"):
        store.remove("a@2")
    assert len(store.versions()) == 2
    store.remove("a", drop_aliases=True)
    assert store.versions() == store.aliases() == []


def test_a_removed_adapter_stays_until_the_lease_of_another_process_ends(store, sources, tmp_path):
    digest = store.add("a", sources[0]).digest
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        other = Store(tmp_path / "store")
        lease = other.lease(digest)
        os.write(to_parent, b"h")
        os.read(from_parent, 1)
        os.kill(os.getpid(), 9)  # a holder that dies holds nothing
        lease.release()
    assert os.read(from_child, 1) == b"h"
    store.remove("a")
    with pytest.raises(UnknownAdapterError):
        store.resolve(digest)
    assert read_adapter(store.path(digest)).digest == digest
    assert store.collect() == []
    os.write(to_child, b"x")
    os.waitpid(child, 0)
    assert store.collect() == [digest]
    assert not store.path(digest).exists()
    with pytest.raises(UnknownAdapterError, match="holds no adapter"):
        store.lease(digest)


def test_releasing_the_last_lease_frees_the_files(store, sources):
    digest = store.add("a", sources[0]).digest
    one, two = store.lease(digest), store.lease(digest)
    store.remove("a")
    one.release()
    assert store.path(digest).is_dir()
    two.release()
    two.release()
    assert not store.path(digest).exists()


def test_an_adapter_that_does_not_fit_is_refused_whole(store, tmp_path):
    facts = BaseFacts("tiny", SHAPES, lambda provenance: provenance.get("matches"))
    good = write_small(tmp_path, 1, matches=True)
    assert store.add("good", good, base=facts).version == 1
    with pytest.raises(BaseMismatchError, match="another base than tiny"):
        store.add("bad", write_small(tmp_path, 2, matches=False), base=facts)
    narrow = dataclasses.replace(facts, shapes=SHAPES | {"layers.0.q_proj.weight": (6, 5)})
    with pytest.raises(AdapterFileError, match="wrong-shape"):
        store.add("bad", write_small(tmp_path, 3), base=narrow)
    idle = small_adapter(4)
    for f in idle.factors.values():
        f.B.zero_()
    write_adapter(idle, tmp_path / "idle")
    with pytest.raises(AdapterFileError, match="no-effect"):
        store.add("bad", tmp_path / "idle")
    half = small_adapter(5)
    half.factors["layers.0.q_proj"].B.zero_()
    write_adapter(half, tmp_path / "half")
    with pytest.raises(AdapterFileError, match="zero-factors"):
        store.add("bad", tmp_path / "half")
    assert store.add("half", tmp_path / "half", allow=["zero-factors"]).version == 1
    assert {v.name for v in store.versions()} == {"good", "half"}
    assert len(list((tmp_path / "store" / "staging").iterdir())) == 0


@pytest.mark.parametrize(
    "name", ["", "../up", "a/b", "a..b", ".hidden", "x" * 129, "é", "a\0b", "a b", "f" * 64]
)
def test_names_that_could_be_paths_or_digests_are_refused(store, sources, name):
    with pytest.raises(ConfigError, match=r"cannot be used|reads like a digest"):
        store.add(name, sources[0])
    store.add("ok", sources[0])
    with pytest.raises(ConfigError):
        store.set_alias(name, "ok")


@pytest.mark.parametrize("model", ["a@", "a@0", "a@x", "a@1@2", "a@-1", "a@01"])
def test_a_version_that_is_no_number_is_refused(store, sources, model):
    store.add("a", sources[0])
    with pytest.raises(ConfigError, match="no version number"):
        store.resolve(model)


def test_an_adapters_own_name_and_an_alias_never_cross(store, sources):
    store.add("a", sources[0])
    store.add("b", sources[1])
    store.set_alias("prod", "a")
    with pytest.raises(ConfigError, match="alias of a@1"):
        store.add("prod", sources[2])
    with pytest.raises(ConfigError, match="name of an adapter"):
        store.set_alias("b", "a")
    assert store.resolve("prod@1").model == "a@1"


def test_a_pipe_in_place_of_a_file_does_not_hang(store, sources):
    (sources[0] / "lorasmith.json").unlink()
    os.mkfifo(sources[0] / "lorasmith.json")
    with pytest.raises(AdapterFileError, match="not a regular file"):
        store.add("a", sources[0])


def test_only_the_adapters_own_files_are_copied(store, sources):
    (sources[0] / "tokenizer.json").write_text("{}")
    (sources[0] / "run.py").write_text("print('code')")
    digest = store.add("a", sources[0]).digest
    assert {f.name for f in store.path(digest).iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorasmith.json",
    }  # fmt: skip


def test_damage_on_disk_is_noticed_and_adding_again_repairs_it(store, sources):
    digest = store.add("a", sources[0]).digest
    file = store.path(digest) / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(raw)
    with pytest.raises(AdapterFileError):
        store.read(digest)
    store.add("a", sources[0])
    assert store.read(digest).digest == digest


def test_order_and_rollback_do_not_depend_on_the_clock(store, sources, monkeypatch):
    now = [2e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for source, jump in zip(sources, (-1.5e9, 3e9, -2e9, 0), strict=True):
        store.add("a", source)
        now[0] += jump
    assert [v.version for v in store.versions("a")] == [1, 2, 3, 4]
    assert store.resolve("a").version == 4
    assert store.rollback("a").version == 3
    added = [entry.version for entry in store.audit() if entry.action == "add"]
    assert added == [4, 3, 2, 1]


def test_the_audit_log_names_every_change_and_only_grows(store, sources, tmp_path):
    store.add("a", sources[0])
    store.add("a", sources[1])
    store.set_canary("a", 1, 0.1)
    store.rollback("a")
    store.remove("a")
    actions = [entry.action for entry in reversed(store.audit())]
    assert actions == [
        "add",
        "alias",
        "add",
        "alias",
        "canary",
        "rollback",
        "drop-alias",
        "remove",
        "remove",
    ] + (["collect"] * 2)
    with (
        sqlite3.connect(tmp_path / "store" / "registry.sqlite") as raw,
        pytest.raises(sqlite3.IntegrityError, match="only grows"),
    ):
        raw.execute("DELETE FROM audit")


def test_two_processes_add_at_once_and_nothing_is_lost(store, sources, tmp_path):
    children = []
    for who in range(2):
        child = os.fork()
        if child == 0:  # pragma: no cover
            code = 1
            try:
                mine = Store(tmp_path / "store")
                for round in range(6):
                    mine.add("shared", sources[(round + who) % 4])
                    mine.add(f"own-{who}-{round}", sources[round % 4])
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    names = {v.name for v in store.versions()}
    assert names == {"shared", *(f"own-{w}-{r}" for w in range(2) for r in range(6))}
    assert sorted(v.version for v in store.versions("shared")) == [1, 2, 3, 4]
    assert len({v.digest for v in store.versions("shared")}) == 4


def test_a_store_that_is_not_there_and_one_that_is_no_database(tmp_path):
    with pytest.raises(ConfigError, match="is no store"):
        Store(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "registry.sqlite").write_text("this is no database at all" * 100)
    with pytest.raises(OutputError, match="not a database"):
        Store(tmp_path / "odd")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Store(tmp_path / "file")


def test_adapter_tensors_equal_the_source(store, sources):
    digest = store.add("a", sources[0]).digest
    stored, source = store.read(digest).tensors(), read_adapter(sources[0]).tensors()
    assert all(torch.equal(stored[name], source[name]) for name in source)
