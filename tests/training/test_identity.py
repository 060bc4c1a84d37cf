"""Which checkpoint goes with which recipe; every field of the schema stands on one side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.training.saving import identity

FIXED_BY_SECTION = {
    "model": (
        "path dtype quantization double_quant template eos_token method fast_path compute "
        "load_from new_tokens"
    ),
    "lora": (
        "r alpha dropout targets bias use_rslora use_dora modules_to_save "
        "init_lora_weights loraplus_lr_ratio"
    ),
    "data.sources": ("path name data_dir split map columns system loss weight limit"),
    "data": (
        "fill system max_length over_length pack shuffle_before_pack validation window "
        "shuffle_rows compat"
    ),
    "train": (
        "epochs max_steps lr betas weight_decay max_norm scheduler warmup_ratio "
        "warmup_steps min_lr optimizer seed objective beta neftune_noise_alpha"
    ),
}
"""Fields that decide a run's numbers. Put a new field here, or into `identity.FREE_FIELDS`."""
FIXED = [
    f"{section}.{name}" for section, names in FIXED_BY_SECTION.items() for name in names.split()
]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields; a list's entries have no number."""
    for name, info in model.model_fields.items():
        inner = [t for t in (info.annotation, *get_args(info.annotation)) if isinstance(t, type)]
        nested = [t for t in inner if issubclass(t, BaseModel)]
        if nested:
            yield from fields(nested[0], f"{prefix}{name}.")
        else:
            yield prefix + name


ALL = [name for name in fields(Recipe) if name.partition(".")[0] not in identity.FREE_SECTIONS]
OTHER_VALUES: dict[str, Any] = {
    "model.method": "full", "model.quantization": "int8", "data.compat": "xtuner-0.1.9",
    "data.sources.path": "other.jsonl",
}  # fmt: skip


def test_every_field_is_classified() -> None:
    assert sorted(ALL) == sorted([*FIXED, *identity.FREE_FIELDS])
    assert set(identity.FREE_SECTIONS) < set(Recipe.model_fields)


def recipe(**sections: Any) -> Recipe:
    content = {"model": {"path": "m"}, "data": {"sources": [{"path": "rows.jsonl"}]}, **sections}
    return Recipe.model_validate(content)


def changed(name: str) -> Recipe:
    """Copy the recipe, unchecked, with another value in one field."""
    content = recipe().model_dump(mode="json")
    place: Any = content
    *path, key = name.split(".")
    for part in path:
        place = place[part][0] if isinstance(place[part], list) else place[part]
    place[key] = OTHER_VALUES.get(name, "another")
    made = recipe().model_copy(deep=True)
    section = getattr(made, path[0])
    if path == ["data", "sources"]:
        source = section.sources[0].model_copy(update={key: place[key]})
        section = section.model_copy(update={"sources": [source]})
    else:
        section = section.model_copy(update={key: place[key]})
    return made.model_copy(update={path[0]: section})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("name", ALL)
def test_a_field_changes_the_hash_if_it_decides_numbers(name: str) -> None:
    same = identity.recipe_hash(changed(name)) == identity.recipe_hash(recipe())
    assert same is (name in identity.FREE_FIELDS)


def test_free_sections_change_nothing() -> None:
    other = recipe(
        run={"workers": 3, "storage": "x"}, tune={"trials": 9}, checkpoint={"every": 3},
        chat_eval={"prompts": ["a"]},
    )  # fmt: skip
    assert identity.recipe_hash(other) == identity.recipe_hash(recipe())


def batch(workers: int, micro: int, accumulation: int) -> Recipe:
    train = {"micro_batch_size": micro, "accumulation": accumulation}
    return recipe(train=train, run={"workers": workers})


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 2, 4), (4, 4, 1), (16, 1, 1)])
def test_any_division_of_a_step_goes_on(shape: tuple[int, int, int]) -> None:
    identity.check(identity.new_state(batch(1, 2, 8), "rows"), batch(*shape), "rows", "runs/a")


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((4, 2, 8), "run.workers=4 train.micro_batch_size=2 train.accumulation=2"),
        ((3, 1, 16), "run.workers=2 train.micro_batch_size=1 train.accumulation=8"),
        ((8, 4, 1), "run.workers=8 train.micro_batch_size=2 train.accumulation=1"),
        ((32, 1, 1), "run.workers=16 train.micro_batch_size=1 train.accumulation=1"),
    ],
)
def test_another_step_is_refused_with_numbers_that_fit(
    shape: tuple[int, int, int], advice: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        identity.check(identity.new_state(batch(1, 2, 8), ""), batch(*shape), "", "runs/a")
    message = str(caught.value)
    assert message.startswith("runs/a: an optimizer step of this run is 16 packs, ")
    assert f"{shape[0]} workers x {shape[1]} x accumulation {shape[2]} are" in message
    assert message.endswith(f"set {advice}")
    assert "\n" not in message


@given(packs=st.integers(1, 300), workers=st.integers(1, 40), micro=st.integers(1, 9))
def test_what_is_advised_is_a_step_of_as_many_packs(packs: int, workers: int, micro: int) -> None:
    found = identity.fitting(packs, workers, micro)
    assert found[0] * found[1] * found[2] == packs
    assert found[0] <= workers and found[1] <= micro


@pytest.mark.parametrize("name", ALL)
def test_a_field_may_be_given_on_resume_if_it_is_free(name: str) -> None:
    word = name.replace("data.sources.", "data.sources.0.")
    if name in identity.FREE_FIELDS:
        identity.check_field(word, "runs/a")
    else:
        with pytest.raises(RecipeError, match=f"^--resume runs/a: '{word}' decides"):
            identity.check_field(word, "runs/a")


def test_other_values_and_other_rows_are_refused_in_one_line() -> None:
    state = identity.new_state(recipe(), "sha-1")
    identity.check(state, recipe(), "sha-1", "runs/a")
    with pytest.raises(CheckpointError, match=r"^runs/a: .* resume with the same recipe"):
        identity.check(state, recipe(train={"lr": 1e-5}), "sha-1", "runs/a")
    with pytest.raises(CheckpointError, match=r"^runs/a: rows of rows.jsonl have changed since"):
        identity.check(state, recipe(), "sha-2", "runs/a")


def test_rows_may_be_read_and_skipped_in_another_way() -> None:
    state = identity.new_state(recipe(), "x")
    data = {
        "sources": [{"path": "rows.jsonl", "access": "copy"}],
        "on_error": "skip",
        "cache": True,
    }
    identity.check(state, recipe(data=data), "x", "runs/a")


def test_a_run_of_the_version_before_is_known_again() -> None:
    """The hash that raytune_ft wrote for this recipe before the fields of `ADDED_LATER`."""
    written = "f3f441be9bdb299f9dc7cb04ab8b0561355ec08bd4b15708d52aba1d789456bc"
    old = recipe(
        model={"path": "m", "quantization": "nf4"}, lora={"r": 8}, train={"epochs": 2}
    )  # fmt: skip
    assert identity.recipe_hash(old) == written


@pytest.mark.parametrize("name", identity.ADDED_LATER)
def test_what_was_added_later_is_off_by_itself(name: str) -> None:
    section, _, field = name.partition(".")
    assert getattr(getattr(recipe(), section), field) == identity.ADDED_LATER[name]
