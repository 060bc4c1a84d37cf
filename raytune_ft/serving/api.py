"""The HTTP side of the endpoint: FastAPI over a ChatEngine, without ray.

Routes of OpenAI's under /v1, health checks, metrics, and the chat page at `/`. All errors have
OpenAI's JSON shape. From outside in, a request passes `observing` (ids, log, counts), CORS where
origins are named, `guard` (who may come in), `limits` (how much of it), and its route.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from raytune_ft.serving.answers import model_card, model_list
from raytune_ft.serving.completions import FAILED, Completions, check_model
from raytune_ft.serving.elsewhere import not_built
from raytune_ft.serving.engine import ChatEngine
from raytune_ft.serving.guard import Guard, GuardRules
from raytune_ft.serving.limits import Limits
from raytune_ft.serving.metrics import CONTENT_TYPE, Gather, Metrics, exposition
from raytune_ft.serving.observing import Observed
from raytune_ft.serving.options import ApiOptions
from raytune_ft.serving.page import page_files
from raytune_ft.serving.record import access_log
from raytune_ft.serving.refusal import RequestError, error_body

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def build_api(
    engine: ChatEngine,
    rules: GuardRules,
    options: ApiOptions | None = None,
    *,
    metrics: Metrics | None = None,
    gather: Gather | None = None,
) -> FastAPI:
    """Build the ASGI application of one engine.

    Args:
        engine: answers.
        rules: who may come in.
        options: how long, how many, what is logged; none: `ApiOptions()`.
        metrics: this replica's; none: its own.
        gather: returns the metrics of all replicas; none: there is this one.

    Raises:
        ServeError: the access log cannot be written.
    """
    options = options or ApiOptions()
    metrics = metrics or Metrics(engine, options.replica)
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_errors(api)
    _add_v1(api, engine, options)
    _add_health(api, engine, metrics, gather)
    _add_page(api)
    # the last one added is the outermost
    api.add_middleware(Limits, keys=rules.known)
    api.add_middleware(Guard, rules=rules)
    if rules.origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    write = access_log(options.access_log)
    api.add_middleware(Observed, metrics=metrics, options=options, write=write)
    return api


def _add_v1(api: FastAPI, engine: ChatEngine, options: ApiOptions) -> None:
    created = int(time.time())
    completions = Completions(engine, options)
    for path, answer in (
        ("/v1/chat/completions", completions.chat),
        ("/v1/completions", completions.text),
    ):
        api.add_api_route(path, answer, methods=["POST"], response_model=None)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return model_list(engine.models(), created)

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(engine, name)
        return model_card(name, created)


def _add_health(api: FastAPI, engine: ChatEngine, metrics: Metrics, gather: Gather | None) -> None:
    def said(well: bool, bad: str) -> Response:
        return JSONResponse({"status": "ok" if well else bad}, 200 if well else 503)

    @api.get("/healthz")
    async def healthy() -> Response:
        return said(engine.healthy(), "failed")

    @api.get("/readyz")
    async def ready() -> Response:
        return said(engine.healthy() and engine.ready(), "not ready")

    @api.get("/metrics")
    async def measured() -> Response:
        replicas = [metrics.families()] if gather is None else await gather()
        return PlainTextResponse(exposition(replicas), media_type=CONTENT_TYPE)


def _add_page(api: FastAPI) -> None:
    for name, (content, media_type) in page_files().items():
        paths = ("/", "/index.html") if name == "index.html" else (f"/{name}",)
        response = _static(content, media_type)
        for path in paths:
            api.add_api_route(path, response, methods=["GET", "HEAD"])


def _static(content: bytes, media_type: str) -> Any:
    async def respond() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return respond


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def refused(_: Request, error: Exception) -> Response:
        if not isinstance(error, RequestError):
            raise error
        return JSONResponse(error.body(), error.status, headers=error.headers())

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        known = not_built(request.url.path) if error.status_code == 404 else None
        if known is not None:
            return JSONResponse(known.body(), known.status)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(
            error_body(message, error.status_code), error.status_code, headers=error.headers
        )

    @api.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(error_body(FAILED, 500), 500)
