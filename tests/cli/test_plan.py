"""`plan` proposes what fits a GPU; `train` says the plan first, refuses what cannot fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft import host, outlook
from raytune_ft.config.estimates import gpus
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError, ModelError
from tests.cli.conftest import Command

GIB = 2**30
NAME, FULL = "internlm_7b_qlora_oasst1_e3", "qwen3_8b_full_oasst1_e3"


def test_the_proposed_command_is_one_line_that_fits(call: Command) -> None:
    said = call("plan", FULL, "--gpu-memory", "80GiB", "--gpu", "h200")
    assert said.code == 4, said.err
    (line,) = [text for text in said.out.splitlines() if "fastest that fits" in text]
    words = line.split("raytune-ft train ")[1].split()
    assert words[0] == FULL
    assert len(words) > 1
    again = call("plan", *words, "--gpu-memory", "80GiB", "--gpu", "h200", "--json")
    memory = json.loads(again.out)["memory"]
    assert memory["fits"] is True
    assert memory["proposals"][0]["overrides"] == []


def test_json_has_parts_pace_and_proposals(call: Command) -> None:
    said = call("plan", NAME, "--gpu", "h200", "--json")
    plan = json.loads(said.out)
    assert plan["memory"]["total"] == sum(plan["memory"]["parts"].values())
    assert {"base weights", "quantisation state", "adapter", "gradients", "optimizer",
            "activations", "GPU context"} <= set(plan["memory"]["parts"])  # fmt: skip
    assert plan["memory"]["host"] == {"optimizer, paged": 8 * 159_907_840}
    assert plan["pace"]["device"] == "H200"
    assert plan["pace"]["epoch_s"] is None
    seconds = [one["seconds"] for one in plan["memory"]["proposals"]]
    assert seconds == sorted(seconds)


def test_the_automatic_layout_and_its_reason_are_shown(call: Command) -> None:
    said = call("plan", NAME, "--gpu-memory", "80GiB", "--gpu", "h200")
    (line,) = [text for text in said.out.splitlines() if text.startswith("layout ")]
    plan = json.loads(call("plan", NAME, "--gpu-memory", "80GiB", "--gpu", "h200", "--json").out)
    chosen = plan["memory"]["layout"]
    laid = chosen["layout"]
    assert f"{laid['micro_batch_size']} packs per pass x {laid['accumulation']} passes" in line
    assert chosen["why"] in line
    assert f"16 packs per step = {laid['micro_batch_size']} per pass" in said.out
    assert plan["memory"]["total"] == chosen["memory"] <= 80 * GIB
    own = call("plan", NAME, "train.layout=recipe", "--gpu", "h200", "--json")
    assert json.loads(own.out)["memory"]["layout"] is None
    assert "16 packs per step = 1 per pass" in call("plan", NAME, "train.layout=recipe").out


def test_what_a_run_says_first_has_the_layout_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = load_recipe(NAME)
    one_gpu(monkeypatch, 80)
    whole = outlook.check_memory(asked)
    monkeypatch.setattr(gpus, "visible", lambda: [gpus.Gpu("NVIDIA H200", 80 * GIB, 20 * GIB)])
    shared = outlook.check_memory(asked)
    assert whole is not None and shared is not None
    assert whole.choice is not None and shared.choice is not None
    assert whole.line().splitlines()[1] == f"plan    {whole.choice.line}"
    assert shared.needed == shared.choice.memory <= 20 * GIB < whole.needed
    assert whole.time(asked, 1000) != shared.time(asked, 1000)
    kept = outlook.check_memory(asked, whole.choice)
    assert kept is not None and kept.choice == whole.choice, "a run goes on as it began"
    one_gpu(monkeypatch, 20)
    smaller = outlook.check_memory(asked, whole.choice)
    assert smaller is not None and smaller.choice is not None
    assert smaller.choice.layout != whole.choice.layout


def test_a_gpu_that_nobody_knows_is_named(call: Command) -> None:
    said = call("plan", NAME, "--gpu", "voodoo2")
    assert (said.code, len(said.err.splitlines())) == (2, 1)
    assert "no rates of 'voodoo2' are known; choose: h200" in said.err


def test_float8_is_not_planned_for_a_gpu_without_it(
    call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of a worker there."""
    said = call("plan", NAME, "model.compute=fp8", "--gpu", "a100")
    assert (said.code, len(said.err.splitlines())) == (ModelError.exit_code, 1)
    why = "model.compute 'fp8': A100 has compute capability 8.0, float8 needs 8.9 or more; leave"
    assert why in said.err
    assert call("plan", NAME, "model.compute=fp8", "--gpu", "l40s").code == 0
    assert call("plan", NAME, "--gpu", "a100").code == 0
    cards = [gpus.Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB)]
    monkeypatch.setattr(gpus, "visible", lambda: cards)
    with pytest.raises(ModelError, match=r"A100 has compute capability 8\.0"):
        outlook.check_memory(load_recipe(NAME, ["model.compute=fp8"]))


