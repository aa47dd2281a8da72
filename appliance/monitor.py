"""/healthz, /readyz and /metrics of a parent: for orchestrators and Prometheus, so without a token, and read-only.

They answer from what the parent has: its child's figures of the last second. None of them asks the child anything.
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response

from appliance.supervisor import Supervisor
from cdp.config import Group

PATHS = ("/healthz", "/readyz", "/metrics")
# A child sends figures every second. One that is silent for this long is stuck, not busy: its loop serves NBD too.
STALE_SECONDS = 15.0


def why_not_ready(supervisor: Supervisor) -> str | None:
    """A sentence, or None while the child serves."""
    if not supervisor.ready.is_set():
        because = f": {supervisor.last_error}" if supervisor.last_error else "."
        return f"The {supervisor.role} is starting, or is started again{because}"
    silent_seconds = asyncio.get_running_loop().time() - supervisor.heard_at
    if silent_seconds > STALE_SECONDS:
        return f"The {supervisor.role} has said nothing for {silent_seconds:.0f} s."
    return None


def add_to(app: FastAPI, supervisor: Supervisor, groups: list[Group]) -> None:
    """The three paths. `groups` are the configured ones."""

    @app.get("/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("alive\n")

    @app.get("/readyz")
    async def readyz() -> PlainTextResponse:
        why = why_not_ready(supervisor)
        return PlainTextResponse(f"{why or 'ready'}\n", 200 if why is None else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        # Not before somebody wants them: 30 ms and some MiB in each parent.
        from appliance import metrics as page

        return Response(page.render(supervisor, groups), media_type=page.CONTENT_TYPE)


def build(supervisor: Supervisor, groups: list[Group]) -> FastAPI:
    """An application of these alone, for a listener of its own."""
    app = FastAPI(title=f"cdp {supervisor.role}", docs_url=None, redoc_url=None, openapi_url=None)
    add_to(app, supervisor, groups)
    return app
