"""An HTTP server for image classification that clients of the Hugging Face Inference API can use.

This is the process: its socket, its threads, the limits on connections, and how it begins and ends.
Requests that come while the models load wait in the listening socket's queue. The routes are in
`service`, what a body may be in `questions`, the models in `served`, their queues in `batching`.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mobilevit_jax import build
from mobilevit_jax.tools import served, service

HEAD_SECONDS, HEAD_BYTES = 10.0, 2**15  # for the lines before a body
CONNECTIONS = 1000
SHUTDOWN_SECONDS = 30


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with limits on a request's head (time and bytes), and on connections.

    Without them, a client that sends a header every few seconds keeps its connection for ever, and
    one that sends them without end fills the memory.
    """

    _waiting: asyncio.TimerHandle | None = None
    _unread = 0  # bytes since the last ones that belong to a body, or that ended a head

    def connection_made(self, transport: Any) -> None:  # uvloop has a class of its own
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unread += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("This is no HTTP request.")
        else:
            if self._unread > HEAD_BYTES:
                self.send_400_response("The lines before or after the body are too long.")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def on_headers_complete(self) -> None:
        self._unread = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()
        elif not self.parser.should_keep_alive():
            raise ValueError("the parser drops all that follows such a head, and does not say so")

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        """Parses; a wish for another protocol (Java's client has one for HTTP/2) is ignored.

        The parser takes what follows such a head for the other protocol's, the body with it. So it
        is given the head once more, without the wish.
        """
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as wish:
                method, version = self.parser.get_method(), self.parser.get_http_version()
                if method == b"CONNECT":  # it has no other meaning
                    raise httptools.HttpParserError from wish
                head = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
                head += [b"%b: %b" % each for each in self.headers if each[0] != b"upgrade"]
                data = b"\r\n".join(head) + b"\r\n\r\n" + data[wish.args[0] :]

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._late)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _late(self) -> None:
        self._waiting = None
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
        proxy_headers=False,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
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
        routes = service.Service(versions, token=token, reload=reload)
        app = routes.application(note=lambda: note(f"serving {', '.join(named)} at {where}"))
        # uvicorn sends itself the signal again when it is done; a finished server exits with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        # All that there is by now stays. Python's collector would look through it every thousand
        # requests or two, and answer nobody meanwhile, for 0.2 s.
        gc.collect()
        gc.freeze()
        run(app, listening)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that a container lends
    return (len(affinity(0)) if affinity else os.cpu_count()) or 1
