"""The playground, as somebody uses it: with eyes, with a keyboard, with a screen reader, with a hostile adapter."""

from __future__ import annotations

import json
import re
import time

import httpx
import pytest

from lorasmith.store import Store
from tests.browser.conftest import HOSTILE
from tests.support.server import BASE_ID, NAMES, chat_body

pytestmark = pytest.mark.browser
LENGTH = 12


def expected_answer(server, model, text="hello"):
    return httpx.post(
        f"{server.url}/v1/chat/completions", json=chat_body(model, text, max_tokens=LENGTH)
    ).json()


def set_length(page, tokens):
    page.locator("#max-tokens").evaluate("(field, value) => { field.value = value }", tokens)


def ask(page, text="hello", tokens=LENGTH):
    set_length(page, tokens)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page, count=1):
    page.locator(".answer[data-state=done]").nth(count - 1).wait_for()
    return page.locator(".answer[data-state=done]")


def choose(page, model):
    page.locator(f"#models input[value='{model}']").check()


def side_by_side(page):
    page.get_by_text("Side by side", exact=True).click()


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_chat_shows_the_answer_of_the_weights_it_names(served, place, visit):
    with visit(served) as page:
        for number, model in enumerate(("red", "green", BASE_ID), 1):
            choose(page, model)
            ask(page) if number == 1 else (page.click("#clear"), ask(page))
            answer = done(page).first
            whole = expected_answer(served, model)
            assert answer.locator(".words").text_content() == whole["choices"][0]["message"]["content"]
            digest = whole["lorasmith"]["adapter_digest"]
            receipt = answer.locator(".receipt").inner_text()
            assert f"{LENGTH} tokens" in receipt
            assert (digest[:12] if digest else "the plain base") in receipt
            said = page.locator("#announcer").inner_text()
            assert f"{model} says:" in said


def test_a_conversation_goes_on_with_what_was_said(served, visit):
    with visit(served) as page:
        ask(page, "first")
        first = done(page).first.locator(".words").text_content()
        sent = []
        page.on("request", lambda r: sent.append(r.post_data) if r.method == "POST" else None)
        page.locator("#system").evaluate("(field) => { field.value = 'be brief' }")
        ask(page, "second")
        done(page, 2)
    turns = [(m["role"], m["content"]) for m in json.loads(sent[0])["messages"]]
    assert turns == [("system", "be brief"), ("user", "first"), ("assistant", first), ("user", "second")]


def test_side_by_side_each_gives_what_it_gives_alone(served, visit):
    with visit(served) as page:
        side_by_side(page)
        for model in (*NAMES, "trained"):
            choose(page, model)
        for model in ("hostile",):
            page.locator(f"#models input[value='{model}']").uncheck()
        ask(page, "what is it")
        answers = done(page, 5)
        told = {
            answers.nth(i).locator(".name").inner_text(): answers.nth(i).locator(".words").text_content()
            for i in range(5)
        }
        marks = page.locator(".differs, .same").all_inner_texts()
    assert set(told) == {BASE_ID, *NAMES, "trained"}
    for model, text in told.items():
        assert text == expected_answer(served, model, "what is it")["choices"][0]["message"]["content"], model
    assert len(marks) == 4
    assert all(mark.startswith("differs from") for mark in marks)


def test_no_more_than_six_side_by_side(served, visit):
    def many(page):
        models = [{"id": f"m{i}", "parent": None, "lorasmith": {"digest": None}} for i in range(8)]
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))

    with visit(served, prepare=many, faults_expected=True) as page:
        side_by_side(page)
        for i in range(3, 6):
            choose(page, f"m{i}")
        page.locator("#models input[value=m6]").click()
        assert not page.locator("#models input[value=m6]").is_checked()
        assert "take one away" in page.locator("#picker-note").inner_text()


def test_models_are_found_by_name(served, visit):
    with visit(served) as page:
        page.fill("#filter", "RE")
        assert page.locator("#models input").evaluate_all("all => all.map(i => i.value)") == ["green", "red"]
        page.fill("#filter", "nothing")
        assert "No model" in page.locator("#picker-note").inner_text()


def test_stop_frees_the_row_and_gives_the_focus_back(served, visit):
    def running():
        return httpx.get(f"{served.url}/playground/api/live").json()["running_rows"]

    with visit(served) as page:
        ask(page, tokens=15_000)
        page.locator(".answer[data-state=writing]").wait_for()
        page.click("#stop")
        page.locator(".answer[data-state=stopped]").wait_for()
        assert page.evaluate("() => document.activeElement.id") == "prompt"
        wait_until(lambda: running() == 0)


