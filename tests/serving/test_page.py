"""The chat page in a real browser: answers, stopping, history, markdown without markup, keys."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.serving.guard import GuardRules, hash_key
from tests.serving.browser import Scripted, answered, say
from tests.serving.conftest import Live
from tests.soak.local import served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


def test_a_conversation(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        playwright.expect(page.get_by_role("heading", name="scripted")).to_be_visible()
        scripted.answer = "I am Ada. 你好"
        say(page, "who?")
        assert answered(page) == ["I am Ada. 你好"]
        say(page, "again")
        answered(page, 2)
        assert [m["content"] for m in scripted.asked[-1]] == ["who?", "I am Ada. 你好", "again"]
        page.get_by_role("button", name="New chat").click()
        playwright.expect(page.locator(".message")).to_have_count(0)
        say(page, "fresh")
        answered(page)
        assert [m["content"] for m in scripted.asked[-1]] == ["fresh"]


def test_shift_enter_starts_a_line_and_enter_sends(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        box = page.get_by_label("Message", exact=True)
        box.press_sequentially("one")
        box.press("Shift+Enter")
        box.press_sequentially("two")
        box.evaluate(
            "box => box.dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
        )
        page.wait_for_timeout(200)
        assert scripted.asked == []
        playwright.expect(box).to_have_value("one\ntwo")
        box.press("Enter")
        answered(page)
        assert scripted.asked == [[{"role": "user", "content": "one\ntwo"}]]
        playwright.expect(box).to_have_value("")


def test_stop_ends_the_generation_and_keeps_the_text(scripted: Scripted, open_page: Any) -> None:
    scripted.endless, scripted.answer = True, "I could go on"
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        say(page, "talk")
        page.get_by_text("I could go on").wait_for()
        page.get_by_role("button", name="Stop the answer").click()
        assert answered(page) == ["I could go on"]
        assert page.locator(".meta").inner_text() == "stopped"
        assert scripted.cancelled.wait(5)
        playwright.expect(page.get_by_role("button", name="Send message")).to_be_visible()


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "`<b onmouseover=alert(1)>x</b>`",
    "**<iframe src=javascript:alert(1)>**",
    "```html\n<svg onload=alert(1)>\n```",
    "- <a href=javascript:alert(1)>x</a>",
    "# <style>*{display:none}</style>",
    "\u202e<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
]


def test_hostile_text_stays_text(scripted: Scripted, open_page: Any) -> None:
    allowed = "p, pre, code, strong, ul, ol, li, h3"
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        for count, text in enumerate(HOSTILE, start=1):
            scripted.answer = text
            say(page, text[:20])
            assert "alert(1)" in answered(page, count)[-1] or "style" in text
        foreign = page.locator(f".message .text *:not({allowed})")
        assert foreign.count() == 0
        assert page.locator(".message *[onerror], .message *[href], .message *[src]").count() == 0


def test_markdown_becomes_elements(scripted: Scripted, open_page: Any) -> None:
    scripted.answer = (
        "# Title\n\nSome **bold** and `code`.\n\n- one\n- two\n\n"
        "3. three\n4. four\n\n```python\nif a < b:\n    pass\n```\nend *"
    )
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        say(page, "x")
        answered(page)
        text = page.locator(".assistant .text")
        assert text.locator("h3").inner_text() == "Title"
        assert text.locator("strong").inner_text() == "bold"
        assert text.locator("p code").inner_text() == "code"
        assert text.locator("ul li").all_inner_texts() == ["one", "two"]
        assert text.locator("ol").get_attribute("start") == "3"
        assert text.locator("pre").inner_text() == "if a < b:\n    pass"
        assert text.locator("p").last.inner_text() == "end *"


def test_a_busy_server_is_explained_and_the_question_can_be_sent_again(
    scripted: Scripted, open_page: Any
) -> None:
    scripted.busy = True
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        say(page, "x")
        assert "busy. Try again in 2 seconds" in page.get_by_role("alert").inner_text()
        scripted.busy = False
        say(page, "y")
        answered(page)
        assert scripted.asked[-1] == [{"role": "user", "content": "y"}]


def test_the_oldest_turns_leave_a_full_context(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        for count in range(1, 5):
            say(page, f"{count}" * 40)
            answered(page, count)
        assert [m["content"][0] for m in scripted.asked[-1]] == ["3", "o", "4"]


def test_a_key_is_asked_for(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules(key_hash=hash_key("open sesame"))) as url:
        page = open_page(url)
        key = page.get_by_label("API key")
        key.fill("wrong")
        key.press("Enter")
        playwright.expect(key).to_be_visible()
        key.fill("open sesame")
        key.press("Enter")
        playwright.expect(page.get_by_role("heading", name="scripted")).to_be_visible()
        say(page, "x")
        assert answered(page) == ["ok"]


def test_a_phone_sees_the_whole_width(scripted: Scripted, open_page: Any) -> None:
    scripted.answer = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```"
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        page.set_viewport_size({"width": 360, "height": 640})
        say(page, "long")
        answered(page)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360


@pytest.mark.ray
def test_the_page_of_a_real_endpoint(live: Live, open_page: Any) -> None:
    page = open_page(live.url + "/")
    playwright.expect(page.get_by_role("heading", name=live.model)).to_be_visible()
    say(page, "red river?")
    done = page.locator(".assistant:not(.writing), .user")
    playwright.expect(done).to_have_count(2, timeout=60_000)
    assert page.get_by_role("alert").count() == 0
