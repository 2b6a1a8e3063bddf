"""An HTTP server for image classification that clients of the Hugging Face Inference API can use.

What those clients send, and how they take an answer, decides much here: image bytes come with any
Content-Type or none; the JavaScript client repeats a request answered by 503 at once and for ever,
so overload is 429, and requests that come while the models load wait in the listening socket's
queue; `error` is always one string. Nothing that a request names is fetched or opened.

Before editing: bodies come from strangers. What they cost is bounded before it is spent: bytes
while they are read (`_Bodies`), pixels when the header is decoded (`data.transforms`), waiting
requests when they are accepted (`batching`), and the time for everything that a client sends.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import os
import pathlib
import re
import resource
import signal
import socket
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mobilevit_jax import build
from mobilevit_jax.checkpoint import CheckpointError
from mobilevit_jax.data.record import DataError
from mobilevit_jax.tools import batching, served

TOP = 5  # labels, where a request does not say how many
BODY_LIMIT = 16 * 2**20  # bytes of a request
BODIES_LIMIT = 16 * BODY_LIMIT  # of all requests being read or answered
BODY_SECONDS, CHUNK_SECONDS = 60.0, 10.0  # for a body, and without a byte of it
HEAD_SECONDS = 10.0  # for the lines before a body
CONNECTIONS = 1000
PARTING_SECONDS, PARTING_BYTES = 5.0, 4 * BODY_LIMIT  # of a refused body that are thrown away
SHUTDOWN_SECONDS = 30
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
REQUEST_ID = re.compile(r"[\w=;:./-]{1,128}")
STATM = pathlib.Path("/proc/self/statm")  # Linux
OPENED = re.compile(r"data:[\w/+.;=-]*;base64,")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{64}")  # no image file begins so either
logger = logging.getLogger("mobilevit_jax.serve")

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """A request that is not answered as it hopes."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.headers = status, dict(headers or {})


class Question(NamedTuple):
    """What a request asks.

    Attributes:
        image: the file.
        top: labels.
        function: one of served.FUNCTIONS; None for the one that suits the number of classes.
    """

    image: bytes
    top: int
    function: str | None


# --- requests -------------------------------------------------------------------------------------


def parse(body: bytes) -> Question:
    """The question of a body: an image file, or JSON with one in base64.

    Raises:
        Refused: 400, it is neither.
    """
    if not body:
        raise Refused(400, 'the body is empty; send an image file, or {"inputs": "<base64>"}')
    if BASE64.match(body):  # what the JavaScript client makes of {inputs: "<base64>"}
        with contextlib.suppress(ValueError):
            return Question(base64.b64decode(body, validate=True), TOP, None)
    if body.lstrip()[:1] not in (b"{", b"[", b'"'):  # no image begins so
        return Question(body, TOP, None)
    try:
        question = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON, and no image: {_brief(error)}") from error
    if not isinstance(question, dict):
        raise Refused(400, 'the body must be an image file, or {"inputs": "<base64>"}')
    parameters = question.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise Refused(400, f'parameters must be an object such as {{"top_k": {TOP}}}')
    top, function = parameters.get("top_k"), parameters.get("function_to_apply")
    if top is None:
        top = TOP
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise Refused(400, f"top_k is {_brief(top)}; it must be a whole number of 1 or more")
    if function == "default":
        function = None
    if function is not None and function not in served.FUNCTIONS:
        allowed = ", ".join(served.FUNCTIONS)
        raise Refused(400, f"function_to_apply is {_brief(function)}; allowed: {allowed}, default")
    inputs = question["inputs"] if "inputs" in question else question.get("image")
    return Question(_decode_base64(inputs), top, function)


def _decode_base64(text: object) -> bytes:
    if not isinstance(text, str) or not text:
        raise Refused(400, "inputs must be an image file in base64, as text")
    match = OPENED.match(text)
    text = "".join(text[match.end() if match else 0 :].split())
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise Refused(
            400,
            "inputs is no base64; addresses and paths are not fetched: send the image itself",
        ) from error


def _brief(value: object) -> str:
    return ascii(value if isinstance(value, str) else str(value))[:80]


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


