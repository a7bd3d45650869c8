"""The playground: one page, in static files, and the two JSON routes that it reads besides OpenAI's.

The files need no key even where keys are set: a browser cannot send one when it opens a page, and the files
are the same bytes in every installation; they know neither the base, nor an adapter, nor the server's state.
Everything that the page shows comes from routes that ask for a tenant's key. `--no-playground` serves neither.

The page may load from, and talk to, this server only; what models and adapters say enters it as text, and
the browser is told to refuse anything else (Trusted Types).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from lorasmith.server.gateway import Gateway
from lorasmith.server.keys import Tenant
from lorasmith.server.names import Resolved

ADDRESS = "/playground"
FILES = {
    "index.html": "text/html", "style.css": "text/css", "parts.css": "text/css", "icon.svg": "image/svg+xml",
    "app.js": "text/javascript", "api.js": "text/javascript", "dom.js": "text/javascript",
    "picker.js": "text/javascript", "answers.js": "text/javascript", "panels.js": "text/javascript",
}  # fmt: skip
PUBLIC = frozenset({"/", ADDRESS, *(f"{ADDRESS}/{name}" for name in FILES)})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()", "x-frame-options": "DENY",
}  # fmt: skip


def routes(gateway: Gateway) -> APIRouter:
    """The page's routes, around a gateway."""
    router = APIRouter()
    _add_files(router)

    @router.get("/playground/api/card")
    async def card(model: str, request: Request) -> dict[str, Any]:
        """What one model is; for the base, its own facts."""
        tenant: Tenant = request.state.principal.tenant
        resolved = await gateway.in_thread(gateway.adapters.resolve, model, tenant)
        return await gateway.in_thread(card_of, gateway, resolved)

    @router.get("/playground/api/live")
    async def live(request: Request) -> dict[str, Any]:
        """What goes on now, as far as it is this tenant's business."""
        return live_of(gateway, request.state.principal.tenant)

    return router


def card_of(gateway: Gateway, resolved: Resolved) -> dict[str, Any]:
    """The card of what a `model` means."""
    about = {"model": resolved.model, "name": resolved.name, "version": resolved.version}
    if resolved.digest is not None:
        return about | {"digest": resolved.digest} | gateway.store.card(resolved.digest)
    dtype = str(next(gateway.base.model.parameters()).dtype).removeprefix("torch.")
    context = gateway.engine.max_row_tokens
    return about | {
        "digest": None, "fingerprint": gateway.base_fingerprint, "dtypes": [dtype], "context_tokens": context,
    }  # fmt: skip


def live_of(gateway: Gateway, tenant: Tenant) -> dict[str, Any]:
    """A tenant's own requests and tokens; without keys there is one tenant, and the server's state too."""
    mine = [r for r in gateway.running if r.asked.tenant.name == tenant.name]
    spent: Mapping[str, int] = gateway.spent.get(tenant.name, {})
    names = ("requests", "prompt_tokens", "reused_tokens", "generated_tokens")
    why_not = gateway.why_not_ready()
    state: dict[str, Any] = {
        "ready": why_not is None,
        "max_rows": gateway.max_active_adapters,
        "running_rows": sum(len(r.asked.requests) for r in mine),
        "waiting": gateway.queue.waiting_of(tenant),
        "running_tokens": sum(r.tokens_seen for r in mine),
        **{name: spent.get(name, 0) for name in names},
    }
    if gateway.keys.is_open:
        state |= {
            "why_not": why_not, "loaded_adapters": len(gateway.adapters.loaded),
            "isolation_mismatches": gateway.mismatches, "engine_restarts": gateway.engine.restarts,
        }  # fmt: skip
    return state


def _add_files(router: APIRouter) -> None:
    folder = files("lorasmith.server") / "playground"
    bodies = {name: (folder / name).read_bytes() for name in FILES}

    def file(name: str) -> Response:
        return Response(bodies[name], media_type=f"{FILES[name]}; charset=utf-8", headers=HEADERS)

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse(ADDRESS, headers=HEADERS)

    @router.get(ADDRESS, include_in_schema=False)
    async def index() -> Response:
        return file("index.html")

    for name in FILES:
        _add_file(router, name, file(name))


def _add_file(router: APIRouter, name: str, response: Response) -> None:
    async def asset() -> Response:
        return response

    router.add_api_route(f"{ADDRESS}/{name}", asset, include_in_schema=False, response_class=Response)
