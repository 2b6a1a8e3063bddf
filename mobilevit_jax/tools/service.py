"""The routes of the server: an ASGI application that asks the models.

Their addresses and answers are those of the Hugging Face Inference API. What its clients send, and
how they take an answer, decides much here: image bytes come with any Content-Type or none; the
JavaScript client repeats a request answered by 503 at once and for ever, so overload is 429;
`error` is always one string.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from importlib import resources
from typing import Any, TypeVar

import jax
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mobilevit_jax import build
from mobilevit_jax.checkpoint import CheckpointError
from mobilevit_jax.data.record import DataError
from mobilevit_jax.tools import batching, prometheus, questions, served

PARTING_SECONDS, PARTING_BYTES = 5.0, 4 * questions.BODY_LIMIT  # of a refused body, thrown away
REQUEST_ID = re.compile(r"[\w=;:./-]{1,128}")
logger = logging.getLogger("mobilevit_jax.serve")

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """The routes, and what they share.

    Attributes:
        versions: what answers for each model, by its id. The first one answers where none is named.
    """

    def __init__(
        self,
        versions: Mapping[str, served.Version],
        *,
        token: str | None = None,
        reload: Callable[[str, served.Version], served.Version],
    ) -> None:
        self.versions = dict(versions)
        self._token, self._reload = token, reload
        self._locks = {name: asyncio.Lock() for name in versions}
        self._bodies, self._metrics = questions.Bodies(), prometheus.Requests()
        self._page, self._device = _text("serve.html"), jax.default_backend()

    def application(self, *, note: Callable[[], None] = lambda: None) -> Starlette:
        """The ASGI application; `note` is called when it begins, and versions close as it ends."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            note()
            yield
            for version in self.versions.values():
                await asyncio.to_thread(version.close)

        classify: dict[str, Handler] = {"POST": self._classify}
        attend: dict[str, Handler] = {"POST": self._attend}
        rows: tuple[tuple[str, dict[str, Handler]], ...] = (
            ("/", {"GET": self._front, **classify}),
            ("/predict", classify),
            ("/attention", attend),
            ("/health", {"GET": self._health}),
            ("/info", {"GET": self._info}),
            ("/models", {"GET": self._info}),
            ("/metrics", {"GET": self._scrape}),
            ("/openapi.json", {"GET": self._openapi}),
            ("/status/{id:path}", {"GET": self._status}),
            ("/hf-inference/models/{id:path}", classify),
            ("/models/{id:path}/health", {"GET": self._health}),
            ("/models/{id:path}/attention", attend),
            ("/models/{id:path}/reload", {"POST": self._exchange}),
            ("/models/{id:path}", {"GET": self._card, **classify}),
        )
        cors = Middleware(
            CORSMiddleware,
            allow_origins=["*"],
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=["x-compute-time", "x-compute-type", "x-request-id", "retry-after"],
        )
        return Starlette(
            routes=[
                Route(path, self._answer(path, handlers), methods=[*handlers])
                for path, handlers in rows
            ],
            middleware=[cors],
            exception_handlers={HTTPException: _no_route},
            lifespan=lifespan,
        )

    def _answer(self, path: str, handlers: Mapping[str, Handler]) -> Handler:
        """A handler by method, with all that can go wrong as an answer, counted, with an id."""

        async def answer(request: Request) -> Response:
            handler = handlers["GET" if request.method == "HEAD" else request.method]
            begin, request_id = time.monotonic(), _request_id(request)
            try:
                if handler not in (self._front, self._health, self._openapi):
                    self._authorize(request)
                response = await handler(request)
            except questions.Refused as refusal:
                unread = request.method == "POST" and not getattr(request.state, "read", False)
                kind = _Parting if unread else JSONResponse
                response = kind({"error": str(refusal)}, refusal.status, refusal.headers)
            except ClientDisconnect:
                response = Response(status_code=499)  # nginx's number; nobody reads it
            except Exception:
                logger.exception("request %s failed", request_id)
                error = f"internal error; the server's log has more about request {request_id}"
                response = JSONResponse({"error": error}, 500)
            seconds = time.monotonic() - begin
            self._metrics.count(path, response.status_code, seconds)
            response.raw_headers += [
                (b"x-compute-time", b"%.3f" % seconds),
                (b"x-compute-type", self._device.encode()),
                (b"x-request-id", request_id.encode("latin-1")),
            ]
            return response

        return answer

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Header values are latin-1; both sides as bytes, compared in constant time.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode())
        if scheme.lower() != "bearer" or not right:
            what = "the token is wrong" if given else "a token is missing"
            raise questions.Refused(
                401,
                f"{what}; send the header Authorization: Bearer <token>",
                {"WWW-Authenticate": "Bearer"},
            )

    def _version(self, request: Request) -> tuple[str, served.Version]:
        name = request.path_params.get("id")
        name = next(iter(self.versions)) if name is None else name.strip("/")
        if name not in self.versions:
            known = ", ".join(self.versions)
            raise questions.Refused(
                404, f"there is no model {questions.brief(name)}; served here: {known}"
            )
        return name, self.versions[name]

    async def _classify(self, request: Request) -> Response:
        self._version(request)  # an unknown one needs no body
        async with self._bodies.read(request) as body:
            question = await _parsed(body)
            _, version = self._version(request)
            logits = await _result(request, _submitted(version.classify, question.image))
        function = question.function or ("softmax" if len(logits) > 1 else "sigmoid")
        return JSONResponse(_labels(version, served.scores(logits, function), question.top))

    async def _attend(self, request: Request) -> Response:
        self._version(request)
        async with self._bodies.read(request) as body:
            question = await _parsed(body)
            name, version = self._version(request)
            future = _submitted(version.attend, question.image)
            if future is None:
                raise questions.Refused(400, f"{name} has no attention to show")
            seen: served.Attention = await _result(request, future)
            left, top, width, height = await asyncio.to_thread(version.shown, question.image)
        blocks = [
            {"name": name, "size": values.shape, "relative": values.round(3).tolist()}
            for name, values in seen.maps.items()
        ]
        return JSONResponse(
            {
                "labels": _labels(version, seen.probability, question.top),
                "shown": {"left": left, "top": top, "width": width, "height": height},
                "attention": blocks,
            }
        )

    async def _exchange(self, request: Request) -> Response:
        name, _ = self._version(request)
        async with self._locks[name]:
            old = self.versions[name]
            try:
                new = await asyncio.to_thread(self._reload, name, old)
            except (build.ConfigError, CheckpointError, OSError) as error:
                raise questions.Refused(
                    409, f"{name} stays as it is: {' '.join(str(error).split())}"
                ) from error
            # Exchanged on this thread, so that no request is between finding and asking it.
            self.versions[name] = new
            await asyncio.to_thread(old.close)
        return JSONResponse(served.card(new, name))

    async def _front(self, request: Request) -> Response:
        return HTMLResponse(self._page)

    async def _health(self, request: Request) -> Response:
        self._version(request)
        return JSONResponse({"status": "ok"})

    async def _info(self, request: Request) -> Response:
        cards = [served.card(version, name) for name, version in self.versions.items()]
        return JSONResponse({"models": cards})

    async def _card(self, request: Request) -> Response:
        name, version = self._version(request)
        labels = version.loaded.pretrained.labels
        return JSONResponse({**served.card(version, name), "labels": labels})

    async def _status(self, request: Request) -> Response:
        self._version(request)
        status = {"loaded": True, "state": "Loaded", "framework": "jax"}
        return JSONResponse({**status, "compute_type": self._device})

    async def _scrape(self, request: Request) -> Response:
        counts = {name: version.counts() for name, version in self.versions.items()}
        text = self._metrics.text(counts)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        description = json.loads(_text("serve_openapi.json"))
        description["components"]["parameters"]["id"]["schema"]["enum"] = [*self.versions]
        return JSONResponse(description)


