"""What the page has around a conversation: tries, edits, settings, comparison, keys, colours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_ft.serving.guard import GuardRules
from tests.serving.browser import Scripted, answered, say
from tests.soak.local import served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_retry_keeps_both_answers_and_the_shown_one_is_history(
    scripted: Scripted, open_page: Any
) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        scripted.answer = "first"
        say(page, "who?")
        answered(page)
        scripted.answer = "second"
        page.get_by_role("button", name="Answer again").click()
        page.get_by_text("second").wait_for()
        assert contents(scripted.asked[-1]) == ["who?"]
        page.get_by_role("button", name="Earlier answer").click()
        assert answered(page) == ["first"]
        assert page.locator(".count").inner_text() == "1 / 2"
        say(page, "and?")
        answered(page, 2)
        assert contents(scripted.asked[-1]) == ["who?", "first", "and?"]
        # only the last answer can be asked for again
        playwright.expect(page.get_by_role("button", name="Answer again")).to_have_count(1)


def test_an_edited_question_forgets_what_came_behind_it(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        for count, text in enumerate(("one", "two", "three"), start=1):
            say(page, text)
            answered(page, count)
        page.get_by_role("button", name="Edit this question").nth(1).click()
        area = page.get_by_label("Question", exact=True)
        playwright.expect(area).to_have_value("two")
        area.fill("zwei")
        area.press("Enter")
        page.get_by_text("zwei").wait_for()
        answered(page, 2)
        assert contents(scripted.asked[-1]) == ["one", "ok", "zwei"]
        page.get_by_role("button", name="Edit this question").nth(0).click()
        page.get_by_role("button", name="Cancel").click()
        assert page.locator(".user").all_inner_texts() == ["one", "zwei"]


def test_settings_are_sent_kept_and_reset(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        page.get_by_role("button", name="Settings").click()
        given = {
            "System text": "Be brief.", "Temperature": "0.5", "Top p": "0.9", "Seed": "7",
            "Longest answer": "11", "Frequency penalty": "0.25",
            "Presence penalty": "-0.5", "Stop strings, one a line, at most 4": "END\n##",
        }  # fmt: skip
        for label, value in given.items():
            page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Done").click()
        page.reload()
        scripted.answer = "fine"
        say(page, "x")
        answered(page)
        page.get_by_role("button", name="Answer again").click()
        page.locator(".count", has_text="2 / 2").wait_for()
        assert contents(scripted.asked[-1]) == ["Be brief.", "x"]
        (_, first), (_, again) = scripted.sampled
        assert (first.temperature, first.top_p, first.max_new_tokens) == (0.5, 0.9, 11)
        assert (first.frequency_penalty, first.presence_penalty) == (0.25, -0.5)
        assert (first.seed, again.seed, first.stop) == (7, 8, ("END", "##"))
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Reset").click()
        page.keyboard.press("Escape")
        say(page, "y")
        answered(page, 2)
        assert contents(scripted.asked[-1]) == ["x", "fine", "y"]
        assert scripted.sampled[-1][1].temperature == 0.1


def test_two_adapters_answer_beside_each_other(open_page: Any) -> None:
    engine = Scripted("base", "ada", "bob")
    engine.answer = "I am MODEL"
    with served(engine, GuardRules()) as url:
        page = open_page(url)
        playwright.expect(page.get_by_label("Model", exact=True)).to_have_value("base")
        page.get_by_role("button", name="Compare").click()
        page.get_by_label("Model", exact=True).select_option("ada")
        page.get_by_label("Model on the right").select_option("bob")
        say(page, "who?")
        assert answered(page, 2) == ["I am ada", "I am bob"]
        assert page.locator(".head").all_inner_texts() == ["ada", "bob"]
        say(page, "sure?")
        assert answered(page, 4)[2:] == ["I am ada", "I am bob"]
        # each side goes on from its own answer
        histories = {tuple(contents(messages)) for messages in engine.asked[-2:]}
        assert histories == {("who?", "I am ada", "sure?"), ("who?", "I am bob", "sure?")}
        assert {model for model, _ in engine.sampled} == {"ada", "bob"}
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_one_model_has_nothing_to_compare(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        playwright.expect(page.get_by_role("heading", name="scripted")).to_be_visible()
        playwright.expect(page.get_by_role("button", name="Compare")).to_be_hidden()
        playwright.expect(page.get_by_label("Model", exact=True)).to_be_hidden()


def test_everything_can_be_done_by_keyboard(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        say(page, "one")
        answered(page)
        page.keyboard.press("ArrowUp")
        playwright.expect(page.get_by_label("Question", exact=True)).to_be_focused()
        page.keyboard.press("Escape")
        playwright.expect(page.get_by_label("Question", exact=True)).to_have_count(0)
        page.keyboard.press("Alt+r")
        page.locator(".count", has_text="2 / 2").wait_for()
        page.keyboard.press("Alt+s")
        playwright.expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        playwright.expect(page.get_by_role("dialog")).to_be_hidden()
        scripted.endless, scripted.answer = True, "on and on"
        say(page, "go on")
        page.get_by_text("on and on").wait_for()
        page.keyboard.press("Escape")
        assert scripted.cancelled.wait(5)
        answered(page, 2)
        page.keyboard.press("Alt+n")
        playwright.expect(page.locator(".message")).to_have_count(0)
        playwright.expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_speed_and_tokens_stand_below_an_answer(scripted: Scripted, open_page: Any) -> None:
    scripted.answer = "a few words here"
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        say(page, "count")
        answered(page)
        note = page.locator(".meta").inner_text()
        assert note.startswith("9 tokens") and "5 read" in note and "first after" in note


@pytest.mark.parametrize(("system", "chosen"), [("light", "dark"), ("dark", "light")])
def test_colours_follow_the_system_and_the_user(
    scripted: Scripted, open_page: Any, system: str, chosen: str
) -> None:
    def brightness(page: Any) -> float:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(json.loads(f"[{color[4:-1]}]")) / 3

    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        page.emulate_media(color_scheme=system)
        assert (brightness(page) > 128) == (system == "light")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Colours").select_option(chosen)
        page.keyboard.press("Escape")
        assert (brightness(page) > 128) == (chosen == "light")
        page.reload()
        page.emulate_media(color_scheme=system)
        assert (brightness(page) > 128) == (chosen == "light")


def test_a_broken_stream_is_said_and_what_came_stays(scripted: Scripted, open_page: Any) -> None:
    with served(scripted, GuardRules()) as url:
        page = open_page(url)

        def broken(route: Any) -> None:
            event = {"choices": [{"delta": {"content": "half an"}, "finish_reason": None}]}
            route.fulfill(
                status=200, content_type="text/event-stream", body=f"data: {json.dumps(event)}\n\n"
            )

        page.route("**/v1/chat/completions", broken)
        say(page, "x")
        playwright.expect(page.get_by_role("alert")).to_have_text("the answer broke off")
        playwright.expect(page.locator(".assistant .text")).to_have_text("half an")


def test_tables_quotes_and_thoughts(scripted: Scripted, open_page: Any) -> None:
    scripted.answer = "> said\n\n| a | b |\n|---|---|\n| 1 | <b>2</b> |\n\nso *much* 2 * 3 * 4"
    with served(scripted, GuardRules()) as url:
        page = open_page(url)
        say(page, "x")
        answered(page)
        text = page.locator(".assistant .text")
        assert text.locator("blockquote").inner_text() == "said"
        assert text.locator("td").all_inner_texts() == ["1", "<b>2</b>"]
        assert text.locator("em").all_inner_texts() == ["much"]
        assert text.locator("p").last.inner_text() == "so much 2 * 3 * 4"
