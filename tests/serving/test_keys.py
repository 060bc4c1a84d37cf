"""The file of keys: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.errors import ServeError
from raytune_ft.serving.keys import ApiKey, find_key, hash_key, read_keys

ADA, BOB = hash_key("ada's key"), hash_key("bob's key")


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_names_hashes_and_limits(tmp_path: Path) -> None:
    path = written(
        tmp_path / "keys.yaml",
        f"keys:\n  - {{name: ada, sha256: {ADA}}}\n"
        f"  - {{name: bob, sha256: {BOB}, requests_per_minute: 60, concurrent: 2}}\n",
    )
    ada, bob = read_keys(path)
    assert (ada.requests_per_minute, bob.requests_per_minute, bob.concurrent) == (None, 60, 2)
    assert find_key((ada, bob), "bob's key") is bob
    assert find_key((ada, bob), BOB) is None  # a hash opens nothing
    assert find_key((ada, bob), "") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [", "no YAML"),
        ("", "the file"),
        ("keys: []", "keys"),
        ("keys: [{name: a}]", "keys.0.sha256"),
        ("keys: [{name: a, sha256: plain-key}]", "keys.0.sha256"),
        (f"keys: [{{name: 'a b', sha256: {ADA}}}]", "keys.0.name"),
        (f"keys: [{{name: a, sha256: {ADA}, requests: 1}}]", "keys.0.requests"),
        (f"keys: [{{name: a, sha256: {ADA}, concurrent: 0}}]", "keys.0.concurrent"),
        (f"keys: [{{name: a, sha256: {ADA}}}, {{name: a, sha256: {BOB}}}]", "'a' is taken"),
        (f"keys: [{{name: owner, sha256: {ADA}}}]", "'owner' is taken"),
        ("!!python/object/apply:os.system ['true']", "no YAML"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path / "keys.yaml", text)
    with pytest.raises(ServeError) as caught:
        read_keys(path)
    message = str(caught.value)
    assert message.startswith(f"keys {path}: ")
    assert words in message
    assert "\n" not in message
    assert "plain-key" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="name a YAML file"):
        read_keys(str(tmp_path / "none.yaml"))


def test_a_key_shows_no_secret() -> None:
    assert "ada's key" not in repr(ApiKey(name="ada", sha256=ADA))
