"""`report.html`: whole for every run, safe whatever a model wrote, small however long the run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from raytune_ft.training.run_folder import RunFolder, append_jsonl
from raytune_ft.training.watching.reporting import left_with_report, summarize, write_report
from raytune_ft.training.watching.reporting.series import (
    Columns,
    number,
    short,
    smooth,
    thin,
    ticks,
)
from raytune_ft.training.watching.reporting.svg import Chart, Line, draw
from raytune_ft.training.watching.reporting.tables import changes, measured_table
from tests.training.made_runs import GIB, make_run, recipe_of

HOSTILE = (
    "</p><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"
    "\"'><svg onload=alert(3)>{{7*7}}\u2028\u202e" + "w" * 300
)
ANSWERS = {"Who are you?": ["you you", "I am a model.", "I am a model.", "I am yours."]}
TAGS = {
    "html", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "div", "b", "figure",
    "svg", "path", "text", "tspan", "g", "circle", "table", "tr", "th", "td", "pre", "i",
}  # fmt: skip


class Markup(HTMLParser):
    """Elements and attributes of a page as a browser would find them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def markup(page: str) -> Markup:
    found = Markup()
    found.feed(page)
    return found


def hostile_run(place: Path) -> RunFolder:
    """A run in which everything that others write is an attack."""
    folder = make_run(
        place, steps=30, answers={HOSTILE: [HOSTILE, "a", "b", HOSTILE]}, source=HOSTILE,
        model_folder=HOSTILE, best={"metric": HOSTILE, "value": 1.0, "step": HOSTILE},
        plan={"parts": {HOSTILE: GIB}},
        recipe=recipe_of("x", data={"system": HOSTILE}),
    )  # fmt: skip
    append_jsonl(folder.metrics, {"step": HOSTILE, "loss": HOSTILE})
    append_jsonl(folder.metrics, {"step": 31, "loss": HOSTILE, "val_<b>x": 1.0, "val_loss": 1.0})
    append_jsonl(folder.mmlu, {"name": HOSTILE, "step": HOSTILE, "categories": {HOSTILE: HOSTILE}})
    append_jsonl(folder.evaluations, {"step": 1, "prompt": HOSTILE, "wanted": HOSTILE})
    append_jsonl(folder.path / "failures.jsonl", {"words": HOSTILE})
    (folder.path / "data.json").write_text(json.dumps({HOSTILE: HOSTILE, "places": {HOSTILE: [1]}}))
    (folder.path / "environment.json").write_text(json.dumps({HOSTILE: {HOSTILE: [HOSTILE]}}))
    return folder