class _Bodies:
    """Reads bodies, with bounds on each and on all of them together."""

    def __init__(self) -> None:
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, held until the context ends.

        Raises:
            Refused: 408, 413, 415 or 429.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "the body is compressed; send it as it is")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > BODY_LIMIT:
            raise _too_long()
        parts, size, begin = [], 0, time.monotonic()
        stream = request.stream()
        try:
            while True:
                left = begin + BODY_SECONDS - time.monotonic()
                try:
                    async with asyncio.timeout(max(0.0, min(left, CHUNK_SECONDS))):
                        part = await anext(stream, b"")
                except TimeoutError:
                    raise Refused(408, "the body does not arrive; connect again") from None
                if not part:
                    break
                size += len(part)
                self._held += len(part)
                parts.append(part)
                if size > BODY_LIMIT:
                    raise _too_long()
                if self._held > BODIES_LIMIT:
                    raise Refused(429, "too much is being sent at once", {"Retry-After": "1"})
            request.state.read = True
            yield b"".join(parts)
        finally:
            self._held -= size


def _too_long() -> Refused:
    return Refused(413, f"the body is longer than {BODY_LIMIT:,} bytes")


# --- the application ------------------------------------------------------------------------------


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
        self._bodies, self._metrics = _Bodies(), _Metrics()
        self._page = _text("serve.html")

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
            except Refused as refusal:
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
            response.headers["x-compute-time"] = f"{seconds:.3f}"
            response.headers["x-compute-type"] = jax.default_backend()
            response.headers["x-request-id"] = request_id
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
            raise Refused(
                401,
                f"{what}; send the header Authorization: Bearer <token>",
                {"WWW-Authenticate": "Bearer"},
            )

    def _version(self, request: Request) -> tuple[str, served.Version]:
        name = request.path_params.get("id")
        name = next(iter(self.versions)) if name is None else name.strip("/")
        if name not in self.versions:
            known = ", ".join(self.versions)
            raise Refused(404, f"there is no model {_brief(name)}; served here: {known}")
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
                raise Refused(400, f"{name} has no attention to show")
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
                raise Refused(409, f"{name} stays as it is: {' '.join(str(error).split())}") from (
                    error
                )
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
        backend = jax.default_backend()
        status = {"loaded": True, "state": "Loaded", "compute_type": backend, "framework": "jax"}
        return JSONResponse(status)

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
    return uuid.uuid4().hex


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is nothing at {_brief(request.url.path)}; see /openapi.json"}
    text = known.get(error.status_code, f"{request.method} is not for this address")
    return JSONResponse({"error": text}, error.status_code, error.headers)


async def _parsed(body: bytes) -> Question:
    # A long text of base64 takes tens of milliseconds: not on the thread of all connections.
    return await asyncio.to_thread(parse, body) if len(body) > 2**16 else parse(body)


def _submitted(submit: Callable[[bytes], T], image: bytes) -> T:
    try:
        return submit(image)
    except batching.Overloaded as error:
        raise Refused(429, str(error), {"Retry-After": str(error.retry_after)}) from error


