"""`sweep.html`: whole for every sweep, safe whatever stands in it, and what its script does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.cli.app import dispatch
from raytune_ft.entry import exit_code
from raytune_ft.errors import CheckpointError
from raytune_ft.sweeping.axes import axes_of
from raytune_ft.sweeping.deciding import order_of
from raytune_ft.sweeping.page import EVERY, FILE, Pages, write_page, write_reports
from raytune_ft.sweeping.trials import DONE, STOPPED, Ledger, Trial
from raytune_ft.training.run_folder import RunFolder, append_jsonl
from tests.sweeping.made_sweeps import draw, make_sweep, recipe_of
from tests.training.test_report import HOSTILE, TAGS, markup

OURS = TAGS | {"rect", "a", "u", "script"}


def trial(number: int, values: dict[str, Any], metric: float | None, **known: Any) -> Trial:
    about = {"step": 8, "state": DONE, "folder": Path(), "seconds": 1.0, **known}
    return Trial(number, f"trial_{number:04d}", values, metric, **about)


def hostile_sweep(place: Path) -> RunFolder:
    """A sweep in which everything that a user, a run or another process wrote is an attack."""
    random = np.random.default_rng(0)
    values = [{**draw(random), "train.scheduler": HOSTILE, f"data.{HOSTILE}": i} for i in range(9)]
    space = {"train.lr": [1e-4], "lora.alpha": f"2 * {HOSTILE}"}
    folder = make_sweep(
        place, values=values, reason=HOSTILE, source=HOSTILE, model_folder=HOSTILE,
        recipe=recipe_of(space, metric=HOSTILE),
    )  # fmt: skip
    folder.update(name=HOSTILE, status=HOSTILE)
    append_jsonl(
        folder.path / "trials/trial_0001/metrics.jsonl", {"step": HOSTILE, "loss": HOSTILE}
    )
    (folder.path / "best.yaml").write_text("a: 1")
    return folder


def test_nothing_that_a_sweep_holds_becomes_markup(tmp_path: Path) -> None:
    page = write_page(hostile_sweep(tmp_path / "sweep")).read_text()
    found = markup(page)
    assert found.tags <= OURS and page.count("<script") == 1
    assert not any(name.startswith("on") or name == "src" for name in found.attributes)
    links = re.findall('href="([^"]*)"', page)
    assert len(links) == 9 and all(re.fullmatch(r"trials/trial_\d{4}/", link) for link in links)
    assert "alert(1)" in page, "it is there, as text"
    assert "default-src 'none'" in page and "script-src 'sha256-" in page


class Opened:
    """A page in the browser, and what it asked for and said."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(path.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_runs_only_our_script_and_a_phone_shows_it_whole(
    tmp_path: Path, browser: Any, scheme: str
) -> None:
    path = write_page(hostile_sweep(tmp_path / "sweep"))
    opened = Opened(browser, path, 390, scheme)
    page = opened.page
    page.mouse.move(200, 300)
    assert opened.asked == [path.as_uri()] and opened.said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".narrow .thread").first.is_visible()
    assert not page.locator(".broad .thread").first.is_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    opened.context.close()


@pytest.mark.parametrize("width", [390, 1200])
def test_brushing_an_axis_leaves_the_trials_within(
    tmp_path: Path, browser: Any, width: int
) -> None:
    """The first axis is the learning rate's; its upper half are trials of over 10^-3.5."""
    folder = make_sweep(tmp_path / "sweep", 24)
    opened = Opened(browser, write_page(folder), width)
    page, upright = opened.page, width > 640
    grasp = page.locator(f"{'.broad' if upright else '.narrow'} .grasp[data-a='0']")
    grasp.scroll_into_view_if_needed()
    box = grasp.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    end = (middle[0], box["y"] + 1) if upright else (box["x"] + box["width"] - 1, middle[1])
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(*end)
    page.mouse.up()
    shown = {int(n) for n in page.evaluate(
        "[...document.querySelectorAll('tr[data-n]:not(.out)')].map(one => one.dataset.n)"
    )}  # fmt: skip
    trials = Ledger.read(folder.path).trials.values()
    surely = {one.number for one in trials if one.values["train.lr"] > 10**-3.4}
    perhaps = {one.number for one in trials if one.values["train.lr"] > 10**-3.6}
    assert surely <= shown <= perhaps and len(shown) < 24
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.up()
    assert page.locator("tr.out").count() == 0, "a click lets go"
    assert opened.said == []
    opened.context.close()


