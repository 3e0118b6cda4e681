"""The web server of a reader study: the page, blinded volumes, answers; on 127.0.0.1 only.

Starlette on uvicorn: both are small and well maintained, and Starlette checks the Host header. The
path of the page is a secret token. No response depends on the truth, except for the own results of
a reader who has finished.
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
    # data: is for the viewer's font and textures, which its file holds
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
    """What the page gets of a case: a function that reads its NIfTI file, the voxel to mark."""

    volume: Callable[[], bytes]
    mark: tuple[int, int, int] | None


@dataclass(frozen=True)
class Study:
    """What the server needs.

    cases: by opaque id. reader_name: the only reader; None to let the page ask. positive: "real" or
    "synthetic", for the results.
    """

    store: Store
    cases: dict[str, Served]
    reader_name: str | None = None
    positive: str = "real"


class _Endpoints:
    """What the page asks for. Methods that take and return a dict become JSON endpoints."""

    def __init__(self, study: Study):
        self.study, self.store = study, study.store

    def about(self, request: Request) -> Response:
        cases = self.study.cases
        marked = all(case.mark is not None for case in cases.values())
        return JSONResponse(
            {"reader_name": self.study.reader_name, "cases": len(cases), "marked": marked}
        )

    def volume(self, request: Request) -> Response:
        case = self.study.cases.get(request.path_params["case"])
        if case is None:
            raise HTTPException(404)
        return Response(case.volume(), media_type="application/octet-stream")

    def start(self, data: dict[str, Any]) -> dict[str, Any]:
        name = self.study.reader_name if self.study.reader_name is not None else data.get("name")
        if not isinstance(name, str):
            raise Refused("a reader must have a name; enter one")
        reader = self.store.reader(name)
        answers = {a.case: a for a in self.store.answers(reader)}
        cases = [
            {
                "id": case,
                "mark": self.study.cases[case].mark,
                "answer": answers[case].answer if case in answers else None,
                "confidence": answers[case].confidence if case in answers else None,
            }
            for case in self.store.order(reader)
        ]
        return {
            "reader": reader.id,
            "name": reader.name,
            "finished": reader.finished,
            "cases": cases,
        }

    def answer(self, data: dict[str, Any]) -> dict[str, Any]:
        self.store.save(
            self._reader(data),
            str(data.get("case")),
            str(data.get("answer")),
            data.get("confidence"),  # type: ignore[arg-type] # the store checks it
            data.get("seconds"),  # type: ignore[arg-type]
        )
        return {"saved": True}

    def finish(self, data: dict[str, Any]) -> dict[str, Any]:
        reader = self._reader(data)
        if not reader.finished:
            self.store.finish(reader)
        return self.results(data)

    def results(self, data: dict[str, Any]) -> dict[str, Any]:
        """The reader's own results."""
        reader = self._reader(data)
        if not reader.finished:
            raise Refused("results are shown once all cases are answered and the study is closed")
        figures = row(reader.name, self.store.answers(reader), positive=self.study.positive)
        return {"table": table([figures]), "convention": convention(self.study.positive)}

    def _reader(self, data: dict[str, Any]) -> Reader:
        return self.store.reader_of(str(data.get("reader")))


def build_app(study: Study) -> Starlette:
    """Build the application; all its paths begin with /TOKEN/."""
    endpoints = _Endpoints(study)
    routes = [
        Route("/api/study", endpoints.about),
        Route("/api/start", _json_endpoint(endpoints.start), methods=["POST"]),
        Route("/api/answer", _json_endpoint(endpoints.answer), methods=["POST"]),
        Route("/api/finish", _json_endpoint(endpoints.finish), methods=["POST"]),
        Route("/api/results", _json_endpoint(endpoints.results), methods=["POST"]),
        Route("/volume/{case}.nii", endpoints.volume),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    return Starlette(
        routes=[Mount(f"/{study.store.token}", routes=routes)],
        middleware=[
            Middleware(_Headers),
            Middleware(
                TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False
            ),
        ],
    )


def _json_endpoint(
    handle: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[Request], Any]:
    """An endpoint that maps JSON to JSON.

    Other sites cannot send this content type: the browser asks the server first, which refuses.
    """

    async def endpoint(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "the content type must be application/json")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT:
                raise HTTPException(413)
        try:
            data = json.loads(body)
        except ValueError:
            raise HTTPException(400, "the body must be JSON") from None
        if not isinstance(data, dict):
            raise HTTPException(400, "the body must be a JSON object")
        try:
            return JSONResponse(_replace_nonfinite(handle(data)))
        except Refused as error:
            return JSONResponse({"error": str(error)}, status_code=409)

    return endpoint


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _replace_nonfinite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Headers:
    """Middleware that adds HEADERS to every response and removes the times of files."""

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
    """Open a listening socket on 127.0.0.1, so that a browser can connect before `serve`.

    Args:
        port: 0 for a free one.

    Raises:
        ValueError: if the port is in use or out of range.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(
            f"port {port} cannot be opened ({error}); choose another --port"
        ) from error
    return listener


def address(study: Study, listener: socket.socket) -> str:
    """Return the address to open in a browser; it stays the same for the same port."""
    return f"http://{HOST}:{listener.getsockname()[1]}/{study.store.token}/"


def serve(study: Study, listener: socket.socket) -> None:
    """Serve a study until Ctrl-C or SIGTERM.

    Args:
        study: the cases and the store of answers.
        listener: from `listen`.
    """
    config = uvicorn.Config(
        build_app(study),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        lifespan="off",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
