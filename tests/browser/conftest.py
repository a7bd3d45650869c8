"""Debian's chromium, and servers to open in it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from lorasmith.formats import read_adapter, write_adapter
from lorasmith.server import hash_key
from lorasmith.store import Store
from tests.support.served import Served
from tests.support.server import write_place

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
RUN = {"lora": {"init": "normal"}, "train": {"lr": 0.001, "epochs": 3, "seed": 7, "method": "lora"}}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    folder = write_place(tmp_path_factory.mktemp("place"), context=16_384)
    store = Store(folder / "store")
    for name, provenance in {
        "trained": {"run": RUN, "base_name": "tiny", "data_fingerprint": "d" * 64},
        "hostile": {"base_name": HOSTILE, "made_by": {"command": HOSTILE}, "run": [HOSTILE]},
    }.items():
        adapter = read_adapter(folder / "adapters" / "red")
        adapter.provenance = provenance
        next(iter(adapter.factors.values())).B.add_(0.25 if name == "trained" else 0.5)
        write_adapter(adapter, folder / "adapters" / name)
        store.add(name, folder / "adapters" / name)
    store.close()
    return folder


@pytest.fixture(scope="session")
def served(place):
    server = Served(place)
    yield server
    assert server.stop() == 0, "".join(server.lines)


@pytest.fixture(scope="session")
def keyed(place, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys.write_text(f'[tenants.acme]\nkeys = ["{hash_key("key-acme")}"]\nadapters = ["red", "gr*"]\n')
    server = Served(place, "--keys", keys)
    yield server
    assert server.stop() == 0, "".join(server.lines)


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="make test-browser installs it")
    chromium = shutil.which("chromium") or pytest.skip("no chromium; make test-browser installs it")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox"],  # the page is ours, and containers mostly run as root
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser):
    """Opens the playground of a server; what the page complains about fails the test."""

    @contextmanager
    def visiting(server, *, width=1280, height=800, faults_expected=False, prepare=None, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(10_000)
        page = context.new_page()
        faults: list[str] = []
        page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith(server.url + "/") else faults.append(f"asked for {r.url}"),
        )
        if prepare is not None:
            prepare(page)
        page.goto(f"{server.url}/playground")
        try:
            yield page
        finally:
            context.close()
        assert faults_expected or not faults, faults

    return visiting
