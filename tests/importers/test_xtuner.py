"""XTuner configurations become the recipes that are shipped under their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raytune_ft.config.loader import load_recipe
from raytune_ft.data.rows.formats import MAP_FUNCTIONS
from raytune_ft.errors import RecipeError
from raytune_ft.importers import read_config, xtuner_data
from raytune_ft.importers.draft import Draft
from tests.importers.written import FACTS, GOLDEN, config_of

NAMES = [
    name
    for name in (GOLDEN / "names.txt").read_text(encoding="utf-8").split()
    if not name.startswith("deepspeed")
]
ONE_PER_RECIPE = sorted({entry["recipe"]: name for name, entry in FACTS["names"].items()}.values())


def read(folder: Path, text: str, name: str = "my_config.py") -> Draft:
    (folder / name).write_text(text, encoding="utf-8")
    return read_config(str(folder / name))


def told(draft: Draft) -> list[str]:
    return [f"{note.line}: {note.what}; {note.advice}" for note in draft.notes]


@pytest.mark.parametrize("name", ONE_PER_RECIPE)
def test_configuration_of_a_name_gives_its_recipe(tmp_path: Path, name: str) -> None:
    draft = read(tmp_path, config_of(name), f"{name}.py")
    assert draft.recipe().model_dump() == load_recipe(name).model_dump()


def test_configuration_of_every_name_gives_its_recipe(tmp_path: Path) -> None:
    for name in NAMES:
        draft = read(tmp_path, config_of(name), f"{name}.py")
        assert draft.recipe() == load_recipe(name), name


def test_map_functions_agree_with_ours() -> None:
    assert set(xtuner_data.MAPS) <= set(MAP_FUNCTIONS)


PLAIN = config_of("internlm_7b_qlora_oasst1_e3")


def changed(old: str, new: str) -> str:
    assert old in PLAIN
    return PLAIN.replace(old, new)


def test_local_paths_and_numbers_are_taken(tmp_path: Path) -> None:
    text = changed("'internlm/internlm-7b'", "'./internlm-7b'").replace(
        "'timdettmers/openassistant-guanaco'", "'./guanaco'"
    )
    recipe = read(tmp_path, text.replace("max_length = 2048", "max_length = 2 * 512")).recipe()
    assert recipe.model.path == "./internlm-7b"
    assert recipe.data.sources[0].path == "./guanaco"
    assert recipe.data.max_length == 1024


def test_eos_token_of_a_local_qwen_comes_from_its_card(tmp_path: Path) -> None:
    text = config_of("qwen_7b_chat_qlora_oasst1_e3").replace(", eos_token='<|im_end|>'", "")
    recipe = read(tmp_path, text.replace("'Qwen/Qwen-7B-Chat'", "'../Qwen-7B-Chat'")).recipe()
    assert recipe.model.eos_token == "<|im_end|>"


def test_own_map_function_is_named_with_the_nearest_format(tmp_path: Path) -> None:
    function = (
        "def mine(example):\n"
        "    return {'conversation': [{'input': example['q'], 'output': example.get('a')}]}\n"
    )
    text = function + changed("dataset_map_fn=oasst1_map_fn", "dataset_map_fn=mine")
    draft = read(tmp_path, text)
    assert draft.recipe().data.sources[0].map is None
    note = next(line for line in told(draft) if "mine" in line)
    assert "(it reads q, a)" in note
    assert "columns: {input: q, output: a}" in note


@pytest.mark.parametrize(
    ("columns", "advice"),
    [
        ("x['messages']", "`messages` are read as they are"),
        ("x['conversations']", "`conversations` are read as they are"),
        ("x['instruction'] + x['output']", "instruction, input, output are read"),
        ("x['text']", "`text` are read"),
        ("compute(x)", "jsonl with `messages`"),
    ],
)
def test_nearest_format_follows_the_columns(tmp_path: Path, columns: str, advice: str) -> None:
    text = f"def f(x):\n    return {columns}\n" + changed("=oasst1_map_fn", "=f")
    assert any(advice in line for line in told(read(tmp_path, text)))


def test_read_base_is_not_followed(tmp_path: Path) -> None:
    head = (
        "from mmengine.config import read_base\nwith read_base():\n    from .maps import one as f\n"
    )
    draft = read(tmp_path, head + changed("=oasst1_map_fn", "=f"))
    lines = told(draft)
    assert any(line.startswith("3: read_base: .maps is not followed (one)") for line in lines)
    assert any("dataset_map_fn: it comes from .maps" in line for line in lines)
    assert draft.recipe().data.sources[0].map is None


def test_nothing_of_the_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"import os\nos.system('touch {mark}')\nopen({str(mark)!r}, 'w')\n" + PLAIN
    draft = read(tmp_path, text)
    assert not mark.exists()
    assert sum("is not run" in line for line in told(draft)) == 2
    assert draft.recipe().model.path == "internlm/internlm-7b"


def test_every_unknown_key_is_listed(tmp_path: Path) -> None:
    text = changed("type=SupervisedFinetune,", "type=SupervisedFinetune, frobnicate=7,")
    text += "\nspare = 3\nmodel['llm']['rope'] = dict(kind='ntk')\n"
    lines = " ".join(told(read(tmp_path, text)))
    for name in ("model.frobnicate = 7", "spare = 3", "model.llm.rope"):
        assert name in lines


def test_later_layout_is_read(tmp_path: Path) -> None:
    text = changed(
        "param_scheduler = dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, "
        "T_max=max_epochs, convert_to_iter_based=True)",
        "warmup_ratio = 0.03\nparam_scheduler = [dict(type=LinearLR, start_factor=1e-5, "
        "by_epoch=True, begin=0, end=warmup_ratio * max_epochs, convert_to_iter_based=True), "
        "dict(type=CosineAnnealingLR, eta_min=1e-6, begin=warmup_ratio * max_epochs, "
        "end=max_epochs, by_epoch=True, convert_to_iter_based=True)]",
    ).replace(
        "checkpoint=dict(type=CheckpointHook, interval=1)",
        "checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=500, max_keep_ckpts=2)",
    )
    text += "\nrandomness = dict(seed=7)\nwork_dir = './work_dirs/mine'\n"
    text += "strategy = dict(type=DeepSpeedStrategy, zero_optimization=dict(stage=2, "
    text += "offload_optimizer=dict(device='cpu')))\n"
    recipe = read(tmp_path, text).recipe()
    assert recipe.train.warmup_ratio == pytest.approx(0.03)
    assert recipe.train.min_lr == 1e-6
    assert (recipe.checkpoint.every, recipe.checkpoint.keep) == (32, 2)
    assert (recipe.run.storage, recipe.run.name, recipe.train.seed) == ("./work_dirs", "mine", 7)
    assert recipe.train.deepspeed == "zero2_offload"


def test_iterations_become_optimizer_steps(tmp_path: Path) -> None:
    text = changed(
        "train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)",
        "train_cfg = dict(by_epoch=False, max_iters=1600)",
    )
    assert read(tmp_path, text).recipe().train.max_steps == 100


def test_unknown_optimizer_template_and_hook_are_noted(tmp_path: Path) -> None:
    text = changed("type=PagedAdamW32bit", "type=Lion")
    text = text.replace(
        "dict(type=DatasetInfoHook", "dict(type=MyHook, a=1), dict(type=DatasetInfoHook"
    )
    text = text.replace("= PROMPT_TEMPLATE.internlm_chat", "= PROMPT_TEMPLATE.internlm2_chat")
    draft = read(tmp_path, text)
    lines = " ".join(told(draft))
    assert "optimizer Lion has no counterpart; adamw is used" in lines
    assert "hook MyHook is not carried over" in lines
    assert "prompt template internlm2_chat is not known" in lines
    assert draft.recipe().model.template == "tokenizer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = (", "1: is not Python 3"),
        ("x = 1", "is no XTuner configuration"),
        ("(" * 5000, "cannot be read as Python|is not Python 3"),
        ("optim_wrapper = dict()", "no `model = dict"),
        (PLAIN.replace("SupervisedFinetune,", "RewardModel,"), r"\d+: model is trained by Rew"),
        (PLAIN + "train_dataset['type'] = build_packed_dataset\n", "no data set can be carried"),
        (
            PLAIN.replace("lr, max_epochs = 0.0002", "lr, max_epochs = -1"),
            r"\d+: train.lr: expected",
        ),
        (PLAIN + "import os\nmodel['llm'] = os.environ\n", r"\d+: model.llm is no dict"),
    ],
    ids=["syntax", "other", "deep", "no model", "reward", "no data", "bad value", "not known"],
)
def test_what_cannot_be_a_recipe_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        read(tmp_path, text).recipe()
    assert "my_config.py" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


ODD: list[object] = ["abc", [1, "x"], {"a": 1}, -1, True, [], 1.5]


@pytest.mark.parametrize("name", ["llama2_7b_qlora_moss_sft_all_e1", "internlm_7b_qlora_oasst1_e3"])
def test_odd_values_are_lines_not_tracebacks(tmp_path: Path, name: str) -> None:
    text = config_of(name)
    for found in re.finditer(r"(\w+)=([\w.\-]+|'[^']*')(?=[,)])", text):
        for odd in ODD:
            try:
                read(tmp_path, text[: found.start(2)] + repr(odd) + text[found.end(2) :]).recipe()
            except RecipeError as error:
                assert "my_config.py" in str(error)