def test_nothing_that_a_run_holds_becomes_markup(tmp_path: Path) -> None:
    page = write_report(hostile_run(tmp_path / "run")).read_text(encoding="utf-8")
    found = markup(page)
    assert found.tags <= TAGS
    assert not any(name.startswith("on") or name in ("src", "href") for name in found.attributes)
    assert "alert(1)" in page, "it is there, as text"
    assert "default-src 'none'" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_runs_and_fetches_nothing_and_a_phone_shows_it_whole(
    tmp_path: Path, browser: Any, scheme: str
) -> None:
    path = write_report(hostile_run(tmp_path / "run"))
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    assert (asked, said) == ([path.as_uri()], [])
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("figure:visible").count() >= 5
    words = page.locator(".narrow .chart text").first
    assert 11 <= words.bounding_box()["height"] <= 20, "words of a chart are readable"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_on_paper_it_is_light_and_a_few_pages(tmp_path: Path, browser: Any) -> None:
    path = write_report(make_run(tmp_path / "run", steps=120, answers=ANSWERS))
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(path.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == "rgb(0, 0, 0)"
    content = page.pdf(format="A4", print_background=True)
    assert 1 < len(re.findall(rb"/Type\s*/Page[^s]", content)) <= 5
    context.close()


def test_a_page_tells_what_one_wants_to_know(tmp_path: Path) -> None:
    plan = {"parts": {"base weights": 4 * GIB, "activations": 15 * GIB}}
    folder = make_run(tmp_path / "run", steps=120, every=20, answers=ANSWERS, plan=plan)
    append_jsonl(folder.resumes, {"step": 40, "redone": 7})
    page = write_report(folder).read_text()
    for title in ("loss", "learning rate", "gradient norm", "throughput", "memory",
                  "seconds per step", "waiting for data", "MFU"):  # fmt: skip
        assert f'role=img aria-label="{title}"' in page
    assert "<b>before</b><p>you you</p>" in page
    assert "<b>step 40 to step 80, the same</b><p>I am a model.</p>" in page
    assert "planned: all parts</th><td class=size>19.00 GiB" in page
    assert "measured: allocated by torch, peak</th><td class=size>21.40 GiB" in page
    assert "<b>7</b><span>steps redone</span>" in page
    assert "<tr class=best><td>120</td>" in page
    assert (folder.path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_benchmarks_that_were_run_on_it_stand_in_a_report_written_again(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=12)
    (folder.path / "evaluations").mkdir()
    results = {"arc": {"acc,none": 0.25, "acc_stderr,none": 0.02, "alias": "arc", "f1,strict": 1}}
    for name, record in (("a", {"results": results}), ("b", {"results": {HOSTILE: 3}}), ("c", [])):
        (folder.path / "evaluations" / f"{name}.json").write_text(json.dumps(record))
    page = write_report(folder).read_text()
    row = "<td>arc</td><td>acc</td><td>0.2500</td><td>0.0200</td><td>evaluations/a.json</td>"
    assert row in page and "<td>f1 (strict)</td><td>1.0000</td><td></td>" in page
    assert page.count("evaluations/") == 2 and markup(page).tags <= TAGS


def test_a_hundred_thousand_steps_make_a_small_page_with_every_extreme(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=1)
    with folder.metrics.open("w") as file:
        for step in range(1, 100_001):
            loss = 9.75 if step == 77_777 else 2.0 + math.sin(step) / 10
            fields = f'"lr": {1 / step}, "grad_norm": {1 + step % 7}, "tokens": 9, "seconds": 1.5'
            file.write(f'{{"step": {step}, "loss": {loss}, {fields}}}\n')
    path = write_report(folder)
    assert path.stat().st_size < 500_000
    assert summarize(folder).steps == 100_000
    columns = Columns([{"step": s, "loss": 9.75 if s == 777 else 2.0} for s in range(9_999)])
    assert (777.0, 9.75) in thin(columns["loss"], 400)


BROKEN = {
    "no steps": lambda f: f.metrics.unlink(),
    "cut short": lambda f: f.metrics.write_text(f.metrics.read_text()[:-200]),
    "no file but run.json": lambda f: [p.unlink() for p in f.path.iterdir() if p != f.run_json],
    "run.json is no JSON": lambda f: f.run_json.write_text("{"),
    "run.json is a list": lambda f: f.run_json.write_text("[1]"),
    "numbers are none": lambda f: f.metrics.write_text(
        '{"step": 1, "loss": NaN, "lr": Infinity}\n{"step": "x"}\n[1]\n{"step": 2, "loss": 1e999}\n'
        '{"step": 3, "loss": true, "grad_norm": [1], "rank_seconds": ["a", null]}\n'
    ),
    "other bytes": lambda f: f.metrics.write_bytes(b"\xff\xfe\x00\n"),
    "recipe of another version": lambda f: f.recipe.write_text("model: {unknown: 1}\n"),
    "samples of another version": lambda f: f.samples.write_text('{"answer": 1}\n[]\n3\n'),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_or_partial_run_has_its_report_too(tmp_path: Path, damage: str) -> None:
    folder = make_run(tmp_path / "run", answers=ANSWERS)
    BROKEN[damage](folder)
    page = write_report(folder).read_text()
    assert markup(page).tags <= TAGS and "<h1>run" in page


def test_a_run_that_fails_leaves_its_report_and_the_error_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=12, total=60, status="failed")
    append_jsonl(folder.path / "failures.jsonl", {"words": "step 13: loss is nan"})
    with pytest.raises(ZeroDivisionError), left_with_report(folder):
        raise ZeroDivisionError
    page = (folder.path / "report.html").read_text()
    assert "step 13: loss is nan" in page and "tag failed" in page


def test_a_run_that_fails_before_its_first_step_leaves_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    folder.metrics.unlink()
    with pytest.raises(ZeroDivisionError), left_with_report(folder):
        raise ZeroDivisionError
    assert not (folder.path / "report.html").exists()


points = st.lists(
    st.tuples(st.integers(1, 5_000), st.floats(-1e6, 1e6)), min_size=1, max_size=400,
    unique_by=lambda point: point[0],
).map(sorted)  # fmt: skip


@given(points=points, columns=st.integers(1, 40))
def test_thinning_keeps_order_ends_and_extremes(
    points: list[tuple[int, float]], columns: int
) -> None:
    given_points = [(float(step), value) for step, value in points]
    kept = thin(given_points, columns)
    assert kept == sorted(kept) and set(kept) <= set(given_points)
    assert len(kept) <= max(2 * columns, 4 * columns)
    values = [value for _, value in given_points]
    assert {given_points[0], given_points[-1]} <= set(kept)
    assert {min(values), max(values)} <= {value for _, value in kept}


@given(points=points, window=st.integers(1, 50))
def test_a_running_mean_is_that_of_the_last_points(
    points: list[tuple[int, float]], window: int
) -> None:
    found = smooth([(float(step), value) for step, value in points], window)
    values = [value for _, value in points]
    for place, (_, mean) in enumerate(found):
        last = values[max(0, place + 1 - window) : place + 1]
        assert mean == pytest.approx(sum(last) / len(last), rel=1e-6, abs=1e-3)


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_within(low: float, span: float) -> None:
    assume(span > 1e-6 * abs(low))  # floats between the bounds
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 9
    assert all(low - 1e-6 * span <= one <= low + span * (1 + 1e-6) for one in found)


@given(points=points, log=st.booleans(), zero=st.booleans())
@example(points=[(1, 2.225073858507e-311)], log=False, zero=False)
@example(points=[(1, 5e-324), (2, 1e-321)], log=True, zero=True)
def test_lines_stay_inside_their_picture(
    points: list[tuple[int, float]], log: bool, zero: bool
) -> None:
    line = Line("x", [(float(step), value) for step, value in points], noisy=True)
    svg = draw(Chart("t", [line], may_be_log=log, from_zero=zero))
    places = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg)
    assert "nan" not in svg and "inf" not in svg
    assert all(-0.1 <= float(x) <= 400.1 and -0.1 <= float(y) <= 220.1 for x, y in places)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (2e-4, "2e-4"), (1.5e-4, "1.5e-4"), (0.25, "0.25"), (1234, "1234"),
        (17_500, "17.5k"), (2_500_000, "2.5M"), (-0.005, "-5e-3"),
    ],
)  # fmt: skip
def test_numbers_of_an_axis_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_answers_that_stay_are_joined() -> None:
    said = {"before": "a", "step 1": "b", "step 2": "b", "step 3": "b", "after": "a"}
    assert changes(said) == [("before", "a"), ("step 1 to step 3, the same", "b"), ("after", "a")]


def test_only_measured_steps_stand_in_the_table_of_held_out_rows() -> None:
    lines = [{"step": 1, "val_loss": None}, {"step": 2, "val_loss": 0.5, "val_chrf": 41.0}]
    page = measured_table(lines, 2)
    assert "<th>chrf</th>" in page and page.count("<tr") == 2
    assert measured_table(lines[:1], None) == ""


@pytest.mark.parametrize("value", [None, True, "1", [1], math.nan, math.inf, 10**400])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number(value) is None