def test_pointing_at_a_row_lights_its_lines_and_says_its_values(
    tmp_path: Path, browser: Any
) -> None:
    opened = Opened(browser, write_page(make_sweep(tmp_path / "sweep", 12)), 1200)
    page = opened.page
    row = page.locator("tr[data-n='3']")
    row.hover()
    assert page.locator(".thread.lit").count() == 2, "upright and lying"
    assert page.locator("g.curve.lit").count() >= 2
    said = page.locator("#said").inner_text()
    assert said.startswith("trial 3 · lr=") and "val_loss" in said
    page.locator("h1").hover()
    assert page.locator(".lit").count() == 0
    opened.context.close()


def test_a_page_tells_what_one_wants_to_know(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "my sweep", 24)
    (folder.path / "best").mkdir()
    (folder.path / "best.yaml").write_text("a: 1")
    (folder.path / "trials/trial_0002/report.html").write_text("x")
    page = write_page(folder).read_text()
    best = min(
        (one for one in Ledger.read(folder.path).trials.values() if one.state == DONE),
        key=lambda one: one.metric or 0.0,
    )
    assert f"<b>{best.metric:.4f}</b><span>best val_loss, trial {best.number}</span>" in page
    assert f"raytune-ft chat &#x27;{best.folder}&#x27;" in page
    assert f"--config &#x27;{folder.path / 'best.yaml'}&#x27;" in page
    assert 'href="trials/trial_0002/report.html"' in page
    assert "failed: step 13: loss is nan; lower train.lr" in page
    assert "epsilon squared of the Kruskal-Wallis test" in page and "r, alpha" in page
    assert page.index("<td>lr</td>") < page.index("<td>dropout</td>"), "lr decides by construction"


