"""Bad HTTP: every row of the list in turn, over raw sockets. Each is refused with a 4xx, nothing hangs, nothing grows.

The numbers in the names are the rows of the list of bad requests that the project keeps: 1 to 28 parsing and limits, 29
to 34 uploads, 35 to 45 paths, 46 to 54 keys, 55 to 60 pages of other sites.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving_laws import Running, running, until

IMAGE = "/v1/images/generations"
EDIT = "/v1/images/edits"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """All tests of this page share it, and at the end it must be as well as at the start."""
    with running(upload_seconds=2.0, seconds=20.0) as each:
        with Watched() as watched:
            yield each
        assert watched.opened == []
        assert watched.called == []
        assert each.ask(IMAGE, {"prompt": "1", "num_inference_steps": 1})[0] == 200
        counts = each.counts()
        answers = sum(n for name, n in counts.items() if name.startswith("undiffuse_responses_total"))
        assert counts["undiffuse_requests_total"] == answers + 1  # the one that asks for the counts


class Watched:
    """Which files the server's threads open, and where they connect to; of its own kind of test, none."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.called: list[Any] = []
        self.tester = threading.get_ident()
        self.on = False

    def __enter__(self) -> Watched:
        self.on = True
        sys.addaudithook(self._seen)
        return self

    def __exit__(self, *what: object) -> None:
        self.on = False

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or threading.get_ident() == self.tester:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
            if not name.endswith((".py", ".pyc", ".so")) and not name.startswith("/proc/"):  # modules, at first use
                self.opened.append(name)
        elif event == "socket.connect":
            self.called.append(arguments[1])


