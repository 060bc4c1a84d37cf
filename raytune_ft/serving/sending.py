"""An answer below any framework: status, headers and a JSON body as ASGI messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What an id that a client gives its request must be, before it is logged and sent back."""


async def send_json(
    send: Send, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    """Send a whole answer."""
    content = json.dumps(body).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    fields += [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content})