async def _result(request: Request, future: Future[Any]) -> Any:
    """What the future gives; cancelled if the client goes away first."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            raise ClientDisconnect
        return answer.result()
    except DataError as error:
        raise Refused(400, str(error)) from error
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _labels(version: served.Version, scores: np.ndarray, top: int) -> list[dict[str, Any]]:
    labels = version.loaded.pretrained.labels
    order = np.argsort(-scores, kind="stable")[:top]
    return [{"label": labels[i], "score": float(scores[i])} for i in order]


class _Metrics:
    """Counts of requests, as Prometheus reads them."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def count(self, route: str, status: int, seconds: float) -> None:
        """Counts a request by the route's pattern, which strangers cannot make longer."""
        key = (route, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._seconds[route] = self._seconds.get(route, 0.0) + seconds
        buckets = self._buckets.setdefault(route, [0] * (len(BUCKETS) + 1))
        buckets[next((i for i, most in enumerate(BUCKETS) if seconds <= most), len(BUCKETS))] += 1

    def text(self, models: Mapping[str, batching.Counts]) -> str:
        """Prometheus' text format, version 0.0.4."""
        lines = ["# TYPE mobilevit_requests_total counter"]
        for (route, status), count in sorted(self._requests.items()):
            labels = f"route={json.dumps(route)},status={json.dumps(str(status))}"
            lines.append(f"mobilevit_requests_total{{{labels}}} {count}")
        lines.append("# TYPE mobilevit_request_seconds histogram")
        for route, buckets in sorted(self._buckets.items()):
            name, total = f"route={json.dumps(route)}", 0
            for most, count in zip((*BUCKETS, "+Inf"), buckets, strict=True):
                total += count
                lines.append(f'mobilevit_request_seconds_bucket{{{name},le="{most}"}} {total}')
            lines.append(f"mobilevit_request_seconds_sum{{{name}}} {self._seconds[route]}")
            lines.append(f"mobilevit_request_seconds_count{{{name}}} {total}")
        for what, kind, value in (
            ("waiting_requests", "gauge", lambda counts: counts.waiting),
            ("images_total", "counter", lambda counts: counts.images),
            ("batch_seconds_total", "counter", lambda counts: counts.seconds),
            ("failed_batches_total", "counter", lambda counts: counts.failed),
        ):
            lines.append(f"# TYPE mobilevit_{what} {kind}")
            for model, counts in models.items():
                lines.append(f"mobilevit_{what}{{model={json.dumps(model)}}} {value(counts)}")
        lines.append("# TYPE mobilevit_batches_total counter")
        for model, counts in models.items():
            for size, count in counts.batches.items():
                labels = f'model={json.dumps(model)},size="{size}"'
                lines.append(f"mobilevit_batches_total{{{labels}}} {count}")
        if STATM.is_file():
            memory = int(STATM.read_text().split()[1]) * resource.getpagesize()
            lines += [
                "# TYPE process_resident_memory_bytes gauge",
                f"process_resident_memory_bytes {memory}",
            ]
        return "\n".join(lines) + "\n"


# --- the process ----------------------------------------------------------------------------------


class _Protocol(H11Protocol):
    """uvicorn's, with a limit on the time for a request's head, and on connections.

    Without it, a client that sends a header every few seconds keeps its connection for ever.
    """

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # uvloop has a class of its own
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def _unwatch(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: there is no such address, or it is taken.
    """
    if not 0 <= port < 2**16:  # the system would take a larger one modulo 65,536
        raise build.ConfigError(f"port {port} is not between 0 and 65,535; give another --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(2048)
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise build.ConfigError(
            f"cannot listen at {host}:{port} ({error}); give another --host or --port"
        ) from error
    return listening


def run(app: Starlette, listening: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what it has accepted."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=2**15,
    )
    uvicorn.Server(config).run([listening])


def serve(
    references: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_batch: int = 16,
    max_delay: float = 0.005,
    max_waiting: int = 128,
    weights: str = "ema",
    checkpoint: str = "newest",
    note: Callable[[str], None] = print,
) -> None:
    """Serves models over HTTP until the process is told to end.

    The socket listens from the beginning: what connects while the models load is answered as soon
    as they are warm.

    Args:
        references: of models, see `pretrained`; the first one answers where none is named.
        host: address to listen at.
        port: 0 for any that is free.
        token: that requests must bear; None for none.
        max_batch: images computed at once; also every power of two below it is compiled.
        max_delay: seconds that an image waits at most for others that are on their way.
        max_waiting: requests accepted and not answered, of each model; more are answered by 429.
        weights: of runs, "ema" or "raw".
        checkpoint: of runs, "newest", "best" or a step.
        note: called with a line when it is ready, and about what takes long before.

    Raises:
        ConfigError, CheckpointError: as `pretrained.load`; two models have one name; the address
            cannot be listened at.
    """
    named: dict[str, str] = {}
    for reference in references:
        name = served.identify(reference)
        if name in named:
            raise build.ConfigError(
                f"{named[name]} and {reference} would both be called {name}; rename one"
            )
        named[name] = reference
    if token is not None and (not token or not token.isascii() or token != token.strip()):
        raise build.ConfigError("the token must be of ASCII characters, without spaces around it")
    sizes = sorted({*(2**i for i in range(max_batch.bit_length())), max_batch})
    decoders = ThreadPoolExecutor(_cores(), thread_name_prefix="decode")
    how = {
        "weights": weights,
        "checkpoint": checkpoint,
        "sizes": tuple(sizes),
        "note": note,
        "max_delay": max_delay,
        "max_waiting": max_waiting,
        "decoders": decoders,
    }
    # Strangers' pictures are no concern of the server's log.
    warnings.filterwarnings("ignore", module="PIL")

    def reload(name: str, old: served.Version) -> served.Version:
        return served.load(named[name], before=old.programs, **how)

    with listen(host, port) as listening, decoders:
        versions = {name: served.load(reference, **how) for name, reference in named.items()}
        at, bound = listening.getsockname()[:2]
        where = f"http://[{at}]:{bound}" if ":" in at else f"http://{at}:{bound}"
        service = Service(versions, token=token, reload=reload)
        app = service.application(note=lambda: note(f"serving {', '.join(named)} at {where}"))
        # uvicorn sends itself the signal again when it is done; a finished server exits with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        run(app, listening)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that a container lends
    return (len(affinity(0)) if affinity else os.cpu_count()) or 1
