"""Routes of OpenAI's that this endpoint has not: each is refused in words that say what to do."""

from __future__ import annotations

from raytune_ft.serving.refusal import RequestError

CHATS = "use POST /v1/chat/completions"
NOT_BUILT = {
    "/v1/embeddings": "it has no embeddings, since its models write text; run an embedding model",
    "/v1/responses": CHATS,
    "/v1/chat/completions/": "it keeps no answers; keep what POST /v1/chat/completions returned",
    "/v1/conversations": f"it keeps no conversations; {CHATS} with all messages",
    "/v1/assistants": CHATS,
    "/v1/threads": f"it keeps no conversations; {CHATS} with all messages",
    "/v1/realtime": f"{CHATS} with 'stream': true",
    "/v1/edits": CHATS,
    "/v1/engines": "use GET /v1/models",
    "/v1/moderations": "it judges no texts; ask a moderation service",
    "/v1/audio": "it reads and writes text only",
    "/v1/images": "it reads and writes text only",
    "/v1/videos": "it reads and writes text only",
    "/v1/files": "it keeps no files; put the text into the messages",
    "/v1/uploads": "it keeps no files; put the text into the messages",
    "/v1/vector_stores": "it keeps no files; put the text into the messages",
    "/v1/containers": "it runs no code",
    "/v1/batches": f"{CHATS} for each request",
    "/v1/fine_tuning": "train with raytune-ft train on the machine",
    "/v1/fine-tunes": "train with raytune-ft train on the machine",
    "/v1/evals": "evaluate with raytune-ft eval on the machine",
    "/v1/skills": "it runs no code",
    "/v1/organization": "keys are in the file that the endpoint was started with",
}
"""The beginning of a path, and what to do instead."""


def not_built(path: str) -> RequestError | None:
    """Return the refusal of a known route; None for a path that OpenAI has not either.

    404 and not 501: clients ask again after 5xx.
    """
    for start, advice in NOT_BUILT.items():
        if path == start or path.startswith(start if start.endswith("/") else start + "/"):
            return RequestError(
                f"{path} is not served by this endpoint: {advice}",
                status=404,
                code="unsupported_route",
            )
    return None
