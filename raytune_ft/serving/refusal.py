"""What a request that is not served is told: OpenAI's error object, with the status it goes by.

In: what was wrong, by name, or pydantic's finding. Out: a RequestError, and the JSON of its body.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

OVERLOADED, OVERLOADED_HEADER = "overloaded", "X-Raytune-Full"
"""Code and header of a refusal because all places are taken, by which `serving.front` knows it."""
RETRY_AFTER_S = 2

UNION_ARMS = frozenset({"str", "float", "int", "bool"})
"""Names that pydantic puts into the place of a field which may be of several types."""


class RequestError(Exception):
    """A request cannot be served; carries what OpenAI's error object holds.

    No ValueError, so that pydantic lets it through with its fields.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status
        self.code, self.retry_after_s = code, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return error_body(self.message, self.status, self.param, self.code)

    def headers(self) -> dict[str, str]:
        """Return what tells a client whether to come again, and when."""
        if self.retry_after_s is not None:
            full = {OVERLOADED_HEADER: "1"} if self.code == OVERLOADED else {}
            return {"Retry-After": str(self.retry_after_s), **full}
        # OpenAI's client asks a second time after 408, unless it is told not to
        return {"x-should-retry": "false"} if self.status == 408 else {}


def overloaded(message: str) -> RequestError:
    """Return the refusal of a request that there is no place for now."""
    return RequestError(message, status=429, code=OVERLOADED, retry_after_s=RETRY_AFTER_S)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON object of an error."""
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(error: ValidationError) -> RequestError:
    """Turn pydantic's finding into an error that names the first field that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _dotted(first["loc"])
    if first["type"] == "json_invalid":
        return RequestError(f"the body is no valid JSON: {first['msg']}")
    if first["type"] == "missing":
        return RequestError(f"missing required parameter: '{param}'", param)
    if first["type"] == "extra_forbidden":
        return RequestError(f"unrecognized request argument supplied: {param}", param)
    return RequestError(f"invalid '{param}': {first['msg']}" if param else first["msg"], param)


def _dotted(location: tuple[int | str, ...]) -> str | None:
    """Return `messages[0].content` for a pydantic location, without the names of union arms."""
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part not in UNION_ARMS:
            name += f".{part}" if name else part
    return name[:200] or None
