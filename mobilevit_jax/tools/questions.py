"""What a request asks, read from its body: an image file, or JSON with one in base64.

Before editing: bodies come from strangers. What they cost is bounded before it is spent: bytes
while they are read (`Bodies`), pixels when the header is decoded (`data.transforms`), waiting
requests when they are accepted (`batching`), and the time for everything that a client sends.
Nothing that a request names is fetched or opened.
"""

import asyncio
import base64
import binascii
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from starlette.requests import Request

TOP = 5  # labels, where a request does not say how many
FUNCTIONS = ("softmax", "sigmoid", "none")
BODY_LIMIT = 16 * 2**20  # bytes of a request
BODIES_LIMIT = 16 * BODY_LIMIT  # of all requests being read or answered
BODY_SECONDS, CHUNK_SECONDS = 60.0, 10.0  # for a body, and without a byte of it
OPENED = re.compile(r"data:[\w/+.;=-]*;base64,")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{64}")  # no image file begins so either


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
        function: one of FUNCTIONS; None for the one that suits the number of classes.
    """

    image: bytes
    top: int
    function: str | None


def is_text(body: bytes) -> bool:
    """Whether `parse` would take a body for JSON or base64, not for an image file."""
    # What the JavaScript client makes of {inputs: "<base64>"}; no image begins as either does.
    return bool(BASE64.match(body)) or body.lstrip()[:1] in (b"{", b"[", b'"')


def parse(body: bytes) -> Question:
    """The question of a body: an image file, or JSON with one in base64.

    Raises:
        Refused: 400, it is neither.
    """
    if not body:
        raise Refused(400, 'the body is empty; send an image file, or {"inputs": "<base64>"}')
    if not is_text(body):
        return Question(body, TOP, None)
    if BASE64.match(body):
        with contextlib.suppress(ValueError):
            return Question(base64.b64decode(body, validate=True), TOP, None)
    try:
        question = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON, and no image: {brief(error)}") from error
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
        raise Refused(400, f"top_k is {brief(top)}; it must be a whole number of 1 or more")
    if function == "default":
        function = None
    if function is not None and function not in FUNCTIONS:
        allowed = ", ".join(FUNCTIONS)
        raise Refused(400, f"function_to_apply is {brief(function)}; allowed: {allowed}, default")
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


def brief(value: object) -> str:
    """A stranger's value as it can stand in an answer."""
    return ascii(value if isinstance(value, str) else str(value))[:80]


class Bodies:
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
        parts: list[bytes] = []
        try:
            await self._collect(request, parts)
            request.state.read = True
            yield b"".join(parts)
        finally:
            self._held -= sum(map(len, parts))

    async def _collect(self, request: Request, parts: list[bytes]) -> None:
        now, size = asyncio.get_running_loop().time, 0
        end = now() + BODY_SECONDS
        try:
            async with asyncio.timeout(CHUNK_SECONDS) as limit:
                async for part in request.stream():
                    size += len(part)
                    self._held += len(part)
                    parts.append(part)
                    if size > BODY_LIMIT:
                        raise _too_long()
                    if self._held > BODIES_LIMIT:
                        raise Refused(429, "too much is being sent at once", {"Retry-After": "1"})
                    limit.reschedule(min(now() + CHUNK_SECONDS, end))
        except TimeoutError:
            raise Refused(408, "the body does not arrive; connect again") from None


def _too_long() -> Refused:
    return Refused(413, f"the body is longer than {BODY_LIMIT:,} bytes")