def test_the_card_tells_what_an_adapter_is(served, place, visit):
    store = Store(place / "store")
    digest = store.resolve("trained").digest
    store.close()
    with visit(served) as page:
        choose(page, "trained")
        card = page.locator("#card")
        card.get_by_text("trained@1").wait_for()
        told = dict(
            zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True)
        )
        targets = card.locator(".targets li").all_inner_texts()
        choose(page, BASE_ID)
        card.get_by_text("the frozen base").wait_for()
        context = card.locator("dl").inner_text()
    assert (told["Rank"], told["Scaling"], told["Learning rate"], told["Seed"]) == ("4", "2", "0.001", "7")
    assert (told["Digest"], told["Data"], told["Base"]) == (digest, "d" * 64, "tiny")
    assert "q_proj × 2" in targets
    assert "16,384 tokens" in context


def test_live_figures_follow_the_work(served, visit):
    with visit(served) as page:
        page.locator("#status[data-state=ready]").wait_for()
        before = httpx.get(f"{served.url}/playground/api/live").json()
        ask(page)
        done(page)
        wait_until(lambda: f"{before['generated_tokens'] + LENGTH:,}" in page.locator("#live").inner_text())
        assert "0 of 4 rows" in page.locator("#live").inner_text()
        assert page.locator("#spark").get_attribute("points").count(",") == 40


def hostile_route(page):
    def answer(route):
        event = {"choices": [{"index": 0, "delta": {"content": HOSTILE}, "finish_reason": None}]}
        end = {
            "choices": [],
            "usage": {"completion_tokens": 1},
            "lorasmith": {"adapter": HOSTILE, "adapter_digest": HOSTILE},
        }
        body = "".join(f"data: {json.dumps(e)}\n\n" for e in (event, end)) + "data: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    models = [
        {"id": HOSTILE, "parent": None, "lorasmith": {"digest": HOSTILE}},
        {"id": "hostile", "parent": "x", "lorasmith": {"digest": HOSTILE, "version": HOSTILE}},
    ]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    page.route("**/v1/chat/completions", answer)


def test_markup_in_names_answers_and_cards_stays_text(served, visit):
    with visit(served, prepare=hostile_route, faults_expected=True) as page:
        ask(page)
        answer = done(page).first
        assert answer.locator(".words").text_content() == HOSTILE
        choose(page, "hostile")  # its card comes from a real sidecar
        page.locator("#card").get_by_text("hostile@1").wait_for()
        assert page.locator("#card").inner_text().count("<b>bold</b>") == 2
        assert page.locator("img[src=x], b").count() == 0
        assert page.title() == "lorasmith playground"


def test_an_error_of_the_server_is_shown_as_text(served, visit):
    def failing(page):
        error = {"error": {"message": HOSTILE}}
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=429, json=error, headers={"retry-after": "7"}),
        )

    with visit(served, prepare=failing, faults_expected=True) as page:
        ask(page)
        page.locator(".answer[data-state=failed]").wait_for()
        assert HOSTILE in page.locator("#problem").inner_text()
        assert "7 s" in page.locator("#problem").inner_text()
        assert page.locator("#prompt").input_value() == "hello", "what was written is not lost"
        assert page.title() == "lorasmith playground"


def test_a_stream_that_breaks_off_is_no_whole_answer(served, visit):
    def broken(page):
        event = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(
                body=f"data: {json.dumps(event)}\n\n", content_type="text/event-stream"
            ),
        )

    with visit(served, prepare=broken, faults_expected=True) as page:
        ask(page)
        page.locator(".answer[data-state=failed]").wait_for()
        assert "before the answer was complete" in page.locator("#problem").inner_text()
        page.unroute("**/v1/chat/completions")
        page.route("**/playground/api/live", lambda route: route.abort())
        page.locator("#status[data-state=off]").wait_for()


def test_the_browser_refuses_markup_and_foreign_code(served, visit):
    with visit(served, faults_expected=True) as page:
        page.locator("#models input").first.wait_for()
        blocked = page.evaluate(
            """async () => {
                const tries = {
                    markup: () => { document.body.innerHTML = "<b>x</b>"; },
                    script: () => { document.createElement("script").src = "https://example.org/x.js"; },
                };
                const failed = {};
                for (const [name, act] of Object.entries(tries)) {
                    try { act(); failed[name] = false; } catch { failed[name] = true; }
                }
                failed.elsewhere = await fetch("http://127.0.0.2:9/").then(() => false, () => true);
                return failed;
            }"""
        )
    assert blocked == {"markup": True, "script": True, "elsewhere": True}