def raw(server: Running, *pieces: bytes | float, half: bool = False, seconds: float = 15.0) -> list[int]:
    """Send bytes as they are (a number: wait so long), and read the statuses of all answers until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                if isinstance(piece, bytes):
                    connection.sendall(piece)
                else:
                    time.sleep(piece)
            if half:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has had enough; its answer may still be there to read
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


def head(server: Running, line: str = f"POST {IMAGE} HTTP/1.1", **headers: str) -> bytes:
    """The head of a request; ``Host`` and ``Connection: close`` unless given, underscores are hyphens."""
    given = {"Host": f"127.0.0.1:{server.port}", "Connection": "close", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [line, *(f"{name}: {value}" for name, value in given.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


FINE = b'{"prompt": "1", "num_inference_steps": 1, "seed": 1}'


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


# --- 1 to 15: bodies --------------------------------------------------------------------------------------------------

LONG = 2**63


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b'"a":{' * 10_000 + b"}" * 10_001,
        b"[" * 10_000 + b"]" * 10_000,
        b'{"guidance_scale": -Infinity}',
        b'{"guidance_scale": 1e400}',
        b'{"guidance_scale": -1e400}',
        b'{"guidance_scale": 101}',
        *(
            b'{"%s": %s}' % (field, value)
            for field in (b"n", b"num_inference_steps", b"partial_images", b"output_compression")
            for value in (b"%d" % LONG, b"-1", b"1.5", b'"8"', b"true", b"[]", b"{}", b"1e3")
        ),
        *(b'{"seed": %s}' % value for value in (b"-1", b"%d" % 2**64, b'"1"', b"1.0", b"true", b"9" * 5000)),
        *(b'{"size": "%s"}' % value for value in (b"x", b"8x", b"-8x8", b"0x0", b"8 x 8", b"8x8x8", b"\xd9\xa8x8")),
        *(b'{"class_labels": %s}' % value for value in (b"-1", b'"1"', b"true", b"[true]", b"[[1]]", b"[1.5]", b"{}")),
        b'{"prompt": "\\u0000"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\u202e1"}',
        b'{"prompt": "1\\n2"}',
        b'{"prompt": "0-99999999999999999999"}',
        b'{"prompt": "' + b"9" * 9999 + b'"}',
        b'{"prompt": "0-' + b"9" * 9000 + b'"}',
        '{"prompt": "\u00b2"}'.encode(),
        b'{"prompt": null}',
        b'{"prompt": "1"}x',
        b'{"prompt": "1"',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"prompt": "\xff"}',
        b"{'prompt': '1'}",
        b'{"__class__": "x"}',
        b'{"\\ud800": 1}',
        b'{"model": "\\ud800"}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_HTTP_2_to_15_bodies(server: Running, body: bytes) -> None:
    status, _, text = server.ask(IMAGE, body)
    assert status in (400, 404)
    check_error(text)


def check_error(text: bytes) -> None:
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not re.search(r"Traceback|/home|/root|/tmp|0x[0-9a-f]{6}|\.py", error["message"])  # SV-15


# --- 16 to 18: how long a body is, and how it comes -------------------------------------------------------------------


def test_HTTP_16_a_length_that_is_missing_or_lies(server: Running) -> None:
    assert raw(server, head(server) + FINE) == [400]  # none: no body
    assert raw(server, head(server, Content_Length="-1") + FINE) == [400]
    assert raw(server, head(server, Content_Length="1.5") + FINE) == [400]
    assert raw(server, head(server, Content_Length="0x10") + FINE) == [400]
    assert raw(server, head(server, Content_Length="+52") + FINE) == [400]
    assert raw(server, head(server, Content_Length="1" * 30) + FINE)[:1] in ([400], [413])
    assert raw(server, head(server, Content_Length="9" * 10) + FINE) == [413]
    assert raw(server, head(server, Content_Length="9" * 5000) + FINE) == [400]
    assert raw(server, head(server, Content_Length=str(len(FINE) - 1)) + FINE) == [400]
    assert raw(server, head(server, Content_Length=str(len(FINE) + 1)) + FINE) == [408]  # the rest never comes
    assert raw(server, head(server, Content_Length=str(len(FINE))) + FINE) == [200]


def test_HTTP_17_chunks(server: Running) -> None:
    chunked = head(server, Transfer_Encoding="chunked")
    assert raw(server, chunked + chunks(FINE, 1)) == [200]
    assert raw(server, chunked + chunks(FINE + b" " * 100_000, 1)) == [200]
    assert raw(server, chunked + chunks(b" " * 1_100_000, 1000)) == [413]
    for bad in (b"-5\r\nhello\r\n0\r\n\r\n", b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n", b"f" * 20 + b"\r\n"):
        assert raw(server, chunked + bad) in ([400], [408])
    assert raw(server, chunked + b"5\r\nhel") == [408]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip", "gzip, gzip", "x"])
def test_HTTP_18_compressed_bodies(server: Running, encoding: str) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    assert raw(server, head(server, Content_Encoding=encoding, Content_Length=str(len(bomb))) + bomb) == [415]


# --- 19 to 28: heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "application/jsonx", "json", "*/*"],
)
def test_HTTP_19_content_types(server: Running, kind: str) -> None:
    assert server.ask(IMAGE, FINE, {"Content-Type": kind})[0] == 415
    if kind != "multipart/form-data":
        assert server.ask(EDIT, FINE, {"Content-Type": kind})[0] == 415


def test_HTTP_20_character_sets(server: Running) -> None:
    assert server.ask(IMAGE, FINE, {"Content-Type": "application/json; charset=utf-8"})[0] == 200
    for body in (FINE.decode().encode("utf-16"), FINE.decode().encode("utf-32"), b"+AHs-"):
        assert server.ask(IMAGE, body, {"Content-Type": "application/json; charset=utf-16"})[0] == 400


def test_HTTP_21_22_heads_that_are_too_large(server: Running) -> None:
    many = {f"X_{i}": "1" for i in range(10_000)}
    assert raw(server, head(server, **many)) == [400]
    assert raw(server, head(server, X="a" * 70_000)) == [400]
    assert raw(server, head(server, f"GET /{'a' * 70_000} HTTP/1.1")) in ([400], [404])
    assert raw(server, head(server, "GET /v1/models?" + "a" * 60_000 + " HTTP/1.1")) == [200]


def test_HTTP_23_slow_senders(server: Running) -> None:
    """A head, or a body, one byte a second: the connection is closed, and meanwhile the others are served."""
    from undiffuse.serving.server import Patient

    before, Patient.seconds = Patient.seconds, 1.0
    try:
        begun = time.monotonic()
        assert raw(server) == []  # nothing at all
        assert raw(server, b"GET", 0.3, b" /", 0.3, b"v", 0.3, b"1", 0.3, b"/", 0.3, b"m") == []
        first = head(server, "GET /v2/health/live HTTP/1.1", Connection="keep-alive")
        assert raw(server, first, 0.1, b"G", 0.3, b"E", 0.3, b"T", 0.3, b" ", 0.3, b"/") == [200]
        slow = [piece for byte in FINE[:30] for piece in (bytes([byte]), 0.1)]
        assert raw(server, head(server, Content_Length=str(len(FINE))), *slow) == [408]
        assert time.monotonic() - begun < 30
    finally:
        Patient.seconds = before


def test_HTTP_24_half_closed_reset_and_pipelined(server: Running) -> None:
    whole = head(server, Content_Length=str(len(FINE))) + FINE
    assert raw(server, whole, half=True) in ([200], [])  # who closes has left
    live = head(server, "GET /v2/health/live HTTP/1.1", Connection="keep-alive")
    last = head(server, "GET /v2/health/live HTTP/1.1")
    assert raw(server, live * 99 + last) == [200] * 100
    for sent in (b"POST", head(server, Content_Length="1000"), head(server, Content_Length="1000") + FINE):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(sent)
        connection.close()  # with RST
    assert server.ask("/v2/health/live")[0] == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "HEAD", "FOO", "GET"])
def test_HTTP_25_methods(server: Running, method: str) -> None:
    assert raw(server, head(server, f"{method} {IMAGE} HTTP/1.1")) == [405]


def test_HTTP_25_other_versions_and_targets(server: Running) -> None:
    host = f"127.0.0.1:{server.port}"
    assert raw(server, f"GET /v1/models HTTP/1.0\r\nHost: {host}\r\n\r\n".encode()) == [200]
    assert raw(server, b"GET /v1/models HTTP/1.0\r\n\r\n") == [400]
    assert raw(server, b"GET /v1/models\r\n\r\n") == [400]
    assert raw(server, head(server, "GET /v1/models HTTP/2.0")) == [400]
    assert raw(server, head(server, "GET /v1/models HTTP/9.9")) == [400]
    assert raw(server, head(server, f"GET http://{host}/v1/models HTTP/1.1")) == [404]
    assert raw(server, head(server, "GET http://evil.com/v1/models HTTP/1.1")) == [404]
    assert raw(server, head(server, f"CONNECT {host} HTTP/1.1"))[0] in (400, 404, 405)
    assert raw(server, head(server, "OPTIONS * HTTP/1.1"))[0] in (400, 404, 405)
    assert raw(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == [400]
    assert raw(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100) == [400]  # TLS
    assert raw(server, b"\r\n\r\n\r\n\0\0\0\0") == [400]


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5, 6",
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 0",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        " Transfer-Encoding: chunked",
        "Content-Length: 5\n\tX: y\rContent-Length: 6",
        "X: a\0b",
        "X\0: a",
        "X y: a",
        ": a",
    ],
    ids=repr,
)
def test_HTTP_26_no_request_is_smuggled(server: Running, headers: str) -> None:
    """What follows must never be answered as a request of its own."""
    start = f"POST {IMAGE} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    hidden = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
    statuses = raw(server, f"{start}{headers}\r\n\r\n0\r\n\r\n{hidden}".encode())
    assert statuses
    assert all(400 <= status < 500 for status in statuses)


def test_HTTP_27_28_ranges_and_conditions_change_nothing(server: Running) -> None:
    ranges = "bytes=" + ",".join(f"{i}-{i}" for i in range(10_000))
    for headers in (
        {"Range": ranges},
        {"Range": "bytes=-1--5"},
        {"If-None-Match": "*"},
        {"If-Modified-Since": "yesterday"},
        {"If-Match": '"x"', "If-Range": "x"},
        {"Expect": "200-ok"},
        {"Upgrade": "h2c", "Connection": "Upgrade"},
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"},
    ):
        assert server.ask("/v1/models", headers=headers)[0] == 200


def test_HTTP_28_expect_continue_is_answered(server: Running) -> None:
    statuses = raw(server, head(server, Expect="100-continue", Content_Length=str(len(FINE))), 0.1, FINE)
    assert statuses == [100, 200]


# --- 29 to 34: uploads ------------------------------------------------------------------------------------------------


def form(*parts: tuple[str, bytes], boundary: bytes = b"edge") -> tuple[bytes, dict[str, str]]:
    """A multipart body of ``(Content-Disposition's parameters, content)``, and its header."""
    body = b"".join(
        b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (boundary, name.encode(), content)
        for name, content in parts
    )
    kind = f"multipart/form-data; boundary={boundary.decode('latin-1')}"
    return body + b"--%s--\r\n" % boundary, {"Content-Type": kind}


def upload(server: Running, image: bytes, name: str = "a.png", **fields: str) -> tuple[int, bytes]:
    parts = [(f'name="{field}"', value.encode()) for field, value in fields.items()]
    body, headers = form((f'name="image"; filename="{name}"', image), *parts)
    status, _, text = server.ask(EDIT, body, headers)
    return status, text


def png(pixels: np.ndarray | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) if pixels is None else pixels
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def declared(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and has few bytes."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


WHOLE = png(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
BAD_IMAGES = {
    "empty": b"",
    "cut": WHOLE[: len(WHOLE) // 2],
    "cut jpeg": saved("JPEG", size=(64, 64))[:-100],
    "text": b"I am no picture",
    "html": b"<html><script>alert(1)</script></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "flipped byte": WHOLE[:100] + bytes([WHOLE[100] ^ 1]) + WHOLE[101:],
    "30,000 squared": declared(30_000, 30_000),
    "13,000 squared": declared(13_000, 13_000),
    "5,000 squared": declared(5_000, 5_000),
    "2^31 - 1 squared": declared(2**31 - 1, 2**31 - 1),
    "real numbers": saved("TIFF", "F"),
    "32 bits": saved("TIFF", "I"),
    "one pixel": png(np.zeros((1, 1), np.uint8)),
    "a line": png(np.zeros((4, 5000), np.uint8)),
    "a pdf": saved("PDF"),
    "an eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00",
    "base64": base64.b64encode(WHOLE),
    **{f"the address {url}": url.encode() for url in ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "data:,a")},
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_HTTP_29_to_31_bad_pictures(server: Running, name: str) -> None:
    status, text = upload(server, BAD_IMAGES[name], num_inference_steps="1", prompt="1")
    assert status == 400
    check_error(text)
    mask = (f'name="{"image"}"; filename="i.png"', png()), ('name="mask"; filename="m.png"', BAD_IMAGES[name])
    body, headers = form(*mask)
    assert server.ask(EDIT, body, headers)[0] == 400


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_HTTP_29_good_pictures_of_every_kind(server: Running, mode: str) -> None:
    assert upload(server, saved("PNG", mode), num_inference_steps="1", prompt="1")[0] == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "file:///etc/passwd", "gopher://x", "data:image/png,x"])
def test_HTTP_31_SV9_addresses_are_never_followed(server: Running, url: str) -> None:
    body, headers = form(('name="image"', url.encode()))
    assert server.ask(EDIT, body, headers)[0] == 400
    assert server.ask(EDIT, {"image": url})[0] == 415
    assert server.ask(IMAGE, {"prompt": "1", "image": url})[0] == 400
    assert server.ask(IMAGE, {"prompt": url})[0] == 400
    assert server.ask("/models/tiny", {"inputs": url})[0] == 400


@pytest.mark.parametrize("side", [-(10**13), -1, 0, 65537, 10**30])
def test_HTTP_21_sizes_that_cannot_be(server: Running, side: int) -> None:
    status, _, text = server.ask("/models/tiny", {"inputs": "1", "parameters": {"width": side, "height": side}})
    assert (status, json.loads(text)["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    "name", ["../../x", "C:\\\\x", "x\0.png", "a" * 300, "", "..", "/etc/passwd", "CON", "a\tb", "\N{PILE OF POO}"]
)
def test_HTTP_32_SV8_names_of_files_mean_nothing(server: Running, name: str) -> None:
    status, text = upload(server, png(), name, num_inference_steps="1", prompt="1", seed="1")
    if status != 200:
        check_error(text)
    assert status in (200, 400)
    assert name.encode() not in text or not name


def test_HTTP_33_what_is_answered_is_never_taken_for_a_page(server: Running) -> None:
    for path, body in (("/v1/models", None), (IMAGE, b"{"), ("/nothing", None), ("/metrics", None)):
        _, headers, _ = server.ask(path, body)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "html" not in headers["Content-Type"]


def test_HTTP_34_forms(server: Running) -> None:
    image = ('name="image"; filename="a.png"', png())
    asked = ('name="num_inference_steps"', b"1"), ('name="prompt"', b"1")
    bad = [
        form(image, image),
        form(image, *(('name="prompt"', b"1") for _ in range(2))),
        form(image, *((f'name="f{i}"', b"1") for i in range(200))),
        form(*((f'name="image"; filename="{i}.png"', png()) for i in range(200))),
        form(('name="file"; filename="a.png"', png())),
        form(image, ('name="mask"', b"not a file")),
        form(image, ('name="n"', b"two")),
        form(image, ('name="n"', b"\xff")),
        form(image, ('name="class_labels"', b"x")),
        form(image, ('name="strength"', b"0")),
        form(image, ('name="strength"', b"-1")),
        form(image, ('name="strength"', b"nan")),
        form(image, ('name="strength"', b"inf")),
        form(image, ('name="prompt"', b"a" * 2_000_000)),
        form(image, ('name="\xc3\xa9"', b"1")),
        form(image, ("x", b"1")),
        form(("", b"")),
        form(),
        (b"", {"Content-Type": "multipart/form-data; boundary=edge"}),
        (b"--edge", {"Content-Type": "multipart/form-data; boundary=edge"}),
        (b"--other\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}),
        (b"--edge\r\n" + b"X: " + b"a" * 65_536 + b"\r\n\r\n\r\n--edge--", {"Content-Type": form()[1]["Content-Type"]}),
        (b"--edge\r\n" + b"X: a\r\n" * 1000 + b"\r\n\r\n--edge--", {"Content-Type": form()[1]["Content-Type"]}),
        (form(image)[0], {"Content-Type": "multipart/form-data"}),
        (form(image)[0], {"Content-Type": "multipart/form-data; boundary="}),
        (form(image)[0], {"Content-Type": "multipart/form-data; boundary=" + "a" * 5000}),
        (form(image)[0][:-20], form(image)[1]),
    ]
    for body, headers in bad:
        status, _, text = server.ask(EDIT, body, headers)
        assert status == 400, (status, body[-60:], headers, text[:100])
        check_error(text)
    assert server.ask(EDIT, *form(image, *asked))[0] == 200
    lying = form((f"{image[0]}\r\nContent-Length: -5", image[1]), *asked)
    assert server.ask(EDIT, *lying)[0] in (200, 400)


# --- 35 to 45: paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/files/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc/passwd",
        "/v1/models/..%252f..%252fetc%252fpasswd",
        "/v1/models/..\\..\\etc", "//etc/passwd", "/v1/models/TINY", "/V1/models", "/v1/models/tiny%00",
        "/v1/models/tiny.",
        "/v1/models/tiny%20", "/v1/models/", "/v1//models", "//v1/models", "/v1/models/tiny/", "/v1/./models",
        "/v2/health/live/../../../v1/models", "/v1/models/%ff", "/v1/models/" + "a" * 5000, "/v1/models/%0d%0aX: y",
        "/v1/models/tiny;x", "/v1/models/con", "/v1/models/.", "/v1/models/..", "/%", "/%zz", "/docs", "/redoc",
    ],
)  # fmt: skip
def test_HTTP_35_to_44_paths(server: Running, path: str) -> None:
    statuses = raw(server, head(server, f"GET {path.replace(' ', '%20')} HTTP/1.1"))
    assert statuses == [404]
    assert raw(server, head(server, f"POST {path.replace(' ', '%20')} HTTP/1.1", Content_Length="2") + b"{}")[0] >= 400


@pytest.mark.parametrize(
    "name", ["../x", "tiny/../tiny", "tiny\0", "TINY", "tiny ", "ｔｉｎｙ", "a" * 200, "\\x", "-", "~"]
)
def test_HTTP_44_names_of_models(server: Running, name: str) -> None:
    assert server.ask(IMAGE, {"prompt": "1", "model": name})[0] == 404
    assert server.ask("/v1/samples", {"prompt": "1", "model": name})[0] == 404


# --- 46 to 54: keys ---------------------------------------------------------------------------------------------------


def test_HTTP_46_to_54_SV6_every_route_every_method_every_bad_key() -> None:
    with running("sesame") as server:
        schema = json.loads(server.ask("/openapi.json", headers={"Authorization": "Bearer sesame"})[2])
        paths = [path.replace("{name}", "tiny") for path in schema["paths"] if path != "/v2/health/live"]
        tricks = [
            "//v1/models",
            "/V1/models",
            "/v2/health/live/../../v1/models",
            "/v2/health/live/",
            "/openapi.json",
            "/",
        ]
        keys = [
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer sesam"},
            {"Authorization": "Bearer sesame "[:-1] + "\xe9"},
            {"Authorization": "sesame"},
            {"Authorization": "Basic c2VzYW1lOg=="},
            {"Authorization": "Bearer sesame\r\nAuthorization: Bearer sesame"},
            {"Authorization": "Bearer sesame, Bearer sesame"},
            {"X-Api-Key": "sesame"},
            {"Cookie": "key=sesame"},
        ]
        for path in [*paths, *tricks]:
            for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD"):
                for key in keys:
                    assert raw(server, head(server, f"{method} {path} HTTP/1.1", **key)) == [401], (path, method, key)
            assert raw(server, head(server, f"GET {path}?api_key=sesame&key=sesame HTTP/1.1")) == [401]
        fine = {"Authorization": "Bearer sesame"}
        assert raw(server, head(server, "GET /v1/models HTTP/1.1", **fine)) == [200]


@pytest.mark.parametrize(
    "host", ["", "evil.com", "a b", "127.0.0.1", "127.0.0.1:1", "[::1", "127.0.0.1:99999", "@", "/"]
)
def test_HTTP_54_55_hosts(server: Running, host: str) -> None:
    assert raw(server, head(server, "GET /v1/models HTTP/1.1", Host=host))[0] in (400, 403)


# --- 55 to 60: pages of other sites -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.com"},
        {"Host": "127.0.0.1.nip.io:{port}"},
        {"Host": "localhost:1"},
        {"Host": "evil.com", "Origin": "http://evil.com"},
        {"Origin": "http://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1.evil.com"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:{port}@evil.com"},
        {"Origin": "http://["},
        {"Origin": "file://"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "Cross-Site"},
        {"Sec-Fetch-Site": "cross-site", "Upgrade": "websocket", "Connection": "Upgrade"},
        {"Host": "evil.com", "Access-Control-Request-Method": "POST"},
    ],
    ids=str,
)
def test_HTTP_55_to_60_SV7_other_sites(server: Running, method: str, headers: dict[str, str]) -> None:
    sent = {name: value.format(port=server.port) for name, value in headers.items()}
    assert raw(server, head(server, f"{method} /v1/models HTTP/1.1", **sent)) == [403]


def test_HTTP_58_no_answer_invites_other_sites(server: Running) -> None:
    for headers in ({}, {"Origin": f"http://127.0.0.1:{server.port}", "Access-Control-Request-Method": "POST"}):
        for path in (IMAGE, "/v1/models"):
            _, got, _ = server.ask(path, headers=headers)
            assert not [name for name in got if name.lower().startswith("access-control")]


# --- and all of it at once --------------------------------------------------------------------------------------------


def test_FZ7_mangled_requests(server: Running) -> None:
    """Good requests with some bytes changed, left out or doubled: an answer or a closed connection, never a 5xx."""
    source = np.random.default_rng(7)
    body, headers = form(('name="image"; filename="a.png"', png()), ('name="num_inference_steps"', b"1"))
    good = [
        head(server, Content_Length=str(len(FINE))) + FINE,
        head(server, Transfer_Encoding="chunked") + chunks(FINE, 7),
        head(server, f"POST {EDIT} HTTP/1.1", **headers, Content_Length=str(len(body))) + body,
        head(server, "GET /v1/models/tiny HTTP/1.1"),
    ]
    for number in range(120):
        data = bytearray(good[number % len(good)])
        for _ in range(int(source.integers(1, 6))):
            at, what = int(source.integers(len(data))), source.integers(3)
            if what == 0:
                data[at] = int(source.integers(256))
            elif what == 1:
                del data[at : at + int(source.integers(1, 8))]
            else:
                data[at:at] = data[at : at + int(source.integers(1, 8))]
        statuses = raw(server, bytes(data), half=True)
        assert all(status < 500 for status in statuses), (statuses, bytes(data))
    until(lambda: server.ask("/v2/health/ready")[0] == 200)
