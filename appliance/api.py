"""The HTTP API of a parent: its state, its child's figures and commands; for the replayer, rollbacks too.

Errors are `{"error": {…}, "exit_code": n}` under a status that fits; the CLI raises them again as they were.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse

from appliance import monitor
from appliance.supervisor import Supervisor
from cdp.config import Group
from cdp.errors import CdpError, NotFoundError

# A client that waits longer asks again; waits are for replay, which has no upper bound of its own.
MAX_TIMEOUT_SECONDS = 3600.0
DEFAULT_TIMEOUT_SECONDS = 30.0
# Who watches a rollback asks again; a parent that stops need not wait for longer.
MAX_WATCH_SECONDS = 10.0
_HTTP_STATUS = {2: 400, 3: 404, 4: 409, 5: 503, 6: 500}

# What people and scripts may ask of each child. Locks and the ends of a rollback are asked by rollbacks only, which
# use the same API: who can open the unix socket is the owner of the state folder, who comes over TCP has its token.
COMMANDS = {
    "collector": {
        "bookmark", "verify", "resync", "lock", "unlock", "rollback_begin", "rollback_end", "consumers",
        "consumer_remove", "trust", "clients",
    },
    "replayer": {"points", "resolve", "diff", "wait", "verify_result", "pin", "unpin", "space", "reset"},
    "relay": set(),
}  # fmt: skip


class Rollbacks(Protocol):
    """The rollback jobs that the replayer's parent runs."""

    def jobs(self) -> list[dict[str, Any]]: ...
    async def watch(self, number: str, seconds: float) -> dict[str, Any]: ...
    def begin(self, request: dict[str, Any]) -> dict[str, Any]: ...
    def act(self, number: str, action: str) -> dict[str, Any]: ...


def build(supervisor: Supervisor, rollbacks: Rollbacks | None, groups: list[Group]) -> FastAPI:
    """The application, /healthz and its like included. Everything runs on the parent's one asyncio loop."""
    app = FastAPI(title=f"cdp {supervisor.role}", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(CdpError)
    async def explain(_: Request, error: CdpError) -> JSONResponse:
        body = {"error": error.to_dict(), "exit_code": error.exit_code}
        return JSONResponse(body, _HTTP_STATUS.get(error.exit_code, 500))

    @app.get("/v1/status")
    async def status() -> dict[str, Any]:
        figures, reason = None, None
        try:
            figures = await supervisor.figures()
        except CdpError as e:
            reason = e.to_dict()
        return {
            "role": supervisor.role, "parent": os.getpid(), "pid": supervisor.pid, "restarts": supervisor.restarts,
            "listen": supervisor.listen, "figures": figures, "reason": reason,
        }  # fmt: skip

    @app.post("/v1/command/{name}")
    async def command(
        name: str, arguments: dict[str, Any] = Body(default={}), timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        if name not in COMMANDS[supervisor.role]:
            raise NotFoundError(f"The {supervisor.role} has no command {name!r}.", "Use the CLI of the same version.")
        return await supervisor.command(name, arguments, min(timeout_seconds, MAX_TIMEOUT_SECONDS))

    if rollbacks is not None:
        _add_rollbacks(app, rollbacks)
    monitor.add_to(app, supervisor, groups)
    return app


def _add_rollbacks(app: FastAPI, rollbacks: Rollbacks) -> None:
    @app.get("/v1/rollbacks")
    async def jobs() -> dict[str, Any]:
        return {"rollbacks": rollbacks.jobs()}

    @app.get("/v1/rollbacks/{number}")
    async def job(number: str, wait_seconds: float = 0.0) -> dict[str, Any]:
        return await rollbacks.watch(number, min(wait_seconds, MAX_WATCH_SECONDS))

    @app.post("/v1/rollbacks")
    async def begin(request: dict[str, Any] = Body()) -> dict[str, Any]:
        return rollbacks.begin(request)

    @app.post("/v1/rollbacks/{number}/{action}")
    async def act(number: str, action: str) -> dict[str, Any]:
        return rollbacks.act(number, action)
