"""The web server of a reader study: the page, blinded volumes, answers. 127.0.0.1 only.

Starlette on uvicorn: both small, long kept, and the check of the Host header comes with them. The
page lies under a path that nobody can guess, and no answer but a finished reader's own table
depends on the truth.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"no {error.name}: a reader study needs pip install 'tumorsynth[reader-study]'"
    ) from error

from tumorsynth.reader_study.results import convention, row, table
from tumorsynth.reader_study.store import Reader, Refused, Store

HOST = "127.0.0.1"
STATIC = Path(__file__).parent / "static"
HEADERS = {
    # 'self' alone: the viewer's font and textures are data: in its own file
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
BODY_LIMIT = 10_000  # bytes; an answer has about 150


@dataclass(frozen=True)
class Served:
    """What the page gets of a case: a blinded NIfTI file, and the voxel to mark or None."""

    volume: Callable[[], bytes]
    mark: tuple[int, int, int] | None


@dataclass(frozen=True)
class Study:
    """What a server needs. cases: by opaque id. reader_name: the only reader, or None to ask."""

    store: Store
    cases: dict[str, Served]
    reader_name: str | None = None
    positive: str = "real"


def build_app(study: Study) -> Starlette:
    """The application; every address of it begins with /TOKEN/."""
    store = study.store

    def about(request: Request) -> Response:
        marked = all(case.mark is not None for case in study.cases.values())
        return JSONResponse(
            {"reader_name": study.reader_name, "cases": len(study.cases), "marked": marked}
        )

    def start(data: dict[str, Any]) -> dict[str, Any]:
        name = study.reader_name if study.reader_name is not None else data.get("name")
        if not isinstance(name, str):
            raise Refused("a reader needs a name")
        reader = store.reader(name)
        given = {a.case: a for a in store.answers(reader)}
        cases = [
            {
                "id": case,
                "mark": study.cases[case].mark,
                "answer": given[case].answer if case in given else None,
                "confidence": given[case].confidence if case in given else None,
            }
            for case in store.order(reader)
        ]
        return {
            "reader": reader.id,
            "name": reader.name,
            "finished": reader.finished,
            "cases": cases,
        }

    def answer(data: dict[str, Any]) -> dict[str, Any]:
        reader = store.reader_of(str(data.get("reader")))
        store.save(
            reader,
            str(data.get("case")),
            str(data.get("answer")),
            data.get("confidence"),  # type: ignore[arg-type] # checked there
            data.get("seconds"),  # type: ignore[arg-type]
        )
        return {"saved": True}

    def finish(data: dict[str, Any]) -> dict[str, Any]:
        reader = store.reader_of(str(data.get("reader")))
        if not reader.finished:
            store.finish(reader)
        return own_results(store.reader_of(reader.id))

    def results(data: dict[str, Any]) -> dict[str, Any]:
        return own_results(store.reader_of(str(data.get("reader"))))

    def own_results(reader: Reader) -> dict[str, Any]:
        if not reader.finished:
            raise Refused("the result is shown when all cases are answered and closed")
        figures = row(reader.name, store.answers(reader), positive=study.positive)
        return {"table": table([figures]), "convention": convention(study.positive)}

    def volume(request: Request) -> Response:
        case = study.cases.get(request.path_params["case"])
        if case is None:
            raise HTTPException(404)
        return Response(case.volume(), media_type="application/octet-stream")

    inside = [
        Route("/api/study", about),
        Route("/api/start", _post(start), methods=["POST"]),
        Route("/api/answer", _post(answer), methods=["POST"]),
        Route("/api/finish", _post(finish), methods=["POST"]),
        Route("/api/results", _post(results), methods=["POST"]),
        Route("/volume/{case}.nii", volume),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    return Starlette(
        routes=[Mount(f"/{store.token}", routes=inside)],
        middleware=[
            Middleware(_Headers),
            Middleware(
                TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False
            ),
        ],
    )


def _post(work: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
    """JSON in, JSON out. Other sites cannot send this content type without being asked first."""

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "application/json is wanted")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT:
                raise HTTPException(413)
        try:
            data = json.loads(body)
        except ValueError:
            raise HTTPException(400, "this is no JSON") from None
        if not isinstance(data, dict):
            raise HTTPException(400, "an object is wanted")
        try:
            return JSONResponse(_finite(work(data)))
        except Refused as error:
            return JSONResponse({"error": str(error)}, status_code=409)

    return endpoint


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Headers:
    """Adds HEADERS to every answer, and takes away what tells when a file was written."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [h for h in message["headers"] if h[0] not in (b"etag", b"last-modified")]
                added = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": kept + added}
            await send(message)

        await self.app(scope, receive, with_headers)


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1 that a browser can already wait at; port 0 takes a free one.

    ValueError where the port cannot be had.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        raise ValueError(f"port {port} cannot be had ({error}); choose another --port") from error
    return found


def address(study: Study, place: socket.socket) -> str:
    """What to open in a browser; the same at each start with the same port."""
    return f"http://{HOST}:{place.getsockname()[1]}/{study.store.token}/"


def serve(study: Study, place: socket.socket) -> None:
    """Serve until Ctrl-C or a signal to end."""
    config = uvicorn.Config(
        build_app(study),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        lifespan="off",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[place])
