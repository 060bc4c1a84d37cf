"""`train --resume RUN key=value`: what may change on the way, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.training.run_folder import RunFolder
from tests.cli.conftest import Command

RECIPE = """
model: {{path: {model}}}
data: {{sources: [{{path: {data}}}], max_length: 64}}
train: {{micro_batch_size: 2, accumulation: 8}}
"""


@pytest.fixture
def run(tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as it stands when training begins; what would train notes its recipe."""
    folder = RunFolder(tmp_path / "runs/a1")
    folder.create("a1", RECIPE.format(model=tiny_model, data=chats))
    monkeypatch.setattr("raytune_ft.train.train", note)
    asked.clear()
    return folder.path


asked: list[Recipe] = []


def note(recipe: Recipe, *, source: str, resume: str) -> int:
    assert Path(source).parent == Path(resume)
    asked.append(recipe)
    return 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["data.on_error=skip"], lambda r: r.data.on_error == "skip"),
        (["data.sources.0.access=stream"], lambda r: r.data.sources[0].access == "stream"),
        (["run.workers=4", "train.accumulation=2"], lambda r: r.run.workers == 4),
        (["train.micro_batch_size=1", "train.accumulation=16", "checkpoint.every=5"],
         lambda r: r.checkpoint.every == 5),
        (["--deepspeed", "none"], lambda r: r.train.deepspeed == "none"),
        ([], lambda r: r.train.accumulation == 8),
    ],
)  # fmt: skip
def test_what_decides_no_number_may_change(
    call: Command, run: Path, words: list[str], found: Any
) -> None:
    said = call("train", "--resume", str(run), *words)
    assert said.code == 0, said.err
    (recipe,) = asked
    assert found(recipe)
    assert recipe.global_batch_size == 16


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train.lr=1e-5"], 2, "--resume {run}: 'train.lr' decides the run's numbers; leave it"),
        (["--seed", "3"], 2, "--resume {run}: 'train.seed' decides the run's numbers"),
        (["data.sources.0.path=x.jsonl"], 2, "'data.sources.0.path' decides"),
        (["compat=xtuner-0.1.9"], 2, "'compat' decides the run's numbers"),
        (["run.workers=3"], 2, "{run}: an optimizer step of this run is 16 packs, 3 workers x 2 x "
         "accumulation 8 are 48; set run.workers=2 train.micro_batch_size=2 train.accumulation=4"),
        (["run.workers=none"], 2, "run.workers"),
    ],
)  # fmt: skip
def test_what_would_change_a_number_is_refused_in_one_line(
    call: Command, run: Path, words: list[str], code: int, says: str
) -> None:
    said = call("train", "--resume", str(run), *words)
    assert says.format(run=run) in said.err
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ")
    assert said.code == code
    assert asked == []


def test_a_recipe_that_is_named_must_be_the_runs_own(call: Command, run: Path) -> None:
    said = call("train", "quickstart.yaml", "--resume", str(run))
    assert said.code == 2
    assert "a run goes on with its own recipe" in said.err
    assert call("train", str(run / "recipe.yaml"), "--resume", str(run)).code == 0
