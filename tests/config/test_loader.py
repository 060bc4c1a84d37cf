"""The loader: places, nearest names, strength of base, file and argument, and dump_yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config.document import read_text
from raytune_ft.config.loader import dump_yaml, load_recipe, recipe_stem
from raytune_ft.config.schema import DataSection, ModelSection, Recipe, Source
from raytune_ft.errors import RecipeError

SMALL = """\
model: {path: some-model}
data:
  sources: [{path: rows.jsonl}]
"""


def write(tmp_path: Path, text: str, name: str = "my.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems_of(config: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(config, overrides)
    return str(caught.value).splitlines()


def test_small_file_takes_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert recipe.model == ModelSection(path="some-model")
    assert recipe.data.sources == [Source(path="rows.jsonl")]
    assert recipe.train.lr == 2e-4


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "2E-4", "0.0002", "2e-04", "+2e-4"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    config = write(tmp_path, SMALL + f"train: {{lr: {text}}}\n")
    assert load_recipe(config).train.lr == 2e-4
    assert load_recipe(write(tmp_path, SMALL), [f"train.lr={text}"]).train.lr == 2e-4


def test_quoted_number_is_text(tmp_path: Path) -> None:
    config = write(tmp_path, SMALL + "train:\n  lr: '2e-4'\n")
    assert problems_of(config) == [f"{config}:5: train.lr: expected a number, got '2e-4'"]


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "model:\n  path: m\n  quantisation: nf4\n"
        "lora:\n  aplha: 3\n"
        "data:\n  sources:\n    - path: f\n      mapp: x\n"
        "train:\n  lr: abc\n  epochs: true\n  betas: [0.9]\n"
        "checkpoint: {every: often}\n",
    )
    assert problems_of(config) == [
        f"{config}:3: unknown key 'model.quantisation'; did you mean 'quantization'?",
        f"{config}:5: unknown key 'lora.aplha'; did you mean 'alpha'?",
        f"{config}:9: unknown key 'data.sources.0.mapp'; did you mean 'map'?",
        f"{config}:11: train.lr: expected a number, got 'abc'",
        f"{config}:12: train.epochs: expected a whole number, got true",
        f"{config}:13: train.betas: expected more values; number 2 is missing",
        f"{config}:14: checkpoint.every: expected 'epoch' or a whole number, got 'often'",
    ]


def test_key_of_another_section_is_led_home(tmp_path: Path) -> None:
    config = write(tmp_path, SMALL + "lr: 1\n")
    assert problems_of(config) == [f"{config}:4: unknown key 'lr'; did you mean 'train.lr'?"]


def test_remote_code_is_neither_run_nor_needed(tmp_path: Path) -> None:
    config = write(tmp_path, "base: quickstart.yaml\nmodel:\n  trust_remote_code: true\n")
    assert problems_of(config) == [
        f"{config}:3: unknown key 'model.trust_remote_code'; code of a model is never run nor "
        "needed: leave the key out"
    ]


def test_cross_field_problem_names_a_line(tmp_path: Path) -> None:
    config = write(tmp_path, SMALL.replace("some-model", "m, quantization: nf4, method: full"))
    (line,) = problems_of(config)
    assert line.startswith(f"{config}:1: model.method 'full' cannot train nf4 weights")


def test_argument_beats_file_beats_base(tmp_path: Path) -> None:
    write(tmp_path, SMALL + "train: {lr: 1.0, epochs: 5, seed: 7}\n", "base.yaml")
    config = write(tmp_path, "base: base.yaml\ntrain: {lr: 2.0, epochs: 6}\n")
    recipe = load_recipe(config, ["train.lr=3"])
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.seed) == (3.0, 6, 7)


def test_lists_are_replaced_and_mappings_merged(tmp_path: Path) -> None:
    write(tmp_path, SMALL + "  fill: {name: A, town: B}\n", "base.yaml")
    config = write(tmp_path, "base: base.yaml\ndata: {sources: [{path: x}], fill: {name: C}}\n")
    data = load_recipe(config).data
    assert [source.path for source in data.sources] == ["x"]
    assert data.fill == {"name": "C", "town": "B"}


def test_base_may_be_a_shipped_name(tmp_path: Path) -> None:
    config = write(tmp_path, "base: internlm_7b_qlora_oasst1_e3\nmodel: {path: ./here}\n")
    recipe = load_recipe(config)
    assert (recipe.model.path, recipe.model.quantization) == ("./here", "nf4")


def test_base_of_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: internlm_7b_qlora_oasst1_e3\n", "one.yaml")
    config = write(tmp_path, "base: one.yaml\n")
    (line,) = problems_of(config)
    assert line.startswith(f"{config}:1: base 'one.yaml' has a base itself")


def test_problem_in_the_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, SMALL + "train: {lr: abc}\n", "base.yaml")
    config = write(tmp_path, "base: base.yaml\n")
    (line,) = problems_of(config)
    assert line.startswith(f"{tmp_path / 'base.yaml'}:4: train.lr: expected a number")


def test_overrides_reach_lists_mappings_and_texts(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, SMALL),
        ["data.sources.0.path=a: b", "data.fill.name=2024", "run.name=007", "data.validation=0.1",
         "lora.targets=[q_proj, v_proj]", "tune.space.train.lr={low: 1e-5, high: 1e-3}",
         "chat_eval.every=null", "model.gradient_checkpointing=false"],
    )  # fmt: skip
    assert recipe.data.sources[0].path == "a: b"
    assert recipe.data.fill == {"name": "2024"}
    assert recipe.run.name == "007"
    assert recipe.data.validation == 0.1
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert recipe.tune.space == {"train.lr": {"low": 1e-5, "high": 1e-3}}
    assert recipe.chat_eval.every is None
    assert recipe.model.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'train.lr'?"),
        ("lora.aplha=1", "unknown key 'lora.aplha'; did you mean 'lora.alpha'?"),
        ("lora.r.x=1", "unknown key 'lora.r.x'; did you mean 'lora.r'?"),
        ("data.sources.4.path=x", "'data.sources.4.path': data.sources has the places 0 to 0"),
        ("data.sources.0.mp=x", "unknown key 'data.sources.0.mp'; did you mean 'map'?"),
        ("train.lr", "'train.lr': expected key=value, such as train.lr=2e-4"),
        ("train.lr=abc", "train.lr: expected a number, got 'abc'"),
        ("train.lr=-1", "train.lr: expected more than 0, got -1"),
        ("train.lr=.inf", "train.lr: expected a finite number, got inf"),
        ("train.epochs=1.5", "train.epochs: expected a whole number, got 1.5"),
        ("lora.targets=[q", "lora.targets: is not YAML"),
        ("model.path=", "model.path: expected text that is not empty, got ''"),
        ("run.name=a/b", "run.name: use 1 to 64 letters"),
        ("train={}", "unknown key 'train'"),
        ("base=x", "unknown key 'base'"),
    ],
)
def test_bad_override(tmp_path: Path, override: str, message: str) -> None:
    (line,) = problems_of(write(tmp_path, SMALL), override)
    assert line.startswith(f"argument: {message}")


def test_unknown_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "chats.yaml")
    config = str(tmp_path / "chat.yaml")
    assert problems_of(config) == [f"{config}: no such file; nearest: {tmp_path / 'chats.yaml'}"]


def test_file_under_configs_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("internlm_oasst1.yaml")
    assert recipe.model.path == "./internlm-chat-7b"
    assert recipe.data.sources == [Source(path="./openassistant-guanaco", map="oasst1_map_fn")]
    assert recipe == load_recipe("internlm_oasst1")


def test_walk_through_file_changes_nothing_but_the_paths() -> None:
    ours = load_recipe("internlm_oasst1.yaml").model_dump()
    base = load_recipe("internlm_chat_7b_qlora_oasst1_e3").model_dump()
    ours["model"]["path"], ours["data"]["sources"] = base["model"]["path"], base["data"]["sources"]
    assert ours == base


@pytest.mark.parametrize(
    ("config", "stem"),
    [
        ("configs/quickstart.yaml", "quickstart"),
        ("internlm_7b_qlora_oasst1_e3", "internlm_7b_qlora_oasst1_e3"),
        ("my recipe (2).yaml", "my_recipe_2"),
        ("..yaml", "run"),
        ("x" * 200 + ".yml", "x" * 48),
    ],
)
def test_recipe_stem(config: str, stem: str) -> None:
    assert recipe_stem(config) == stem


def test_recipe_stem_of_a_run_is_the_run(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    config = write(tmp_path / "first", SMALL, "recipe.yaml")
    assert recipe_stem(config) == "first"


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(deadline=None, max_examples=60)  # the machine is shared
@given(system=TEXTS, prompts=st.lists(TEXTS, max_size=3), fill=st.dictionaries(TEXTS, TEXTS),
       lr=st.floats(1e-9, 1e3), path=TEXTS.filter(bool))  # fmt: skip
def test_dumped_yaml_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    system: str, prompts: list[str], fill: dict[str, str], lr: float, path: str,
) -> None:  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "model": {"path": path},
            "data": {"sources": [{"path": path, "limit": 3}], "system": system, "fill": fill},
            "train": {"lr": lr},
            "chat_eval": {"prompts": prompts},
            "tune": {"space": {"lora.r": [1, 2], "train.lr": {"low": lr, "high": 1e4}}},
        }
    )
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_bytes(dump_yaml(recipe, "title").encode())
    assert load_recipe(str(file)) == recipe


def test_dumped_yaml_explains_each_documented_field() -> None:
    text = dump_yaml(
        Recipe(model=ModelSection(path="m"), data=DataSection(sources=[Source(path="f")]))
    )
    for section in Recipe.model_fields.values():
        kind: Any = section.annotation
        for info in kind.model_fields.values():
            words = (info.description or "").split()
            assert " ".join(words[:3]) in text
    assert max(map(len, text.splitlines())) <= 100


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_values_or_one_line(text: str) -> None:
    try:
        document = read_text(text, "f.yaml")
    except RecipeError as error:
        assert str(error).startswith("f.yaml")
        assert len(str(error).splitlines()) == 1
    else:
        assert all(p.startswith("f.yaml:") for p in document.problems)


def test_infinity_in_a_nested_list_is_found(tmp_path: Path) -> None:
    config = write(tmp_path, SMALL + "tune: {space: {train.lr: [1.0, .nan]}}\n")
    (line,) = problems_of(config)
    assert line == f"{config}:4: tune.space.train.lr.1: expected a finite number, got nan"


COMPAT = "xtuner-0.1.9"


def test_compat_at_the_top_is_the_data_sections(tmp_path: Path) -> None:
    plain = load_recipe(write(tmp_path, SMALL))
    assert plain.data.compat is None
    for text in (f"compat: {COMPAT}\n{SMALL}", SMALL + f"compat: {COMPAT}\n"):
        assert load_recipe(write(tmp_path, text)).data.compat == COMPAT
    assert load_recipe(write(tmp_path, SMALL), [f"compat={COMPAT}"]).data.compat == COMPAT
    assert load_recipe(write(tmp_path, f"base: my.yaml\ncompat: {COMPAT}\n", "b.yaml")).data == (
        plain.data.model_copy(update={"compat": COMPAT})
    )


def test_compat_in_a_base_can_be_taken_back(tmp_path: Path) -> None:
    write(tmp_path, f"compat: {COMPAT}\n{SMALL}")
    config = write(tmp_path, "base: my.yaml\ncompat: null\n", "above.yaml")
    assert load_recipe(config).data.compat is None


def test_compat_problems_name_their_line(tmp_path: Path) -> None:
    config = write(tmp_path, SMALL + "compat: xtuner\n")
    assert problems_of(config) == [
        f"{config}:4: data.compat: expected '{COMPAT}', got 'xtuner'; did you mean '{COMPAT}'?"
    ]
    config = write(tmp_path, f"compat: {COMPAT}\n{SMALL}  compat: {COMPAT}\n")
    assert problems_of(config) == [
        f"{config}:1: 'compat' is 'data.compat', which stands in {config}:5 already; keep one"
    ]


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("data_dir=2024", "data_dir", "2024"),
        ("system=no", "system", "no"),
        ("system=", "system", ""),
        ("system=null", "system", None),
        ("loss=last", "loss", "last"),
        ("columns.answer=007", "columns", {"answer": "007"}),
        ("weight=0.5", "weight", 0.5),
    ],
)
def test_fields_of_a_source_on_the_command_line(
    tmp_path: Path, argument: str, field: str, value: object
) -> None:
    recipe = load_recipe(write(tmp_path, SMALL), [f"data.sources.0.{argument}"])
    assert getattr(recipe.data.sources[0], field) == value


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("data.sources.1.loss=all", "data.sources has the places 0 to 0"),
        ("data.sources.0.lose=all", "did you mean 'loss'?"),
        ("data.sources.0.loss.x=all", "did you mean 'data.sources.0.loss'?"),
        ("comat=xtuner-0.1.9", "did you mean 'data.compat'?"),
        ("checkpoint.keep=0", "expected -1 or 1 or more, got 0"),
    ],
)
def test_slips_on_the_command_line(tmp_path: Path, argument: str, problem: str) -> None:
    (line,) = problems_of(write(tmp_path, SMALL), argument)
    assert line.startswith("argument: ")
    assert problem in line
