"""API keys: a file of names, hashes and limits in, what the guard compares with out.

Keys themselves are in no file: only the SHA-256 of each. docs/serving.md has the line that makes
one. A key is random and long, so a slow hash would add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raytune_ft.errors import ServeError

OWNER = "owner"
"""Name of the key in RAYTUNE_API_KEY, which has no limits."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ApiKey(BaseModel):
    """One key; a limit of None is none. Limits hold for each replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    """Stands in the access log."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Of prompts and answers together."""
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Requests under way at a time."""


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: Annotated[list[ApiKey], Field(min_length=1, max_length=10_000)]


def hash_key(key: str) -> str:
    """Return what is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def find_key(keys: tuple[ApiKey, ...], given: str) -> ApiKey | None:
    """Return the key that a client has sent.

    Hashes are compared in constant time, and all of them whatever is found: how long it takes
    tells nothing about the keys.
    """
    digest, found = hash_key(given), None
    for key in keys:
        if hmac.compare_digest(digest, key.sha256):
            found = key
    return found


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """Read a file of keys.

    Raises:
        ServeError: one line that names the file and what is wrong with it.
    """
    try:
        content: Any = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        keys = _KeyFile.model_validate(content).keys
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"keys {path}: cannot be read ({error}); name a YAML file") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ServeError(f"keys {path}: no YAML: {reason}; see docs/serving.md") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ServeError(f"keys {path}: {place}: {first['msg']}; see docs/serving.md") from None
    names = [key.name for key in keys]
    if OWNER in names or len(set(names)) < len(names):
        twice = next(name for name in names if name == OWNER or names.count(name) > 1)
        raise ServeError(
            f"keys {path}: the name '{twice}' is taken; '{OWNER}' is RAYTUNE_API_KEY's, and each "
            "key has a name of its own"
        )
    return tuple(keys)