def test_trials_that_are_over_have_reports_to_link_to(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", 4, running=1)
    kept = folder.path / "trials/trial_0000/report.html"
    kept.write_text("as it was")
    (folder.path / "trials/trial_0001/metrics.jsonl").unlink()
    write_reports(Ledger.read(folder.path).trials.values())
    made = sorted(path.parent.name for path in folder.path.glob("trials/*/report.html"))
    assert made == ["trial_0000", "trial_0002"] and kept.read_text() == "as it was"


def test_few_trials_are_said_to_be_few(tmp_path: Path) -> None:
    page = write_page(make_sweep(tmp_path / "sweep", 6)).read_text()
    assert "Too few trials to say what each field decides: 5 have an outcome, 8 are needed" in page


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_sweep_that_begins_has_its_page(tmp_path: Path, n: int) -> None:
    folder = make_sweep(tmp_path / "sweep", n, running=n, status="running", reason="")
    page = write_page(folder).read_text()
    assert "data-running=1" in page and markup(page).tags <= OURS
    assert f"<b>0 of {n}</b>" in page and "No trial is done yet." in page


BROKEN = {
    "no trial folders": lambda f: shutil.rmtree(f.path / "trials"),
    "metrics cut short": lambda f: (f.path / "trials/trial_0000/metrics.jsonl").write_text('{"st'),
    "metrics of another kind": lambda f: (f.path / "trials/trial_0000/metrics.jsonl").write_text(
        '[1]\n{"step": 1, "loss": NaN, "val_loss": "x"}\n'
    ),
    "recipe is damaged": lambda f: f.recipe.write_text("tune: ["),
    "recipe of another version": lambda f: f.recipe.write_text("tune: {spaces: 1}"),
    "run.json is no JSON": lambda f: f.run_json.write_text("{"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_sweep_has_its_page_too(tmp_path: Path, damage: str) -> None:
    folder = make_sweep(tmp_path / "sweep", 10)
    BROKEN[damage](folder)
    page = write_page(folder).read_text()
    assert (
        markup(page).tags <= OURS and page.count("<tr data-n=") + page.count("<tr class=best") >= 9
    )


@pytest.mark.parametrize("line", ['{"event": "done", "trial": 99}', '{"a": 1}', "[]", '"x"'])
def test_a_ledger_of_something_else_is_refused_in_a_line(tmp_path: Path, line: str) -> None:
    folder = make_sweep(tmp_path / "sweep", 3)
    (folder.path / "trials.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"^[^\n]*trials\.jsonl: is no sweep's ledger[^\n]*$"):
        write_page(folder)


def test_a_hundred_long_trials_make_a_page_that_opens_at_once(tmp_path: Path) -> None:
    path = write_page(make_sweep(tmp_path / "sweep", 100, steps=400))
    assert path.stat().st_size < 1_500_000


def test_pages_are_written_now_and_then_and_runs_read_once(tmp_path: Path) -> None:
    folder, clock = make_sweep(tmp_path / "sweep", 4, running=1), [100.0]
    pages = Pages(folder, now=lambda: clock[0])
    assert pages.update() and (folder.path / FILE).is_file()
    (folder.path / FILE).unlink()
    clock[0] += EVERY / 2
    assert not pages.update() and not (folder.path / FILE).is_file()
    before = pages._read[folder.path / "trials/trial_0000/metrics.jsonl"][1]
    running = folder.path / "trials/trial_0003/metrics.jsonl"
    append_jsonl(running, {"step": 31, "loss": 0.5, "val_loss": 0.25, "seconds": 1.0})
    clock[0] += EVERY
    assert pages.update() and "0.2500" in (folder.path / FILE).read_text()
    assert pages._read[folder.path / "trials/trial_0000/metrics.jsonl"][1] is before


def test_an_axis_is_logarithmic_where_the_space_is_and_a_tie_follows() -> None:
    section = recipe_of({
        "train.lr": {"low": 1e-5, "high": 1e-3, "log": 1}, "train.min_lr": "0.1 * train.lr",
        "lora.r": [16, 4, 8],
    }).tune  # fmt: skip
    rates = [1e-5, 1e-4, 1e-3]
    trials = [
        trial(i, {"train.lr": lr, "train.min_lr": lr / 10, "lora.r": r}, metric)
        for i, (lr, r, metric) in enumerate(zip(rates, (8, 4, 16), (3.0, 1.0, 2.0), strict=True))
    ]
    lr, tie, r, metric = axes_of(section, trials)
    assert [lr.at(i) for i in range(3)] == pytest.approx([0, 0.5, 1])
    assert [tie.at(i) for i in range(3)] == pytest.approx([0, 0.5, 1])
    assert "log" in lr.note and tie.note == "= 0.1 * train.lr, log"
    assert [label for _, label in r.marks] == ["4", "8", "16"], "by size, not as listed"
    assert [metric.at(i) for i in range(3)] == pytest.approx([0, 1, 0.5]), "the best on top"


@pytest.mark.parametrize(
    "values", [["a", "b"], [None, True], [[1], [2, 3]], [1, "1"], [0.0, 1e300], [5, 5]]
)
def test_axes_of_any_values_stay_within(values: list[Any]) -> None:
    section = recipe_of({"data.system": values}).tune
    trials = [trial(i, {"data.system": one}, i / 3) for i, one in enumerate(values)]
    for axis in axes_of(section, [*trials, trial(9, {}, None)]):
        places = [axis.at(i) for i in range(2)]
        assert all(place is not None and 0 <= place <= 1 for place in places)
        assert axis.at(9) is None
        assert all(0 <= place <= 1 and json.dumps(label) for place, label in axis.marks)


def test_stopped_trials_come_behind_done_ones_the_later_the_better() -> None:
    section = recipe_of().tune
    trials = [
        trial(0, {}, 2.0), trial(1, {}, 1.0, state=STOPPED, step=2),
        trial(2, {}, 3.0, state=STOPPED, step=4), trial(3, {}, 1.5),
    ]  # fmt: skip
    assert order_of(trials, section) == [1, 3, 2, 0]


def test_report_writes_a_sweeps_page_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_sweep(tmp_path / "sweep", 4)
    exit_code(lambda: dispatch(["report", str(folder.path)]))
    assert capsys.readouterr().out == f"{folder.path / FILE}\n"
    assert "tag done" in (folder.path / FILE).read_text()
    assert not (folder.path / "report.html").exists()