def test_a_key_is_asked_for_and_stays_in_memory(keyed, visit):
    with visit(keyed, faults_expected=True) as page:
        dialog = page.locator("#key-dialog")
        dialog.wait_for()
        assert page.evaluate("() => document.activeElement.id") == "key"
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("does not know the one given").wait_for()
        page.fill("#key", "key-acme")
        page.keyboard.press("Enter")
        dialog.wait_for(state="hidden")
        page.locator("#models input[value=red]").wait_for()
        assert page.locator("#models input").evaluate_all("all => all.map(i => i.value)") == ["green", "red"]
        ask(page)
        done(page)
        page.get_by_text("Your own requests").wait_for()
        assert page.locator("#live").get_by_text("In memory").count() == 0
        kept = page.evaluate(
            "() => [sessionStorage.length, localStorage.length, document.cookie, location.href]"
        )
        assert kept == [0, 0, "", f"{keyed.url}/playground"]
        assert "key-acme" not in page.content()
        page.reload()
        dialog.wait_for()
        page.fill("#key", "key-acme")
        page.check("#keep")
        page.keyboard.press("Enter")
        page.locator("#models input[value=red]").wait_for()
        page.reload()
        page.locator("#models input[value=red]").wait_for()
        assert not dialog.is_visible()
        page.click("#key-open")
        page.click("#key-forget")
        dialog.wait_for()
        assert page.evaluate("() => sessionStorage.length") == 0


def test_everything_is_reached_by_keyboard_in_reading_order(served, visit):
    with visit(served) as page:
        page.locator("#models input").first.wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("() => document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["y"] >= 0, "the skip link shows itself"
        order, outlined = [], []
        for _ in range(12):
            page.keyboard.press("Tab")
            here = page.evaluate(
                """() => {
                    const e = document.activeElement;
                    const shown = e.closest(":has(> textarea:focus-visible)") ?? (e.name === "mode" ? e.nextElementSibling : e);
                    return [e.id || e.name || e.textContent.trim(), getComputedStyle(shown).outlineStyle];
                }"""
            )
            order.append(here[0])
            outlined.append(here[1])
        assert order[:5] == ["mode", "key-open", "Models 6", "filter", "model"]
        assert order[5:] == ["chat", "prompt", "Settings", "clear", "send", "Live", "Card"]
        assert "none" not in outlined
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("() => document.activeElement.id") == "prompt"
        page.locator("#models input:checked").focus()
        page.keyboard.press("ArrowDown")
        chosen = page.locator("#models input:checked").input_value()
        assert page.locator("#asking").inner_text().strip() == chosen
        assert page.evaluate("() => document.activeElement.value") == chosen, "the focus is not lost"
        page.locator("input[name=mode]").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#compare").is_visible()
        page.locator("#prompt").focus()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        assert page.locator("#prompt").input_value() == "one\ntwo"


def test_streamed_text_is_announced_once_and_politely(served, visit):
    with visit(served) as page:
        region = page.locator("#announcer")
        assert region.get_attribute("aria-live") == "polite"
        choose(page, "red")
        ask(page)
        text = done(page).first.locator(".words").text_content()
        said = region.locator("p").all_text_contents()
        assert said == ["Asked red.", f"red says: {text}"]
        assert page.locator(".answer").get_attribute("aria-busy") == "false"


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1920])
def test_nothing_runs_out_of_the_window(served, visit, width):
    with visit(served, width=width, height=844) as page:
        side_by_side(page)
        ask(page, "a" * 300)
        done(page, 3)
        open_everything(page)
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.locator("#send").is_visible()


def test_less_motion_where_it_is_asked_for(served, visit):
    def motion(reduced):
        with visit(served, reduced_motion=reduced) as page:
            ask(page, tokens=15_000)
            page.locator(".answer[data-state=writing]").wait_for()
            name = page.evaluate(
                "() => getComputedStyle(document.querySelector('.answer .words'), '::after').animationName"
            )
            page.click("#stop")
            return name

    assert (motion("no-preference"), motion("reduce")) == ("glow", "none")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(served, visit, scheme, width):
    """axe-core: names, roles, contrast, landmarks, focus; the policy is off so that it can be put in."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def violations(page):
        found = axe.run(page).response["violations"]
        return [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found]

    with visit(served, width=width, color_scheme=scheme, bypass_csp=True, faults_expected=True) as page:
        open_everything(page)
        ask(page)
        done(page)
        assert violations(page) == []
        side_by_side(page)
        ask(page)
        done(page, 4)
        assert violations(page) == []
        page.click("#key-open")
        assert violations(page) == []
        background = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
        assert (brightness > 600) == (scheme == "light")


def open_everything(page):
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