def _text(name: str) -> str:
    return resources.files("mobilevit_jax.tools").joinpath(name).read_text(encoding="utf-8")


def _request_id(request: Request) -> str:
    for header in ("x-request-id", "x-amzn-trace-id"):
        if REQUEST_ID.fullmatch(given := request.headers.get(header, "")):
            return given
    return os.urandom(16).hex()


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is nothing at {questions.brief(request.url.path)}; see /openapi.json"}
    text = known.get(error.status_code, f"{request.method} is not for this address")
    return JSONResponse({"error": text}, error.status_code, error.headers)


async def _parsed(body: bytes) -> questions.Question:
    # A long text of base64 takes tens of milliseconds: not on the thread of all connections.
    if len(body) > 2**16 and questions.is_text(body):
        return await asyncio.to_thread(questions.parse, body)
    return questions.parse(body)


def _submitted(submit: Callable[[bytes], T], image: bytes) -> T:
    try:
        return submit(image)
    except batching.Overloaded as error:
        raise questions.Refused(429, str(error), {"Retry-After": str(error.retry_after)}) from error


async def _result(request: Request, future: Future[Any]) -> Any:
    """What the future gives; cancelled if the client goes away first."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_gone(request))
    gone.add_done_callback(lambda _: answer.cancel())
    try:
        return await answer
    except asyncio.CancelledError:
        if gone.done():
            raise ClientDisconnect from None
        raise
    except DataError as error:
        raise questions.Refused(400, str(error)) from error
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _labels(version: served.Version, scores: np.ndarray, top: int) -> list[dict[str, Any]]:
    labels = version.loaded.pretrained.labels
    best = np.arange(len(scores))
    if top < len(scores):  # to sort them all takes as long as the rest of an answer
        best = np.flatnonzero(scores >= np.partition(scores, -top)[-top])
    order = best[np.argsort(-scores[best], kind="stable")[:top]]
    return [{"label": labels[i], "score": float(scores[i])} for i in order]


class _Parting(JSONResponse):
    """An answer to a request whose body is not wanted any more.

    Were the connection closed at once, the client's system would throw the answer away with the
    bytes it could not send; so a part of them is taken and dropped.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        dropped, more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                while more and dropped < PARTING_BYTES:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    more = message.get("more_body", False)  # a disconnect has no more
        await send({"type": "http.response.body", "body": b"", "more_body": False})
