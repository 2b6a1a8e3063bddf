"""The server over loopback, as its clients see it: a real process, and one in a thread for faults.

The long forms need packages that the suite does without: several versions of huggingface_hub, each
in a directory of its own under $HUB_VERSIONS (pip install --target), node_modules with
@huggingface/inference in $NODE_MODULES, and schemathesis' program `st` as $SCHEMATHESIS.
"""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import uvicorn
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from PIL import Image

import launch
from mobilevit_jax import checkpoint
from mobilevit_jax.tools import predict, pretrained, questions, serve, served, service
from tests.weights import LABELS

ROOT = pathlib.Path(__file__).parent.parent.parent
TOKEN = "a-secret"
RUN, OTHER = "flowers", "flowers-native"
PNG = b"\x89PNG\r\n\x1a\n"


def encoded(seed=0, size=(70, 90), kind="jpeg", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size[::-1]).save(file, kind, **options)
    return file.getvalue()


JPEG = encoded()


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    @property
    def error(self):
        assert set(self.json) == {"error"}
        assert isinstance(self.json["error"], str)
        return self.json["error"]


def ask(url, body=None, *, token=TOKEN, method=None, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    method = method or ("GET" if body is None else "POST")
    host, _, path = url.removeprefix("http://").partition("/")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        connection.request(method, f"/{path}", body, headers)
        response = connection.getresponse()
        return Reply(response.status, response.headers, response.read())


@contextlib.contextmanager
def process(*argv, **environment):
    """A server as users start it; gives the process and its address."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "launch.py", "serve", *map(str, argv), "--port=0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if match := re.search(r" at (http://\S+)$", line.strip()):
                    break
            else:
                pytest.fail(f"the server ended: {said}")
            yield server, match[1]
        finally:
            server.kill()


@pytest.fixture(scope="module")
def both(workdir, native, tmp_path_factory):
    """A run that tests may change, and a converted model."""
    return shutil.copytree(workdir, tmp_path_factory.mktemp("served") / RUN), native


@pytest.fixture(scope="module")
def url(both):
    with process(*both, "--max-batch=4", MOBILEVIT_TOKEN=TOKEN) as (_, address):
        yield address


@pytest.fixture(scope="module")
def version(both):
    """The run, in this process."""
    with concurrent.futures.ThreadPoolExecutor(2) as decoders:
        version = served.load(
            str(both[0]),
            weights="ema",
            checkpoint="newest",
            sizes=(1, 2),
            max_delay=0.0,
            max_waiting=4,
            decoders=decoders,
            note=print,
        )
        yield version
        version.close()


@pytest.fixture
def threaded(version):
    """A server in a thread, whose parts a test can break."""
    routes = service.Service({RUN: version}, reload=lambda name, old: old)
    config = uvicorn.Config(
        routes.application(), http=serve._Protocol, loop="asyncio", log_config=None, lifespan="off"
    )
    server = uvicorn.Server(config)
    with serve.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def expected(both, tmp_path_factory):
    """What `predict` says of JPEG."""
    path = tmp_path_factory.mktemp("images") / "x.jpg"
    path.write_bytes(JPEG)
    (said,) = predict.predict(pretrained.load(both[0]), [path], top=len(LABELS))
    return said.labels


def check(answer, expected, count=5):  # the default, and as many as there are
    assert [each["label"] for each in answer] == [label for label, _ in expected][:count]
    for each, (_, score) in zip(answer, expected, strict=False):
        assert each["score"] == pytest.approx(score, rel=1e-4)


def question(image=JPEG, **parameters):
    return json.dumps({"inputs": base64.b64encode(image).decode(), "parameters": parameters})


# --- clients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["", "predict", f"models/{RUN}", f"models/{OTHER}", f"hf-inference/models/{RUN}"]
)
def test_every_route_answers_alike(url, expected, path):
    for kind in ("image/jpeg", "application/x-www-form-urlencoded", "application/json", "x"):
        reply = ask(f"{url}/{path}", JPEG, content_type=kind)
        assert reply.status == 200
        check(reply.json, expected)
    assert float(reply.headers["x-compute-time"]) > 0
    assert reply.headers["x-compute-type"] == "cpu"


def test_python_client(url, expected, tmp_path):
    client = InferenceClient(model=f"{url}/models/{RUN}", token=TOKEN)
    check([vars(each) for each in client.image_classification(JPEG)], expected)
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG)
    said = client.image_classification(path, top_k=2)
    assert len(said) == 2
    check([vars(each) for each in said], expected, count=2)
    with pytest.raises(BadRequestError, match="cannot decode the image"):
        client.image_classification(b"no image")
    with pytest.raises(HfHubHTTPError, match="the token is wrong"):
        InferenceClient(model=url, token="other").image_classification(JPEG)


@pytest.mark.long
@pytest.mark.parametrize("hub", ["0.25.2", "0.36.2", "1.33.0", "2.4.0"])
def test_versions_of_the_python_client(url, expected, hub, tmp_path):
    if "HUB_VERSIONS" not in os.environ:
        pytest.skip("HUB_VERSIONS names no directory of versions of huggingface_hub")
    program = """if True:
        import json, pathlib, sys
        import huggingface_hub
        assert huggingface_hub.__version__ == sys.argv[4]
        from huggingface_hub import InferenceClient
        client = InferenceClient(model=sys.argv[1], token=sys.argv[2])
        path = pathlib.Path(sys.argv[3])
        found = [client.image_classification(image) for image in (path, path.read_bytes())]
        if sys.argv[4] != "0.25.2":
            found.append(client.image_classification(path, top_k=5, function_to_apply="softmax"))
        try:
            client.image_classification(b"no image")
        except Exception as error:
            found.append(type(error).__name__)
        print(json.dumps([[[e.label, e.score] for e in said] if isinstance(said, list) else said
                          for said in found]))
    """
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG)
    command = [sys.executable, "-c", program, f"{url}/models/{RUN}", TOKEN, str(path), hub]
    where = pathlib.Path(os.environ["HUB_VERSIONS"]) / hub
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(where)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *found, refused = json.loads(done.stdout)
    for said in found:
        check([{"label": label, "score": score} for label, score in said], expected)
    assert refused == "BadRequestError"


@pytest.mark.long
def test_javascript_client(url, expected, tmp_path):
    modules = os.environ.get("NODE_MODULES")
    if not modules or not shutil.which("node"):
        pytest.skip("NODE_MODULES names no directory with @huggingface/inference")
    program = tmp_path / "client.mjs"
    program.write_text("""
        import { readFileSync } from "node:fs";
        import { InferenceClient } from "@huggingface/inference";
        const [url, token, path] = process.argv.slice(2);
        const data = new Blob([readFileSync(path)], { type: "image/jpeg" });
        const found = [];
        const client = new InferenceClient(token);
        found.push(await client.endpoint(url).imageClassification({ data }));
        found.push(await client.imageClassification({ endpointUrl: url, data }));
        found.push(await client.endpoint(url).imageClassification({ inputs: data }));
        const inputs = readFileSync(path).toString("base64");
        found.push(await client.endpoint(url).imageClassification(
            { inputs, parameters: { top_k: 5 } }));
        const answer = await fetch(url, {
            method: "POST", body: data, headers: { Authorization: `Bearer ${token}` } });
        found.push(await answer.json());
        try { await client.endpoint(url).imageClassification({ data: new Blob(["x"]) }); }
        catch (error) { found.push(error.message); }
        console.log(JSON.stringify(found));
    """)
    (tmp_path / "node_modules").symlink_to(pathlib.Path(modules).resolve())
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG)
    command = ["node", program, f"{url}/models/{RUN}", TOKEN, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *found, refused = json.loads(done.stdout)
    assert len(found) == 5
    for said in found:
        check(said, expected)
    assert "cannot decode the image" in refused


def test_curl_and_urllib(url, expected, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG)
    header = {"Authorization": f"Bearer {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(url, JPEG, header), timeout=60) as reply:
        check(json.load(reply), expected)
    if shutil.which("curl"):
        command = ["curl", "-sf", "-H", f"Authorization: Bearer {TOKEN}", url]
        said = subprocess.check_output([*command, "--data-binary", f"@{path}"])
        check(json.loads(said), expected)
        chunked = [*command, "--data-binary", "@-", "-H", "Transfer-Encoding: chunked"]
        check(json.loads(subprocess.check_output(chunked, input=JPEG)), expected)


def test_browsers(url):
    asks = {"origin": "https://example.org", "access_control_request_method": "POST"}
    wants = {"access_control_request_headers": "authorization,content-type"}
    reply = ask(url, method="OPTIONS", token=None, **asks, **wants)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    for body, status in ((JPEG, 200), (b"x", 400)):
        reply = ask(url, body, origin="https://example.org")
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == "*"
        assert "x-compute-time" in reply.headers["access-control-expose-headers"]


def test_parameters(url, expected):
    for top in (1, 2, 5, 6, 10**9):
        check(ask(url, question(top_k=top)).json, expected, count=min(top, len(LABELS)))
    logits = [each["score"] for each in ask(url, question(function_to_apply="none")).json]
    scores = [each["score"] for each in ask(url, question(function_to_apply="sigmoid")).json]
    assert scores == pytest.approx([1 / (1 + np.exp(-each)) for each in logits], rel=1e-5)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert list(probabilities) == pytest.approx([score for _, score in expected], rel=1e-4)
    text = base64.b64encode(JPEG).decode()
    for body in (
        question(),
        question(function_to_apply="default", top_k=None),
        json.dumps({"image": text, "parameters": None, "options": {"wait_for_model": True}}),
        json.dumps({"inputs": f"data:image/jpeg;base64,{text}"}),
        text,
        " \n" + json.dumps({"inputs": "\n".join(re.findall(".{1,76}", text))}),
    ):
        check(ask(url, body).json, expected)


def test_pictures_are_turned_upright(url):
    pixels = np.zeros((90, 60, 3), np.uint8)
    pixels[:30] = 255, 60, 0
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored must be turned clockwise
    files = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(pixels).save(files[0], "png")
    Image.fromarray(np.rot90(pixels)).save(files[1], "png", exif=exif)
    first, second = (ask(url, file.getvalue()).json for file in files)
    assert first == second


def test_photographs_are_answered_as_predict_does(url, both, photographs):
    said = predict.predict(pretrained.load(both[0]), photographs, top=5)
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        replies = clients.map(lambda path: ask(url, path.read_bytes()), photographs)
        for reply, each in zip(replies, said, strict=True):
            check(reply.json, each.labels)


# --- what else there is to know -------------------------------------------------------------------


def test_health_status_and_cards(url):
    for path in ("health", f"models/{RUN}/health"):
        assert ask(f"{url}/{path}", token=None).json == {"status": "ok"}
    status = {"loaded": True, "state": "Loaded", "compute_type": "cpu", "framework": "jax"}
    assert ask(f"{url}/status/{RUN}").json == status
    cards = ask(f"{url}/info").json["models"]
    assert [each["id"] for each in cards] == [RUN, OTHER]
    card = ask(f"{url}/models/{RUN}").json
    assert card.pop("labels") == list(LABELS)
    assert card == cards[0]
    assert card["input"]["size"] == [64, 64]
    assert card["metrics"]["top1"] == 0.75
    assert card["source"]["step"] == 7
    assert set(card["batch_milliseconds"]) == {"1", "2", "4"}
    page = ask(url, token=None)
    assert page.headers["content-type"].startswith("text/html")
    assert b"http" not in re.sub(rb"http://www.w3.org/\S+", b"", page.body)  # no network


def test_metrics(url):
    def value(name):
        text = ask(f"{url}/metrics").body.decode()
        (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        return float(line.split()[-1])

    name = f'mobilevit_images_total{{model="{OTHER}"}}'
    before = value(name)
    ask(f"{url}/models/{OTHER}", JPEG)
    assert value(name) == before + 1
    assert value(f'mobilevit_waiting_requests{{model="{OTHER}"}}') == 0
    bucket = 'mobilevit_request_seconds_bucket{route="/models/{id:path}",le="+Inf"}'
    assert value(bucket) == value('mobilevit_request_seconds_count{route="/models/{id:path}"}') > 0
    assert value("process_resident_memory_bytes") > 10**8


def test_attention(url, expected):
    reply = ask(f"{url}/models/{RUN}/attention", JPEG).json
    check(reply["labels"], expected)
    assert [each["size"] for each in reply["attention"]] == [[8, 8], [4, 4], [2, 2]]
    for each in reply["attention"]:
        values = np.array(each["relative"])
        assert values.shape == tuple(each["size"])
        assert values.mean() == pytest.approx(1, abs=0.01)  # of average
    # 70x90 becomes 72x92, of which the middle is seen.
    assert reply["shown"] == pytest.approx(
        {"left": 14 / 92, "top": 4 / 72, "width": 64 / 92, "height": 64 / 72}
    )


def test_request_ids(url):
    assert ask(url, JPEG, x_amzn_trace_id="Root=1-67").headers["x-request-id"] == "Root=1-67"
    given = ask(url, JPEG, x_request_id="a b").headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)


def test_description_names_every_route(url):
    described = ask(f"{url}/openapi.json").json["paths"]
    text = ask(f"{url}/metrics").body.decode()
    for path in re.findall(r'mobilevit_requests_total\{route="([^"]+)"', text):
        assert path.replace(":path", "") in described


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b"no image", "unknown format"),
        (JPEG[: len(JPEG) // 2], "cannot decode the image"),
        (encoded(kind="png")[:60], "cannot decode the image"),
        (PNG + b"\0\0\0\rIHDR" + b"\0\1\0\0\0\1\0\0\x08\x02\0\0\0" + b"x" * 99, "the image"),
        (b'{"inputs": ', "the body is no JSON"),
        (b'{"inputs": "\xff"}', "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", "must be an image file, or"),
        (b'"abc"', "must be an image file, or"),
        (b"{}", "in base64, as text"),
        (b'{"inputs": ["a"]}', "in base64, as text"),
        (b'{"inputs": ""}', "in base64, as text"),
        (b'{"inputs": "a"}', "not fetched"),
        (b'{"inputs": "http://127.0.0.1:1/x.jpg"}', "not fetched"),
        (b'{"inputs": "/etc/hostname"}', "the image|not fetched"),
        (b'{"inputs": "file:///etc/passwd"}', "not fetched"),
        (question(b"no image"), "unknown format"),
        (question(top_k=0), "top_k is '0'"),
        (question(top_k=-1), "top_k is '-1'"),
        (question(top_k="2"), "top_k is '2'"),
        (question(top_k=2.0), "top_k is '2.0'"),
        (question(top_k=True), "top_k is 'True'"),
        (question(top_k=float("nan")), "top_k is 'nan'"),
        (question(function_to_apply="tanh"), "function_to_apply is 'tanh'"),
        (question(function_to_apply=[1]), "function_to_apply is"),
        (b'{"inputs": "AAAA", "parameters": [1]}', "parameters must be"),
    ],
)
def test_bad_bodies(url, body, message):
    for path in ("", "attention"):
        reply = ask(f"{url}/{path}", body)
        assert reply.status == 400
        assert re.search(message, reply.error)


def test_addresses_methods_and_tokens(url):
    assert f"served here: {RUN}, {OTHER}" in ask(f"{url}/models/none", JPEG).error
    for path in ("models/none", "status/none", "nothing", "models/none/health"):
        assert ask(f"{url}/{path}").status == 404
    for method in ("PUT", "DELETE", "PATCH", "TRACE"):
        reply = ask(url, JPEG, method=method)
        assert reply.status == 405
        assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
        assert method in reply.error
    for token, message in ((None, "missing"), ("x", "wrong"), ("ö", "wrong"), (TOKEN + "x", "w")):
        for path in ("", "info", "metrics", f"models/{RUN}/reload"):
            reply = ask(f"{url}/{path}", None if path in ("info", "metrics") else JPEG, token=token)
            assert reply.status == 401
            assert message in reply.error
            assert reply.headers["www-authenticate"] == "Bearer"
    assert ask(url, JPEG, token=None, Authorization=f"Basic {TOKEN}").status == 401
    assert ask(url, JPEG, token=None, Authorization=f"bearer {TOKEN}").status == 200
    assert ask(url, JPEG, content_encoding="gzip").status == 415


def test_long_bodies_are_cut_off(url):
    too_long = b"x" * (questions.BODY_LIMIT + 1)
    assert "longer than" in ask(url, too_long).error
    # Of one that does not say how long it is, too, and no more than needed is read.
    reply = ask(url, (too_long[: 2**20] for _ in range(17)))
    assert reply.status == 413
    assert reply.headers["connection"] == "close"


def test_bombs(url):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "png")
    reply = ask(url, bomb.getvalue())
    assert reply.status == 400
    assert "pixels" in reply.error


def raw(url, data, *, end=False):
    """What comes back for bytes on a connection, until the server closes it."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                parts.append(part)
        return b"".join(parts)


def test_slow_clients(threaded, monkeypatch):
    monkeypatch.setattr(serve, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(questions, "CHUNK_SECONDS", 0.5)
    for head in (b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n"):
        assert raw(threaded, head) == b""
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    assert b"408 Request Timeout" in raw(threaded, head + b"1234")
    # Nor does it help to send a byte of the body now and then.
    monkeypatch.setattr(questions, "CHUNK_SECONDS", 60.0)
    monkeypatch.setattr(questions, "BODY_SECONDS", 0.5)
    host, _, port = threaded.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.replace(b"9", b"999999"))
        while not select.select([connection], [], [], 0.02)[0]:
            connection.sendall(b"x")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408 Request Timeout")
    # The second head of a connection is no exception; a request that takes long is.
    again = raw(threaded, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he")
    assert again.count(b"HTTP/1.1 ") == 1
    assert b'"ok"' in again


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2\3\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**17,
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_no_http(url, data):
    assert re.match(rb"(HTTP/1.1 4\d\d |$)", raw(url, data))
    assert ask(url, JPEG).status == 200


@pytest.mark.parametrize("more", [b"X-A: 1\r\n", b"a"])
@pytest.mark.parametrize("begun", [b"", b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"])
def test_heads_and_trailers_without_end(url, begun, more):
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"POST / HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n".encode() + begun)
        with pytest.raises(ConnectionError):
            for _ in range(256):
                connection.sendall(more * (2**15 // len(more)))
    assert ask(url, JPEG).status == 200


def test_who_asks_for_http_2_is_answered_in_http_1(url):
    """Java's client does, and curl with --http2."""
    wish = {"upgrade": "h2c", "connection": "Upgrade, HTTP2-Settings", "http2_settings": "AAMAAABk"}
    long = encoded(size=(300, 300), kind="png")
    for image in (JPEG, long, iter([long[:9], long[9:]])):  # the last one in chunks
        assert ask(url, image, **wish).json == ask(url, JPEG if image is JPEG else long).json
    # Nor does a second request on the same connection get lost.
    head = f"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nUpgrade: h2c\r\n"
    one = f"{head}Connection: Upgrade\r\nContent-Length: {len(JPEG)}\r\n\r\n".encode() + JPEG
    last = one.replace(b": Upgrade", b": close")
    assert raw(url, one + one + last).count(b" 200 OK") == 3
    both = one.replace(b": Upgrade", b": Upgrade, close")  # nobody does
    assert raw(url, both).startswith(b"HTTP/1.1 400 ")


def test_a_body_in_many_small_pieces(url):
    png = encoded(size=(300, 300), kind="png")
    assert len(png) > 2 * serve.HEAD_BYTES  # as long as what stands around the pieces
    pieces = (png[at : at + 6] for at in range(0, len(png), 6))
    assert ask(url, pieces).json == ask(url, png).json


def test_clients_that_hang_up(url):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n"
    head += f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
    host, _, port = url.removeprefix("http://").partition(":")
    for data in (head % 10**6 + b"x", head % len(JPEG) + JPEG):
        for _ in range(20):
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(data)
    assert ask(url, JPEG).status == 200
    idle, until = f'mobilevit_waiting_requests{{model="{RUN}"}} 0', time.monotonic() + 60
    while idle not in (text := ask(f"{url}/metrics").body.decode()):
        assert time.monotonic() < until, text  # those that sent all of it are answered first
        time.sleep(0.05)
    assert not re.search(r'status="5\d\d"', text)


# --- load -----------------------------------------------------------------------------------------


def test_many_clients_get_their_own_answers(url):
    images = [encoded(seed) for seed in range(8)]
    alone = [ask(url, image).json for image in images]
    assert len({each[0]["score"] for each in alone}) == len(images)
    with concurrent.futures.ThreadPoolExecutor(32) as clients:
        replies = clients.map(lambda i: (i, ask(url, images[i])), [*range(8)] * 16)
        for i, reply in replies:
            assert [each["label"] for each in reply.json] == [each["label"] for each in alone[i]]
            for each, want in zip(reply.json, alone[i], strict=True):
                assert each["score"] == pytest.approx(want["score"], rel=1e-4)


def test_overload_and_failure(threaded, version, monkeypatch, caplog):
    compute, free, begun = version._queue._compute, threading.Event(), threading.Event()

    def slow(images):
        begun.set()
        assert free.wait(60)
        return compute(images)

    monkeypatch.setattr(version._queue, "_compute", slow)
    with concurrent.futures.ThreadPoolExecutor(16) as clients:  # four times what may wait
        replies = [clients.submit(ask, threaded, JPEG) for _ in range(16)]
        concurrent.futures.wait(replies, return_when=concurrent.futures.FIRST_COMPLETED)
        refused = [each.result() for each in replies[:] if each.done()]
        for reply in refused:
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert "try again" in reply.error
        while sum(each.done() for each in replies) < 12:
            time.sleep(0.01)
        free.set()
        statuses = sorted(each.result().status for each in replies)
    assert statuses == [200] * 4 + [429] * 12

    def broken(images):
        raise ValueError("boom")

    monkeypatch.setattr(version._queue, "_compute", broken)
    reply = ask(threaded, JPEG, x_request_id="number-1")
    assert reply.status == 500
    assert reply.error.endswith("request number-1")
    assert "request number-1 failed" in caplog.text
    assert "boom" in caplog.text
    monkeypatch.setattr(version._queue, "_compute", compute)
    assert ask(threaded, JPEG).status == 200


def test_who_hangs_up_leaves_the_queue(threaded, version, monkeypatch):
    compute, free, begun = version._queue._compute, threading.Event(), threading.Event()

    def slow(images):
        begun.set()
        assert free.wait(60)
        return compute(images)

    monkeypatch.setattr(version._queue, "_compute", slow)
    with concurrent.futures.ThreadPoolExecutor(served.AT_ONCE) as clients:
        before = []
        for _ in range(served.AT_ONCE):  # a batch each
            begun.clear()
            before.append(clients.submit(ask, threaded, JPEG))
            assert begun.wait(60)
        host, _, port = threaded.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
            connection.sendall(head + JPEG)
            while version.counts().waiting <= served.AT_ONCE:
                time.sleep(0.01)
        while version.counts().waiting > served.AT_ONCE:
            time.sleep(0.01)
        images = version.counts().images
        free.set()
        assert [each.result().status for each in before] == [200] * served.AT_ONCE
    assert version.counts().images == images + served.AT_ONCE


# --- reloading, beginning and ending --------------------------------------------------------------


def test_reload(url, both):
    before = ask(url, JPEG).json
    card = ask(f"{url}/models/{RUN}/reload", b"").json
    assert card["source"]["step"] == 7
    assert ask(url, JPEG).json == before

    step = int(checkpoint.complete_steps(both[0] / "checkpoints")[-1])
    state = checkpoint.read(both[0]).state
    from mobilevit_jax import steps

    head = state["ema"]["params"]["head"]
    head["bias"] = head["bias"] + np.array([9, 0, 0, 0, 0], np.float32)
    with checkpoint.Checkpoints(both[0], keep=1, note=print) as checkpoints:
        state = steps.TrainState(**{**state, "step": np.int32(step + 1)})
        checkpoints.save(step + 1, state, {"elapsed": 1.0})
    assert ask(url, JPEG).json == before  # on request only
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(ask, url, JPEG) for _ in range(64)]
        card = ask(f"{url}/models/{RUN}/reload", b"").json
        assert {each.result().status for each in replies} == {200}
    assert card["source"]["step"] == step + 1
    after = ask(url, JPEG).json
    assert after[0]["label"] == LABELS[0]
    assert after != before

    broken = both[0] / "checkpoints" / str(step + 1)
    shutil.rmtree(both[0] / "checkpoints")
    reply = ask(f"{url}/models/{RUN}/reload", b"")
    assert reply.status == 409
    assert f"{RUN} stays as it is" in reply.error
    assert not broken.exists()
    assert ask(url, JPEG).json == after


def test_random_weights_are_called_so(untrained, version):
    told = []
    with concurrent.futures.ThreadPoolExecutor(1) as decoders:
        served.load(
            str(untrained),
            weights="ema",
            checkpoint="newest",
            sizes=(1, 2),
            before=version.programs,
            max_delay=0.0,
            max_waiting=4,
            decoders=decoders,
            note=told.append,
        ).close()
    assert told == ["the weights of untrained are random, not trained"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_beginning_and_ending(native, number):
    """What comes while it loads is answered, and what was accepted before the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "launch.py", "serve", str(native), f"--port={port}", "--max-batch=1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        url, early = f"http://127.0.0.1:{port}", None
        while early is None:  # until it listens; then it loads for seconds
            with contextlib.suppress(ConnectionRefusedError):
                early = ask(url, JPEG)
        assert early.status == 200
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(JPEG)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head + JPEG[:-9])
            while b"waiting" not in ask(f"{url}/metrics").body:
                time.sleep(0.01)
            time.sleep(0.2)  # the server has the head by now
            server.send_signal(number)
            time.sleep(0.3)
            connection.sendall(JPEG[-9:])
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200 OK")
        assert server.wait(60) == 0
        said = server.stdout.read()
    assert f"serving {OTHER} at {url}" in said


def test_users_mistakes(both, tmp_path, capsys):
    def fails(*argv):
        status = launch.main(["serve", *map(str, argv)])
        said = capsys.readouterr().err
        assert said.startswith("launch.py: ")
        return status, said

    assert "/nowhere" in fails("/nowhere")[1]
    assert fails(both[1], both[1]) == (2, fails(both[1], both[1])[1])
    assert f"both be called {OTHER}" in fails(both[1], both[1])[1]
    with serve.listen("127.0.0.1", 0) as taken:
        status, said = fails(both[1], f"--port={taken.getsockname()[1]}")
    assert status == 2
    assert "give another --host or --port" in said
    assert fails(both[1], "--port=99999")[0] == 2
    assert "the token" in fails(both[1], "--token= ")[1]
    for argument in ("--max-batch=0", "--max-delay-ms=-1"):
        with pytest.raises(SystemExit):
            launch.main(["serve", str(both[1]), argument])


# --- fuzzing --------------------------------------------------------------------------------------


def fuzz(url, examples):
    seeds = [JPEG, encoded(kind="png"), encoded(kind="gif"), encoded(kind="tiff"), question()]
    seeds += [encoded(kind="webp"), encoded(kind="bmp"), encoded(kind="jpeg", progressive=True)]
    seeds = [seed if isinstance(seed, bytes) else seed.encode() for seed in seeds]

    @hypothesis.settings(max_examples=examples, deadline=None, database=None)
    @hypothesis.given(
        st.sampled_from(seeds),
        st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), max_size=5),
        st.floats(0, 2),
        st.sampled_from(["", "predict", f"models/{RUN}", "attention"]),
    )
    def once(body, changes, end, path):
        for where, data, cut in changes:
            at = int(where * len(body))
            body = body[:at] + data + body[at + cut :]
        reply = ask(f"{url}/{path}", body[: int(end * len(body))])
        assert reply.status in (200, 400)
        if reply.status == 400:
            assert reply.error

    once()


def test_mutated_images(url):
    fuzz(url, 60)


@contextlib.contextmanager
def unharmed(url, *, at_least):
    """So many requests, and after them: no 5xx, nothing left waiting, no memory lost."""

    def scrape():
        text = ask(f"{url}/metrics").body.decode()
        answered = sum(map(int, re.findall(r"requests_total\{.*\} (\d+)", text)))
        return text, answered, int(re.search(r"resident_memory_bytes (\d+)", text)[1])

    for _ in range(50):  # what decoding and computing allocate once
        ask(url, JPEG)
    _, answered, memory = scrape()
    yield
    text, now_answered, now_memory = scrape()
    print(f"{now_answered - answered:,} requests, memory {memory:,} -> {now_memory:,} bytes")
    assert now_answered - answered >= at_least
    assert now_memory < memory + 200 * 2**20
    assert not re.search(r'status="5\d\d"', text)
    assert set(re.findall(r"waiting_requests\{.*\} (\d+)", text)) == {"0"}
    assert ask(url, JPEG).status == 200


@pytest.mark.long
def test_ten_thousand_mutated_images(url):
    with unharmed(url, at_least=10_000):
        fuzz(url, 10_000)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "requests"),
    [
        (["--phases=examples,coverage", "--max-examples=50"], 300),
        (["--phases=fuzzing", "--max-examples=1200", "--exclude-path-regex=reload$"], 10_000),
    ],
)
def test_description_and_server_agree(url, options, requests, tmp_path):
    """Schemathesis sends what the description allows and what it does not."""
    if "SCHEMATHESIS" not in os.environ:
        pytest.skip("SCHEMATHESIS names no program (pip install schemathesis; its name is st)")
    command = [os.environ["SCHEMATHESIS"], "run", f"{url}/openapi.json", "--checks=all", *options]
    # That a text is an image in base64 is nothing that a schema can say; how long it takes to load
    # a model again is the machine's affair.
    command += ["--exclude-checks=positive_data_acceptance", "--max-response-time=60"]
    command += ["--generation-database=none"]
    command += ["-H", f"Authorization: Bearer {TOKEN}", "--request-timeout=60", "--seed=1"]
    with unharmed(url, at_least=requests):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