def one_gpu(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: [gpus.Gpu("NVIDIA H200", int(gib * GIB))])


def test_training_that_cannot_fit_is_refused_before_anything_is_made(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_gpu(monkeypatch, 6)
    said = call("train", NAME)
    assert (said.code, len(said.err.splitlines())) == (4, 1), said.err
    assert "internlm/internlm-7b: needs about" in said.err
    assert "each GPU has 6.0 GiB; set " in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_card_of_8_gib_is_planned_for_with_things_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_gpu(monkeypatch, 8)
    seen = outlook.check_memory(load_recipe(NAME))
    assert seen is not None and seen.choice is not None
    assert seen.needed <= 8 * GIB
    assert seen.choice.layout.hosted
    assert "and head on the host: about " in seen.line()


def recipe(**train: object) -> Recipe:
    words = [f"train.{key}={value}" for key, value in train.items()]
    fixed = ["model.gradient_checkpointing=false", "train.layout=recipe"]
    return load_recipe(NAME, [*fixed, *words])


def test_only_what_clearly_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch, 80)
    fitting = outlook.check_memory(recipe())
    assert fitting is not None
    one_gpu(monkeypatch, fitting.needed / GIB / 1.04)
    assert outlook.check_memory(recipe()) is not None
    one_gpu(monkeypatch, fitting.needed / GIB / 1.06)
    with pytest.raises(MemoryPlanError):
        outlook.check_memory(recipe())


def test_halves_are_tried_where_training_would_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch, 24)
    with pytest.raises(MemoryPlanError):
        outlook.check_memory(recipe(micro_batch_size=4, accumulation=4))
    seen = outlook.check_memory(recipe(micro_batch_size=4, accumulation=4, on_oom="halve"))
    assert seen is not None
    assert seen.needed <= 24 * GIB * outlook.CLEARLY
    assert "each GPU has 24.0 GiB" in seen.line()
    assert seen.time(recipe(), 1000) is not None


def test_nothing_is_said_of_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu(monkeypatch, 1)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert outlook.check_memory(recipe()) is None


def test_a_cpu_s_memory_is_the_container_s(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: [])
    tiny = load_recipe(NAME, [f"model.path={tiny_model}", "run.workers=2", "data.max_length=64"])
    monkeypatch.setattr(host, "memory", lambda: 4 * GIB)
    seen = outlook.check_memory(tiny)
    assert seen is not None and seen.time(tiny, 10) is None
    monkeypatch.setattr(host, "memory", lambda: GIB // 2)
    with pytest.raises(MemoryPlanError, match=r"this machine has 0\.5 GiB"):
        outlook.check_memory(tiny)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.4, "4 s"), (89, "89 s"), (600, "10 min"), (5400, "1 h 30 min"), (7200, "2 h")],
)
def test_times_as_people_say_them(seconds: float, said: str) -> None:
    assert outlook.spoken(seconds) == said
