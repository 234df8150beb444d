"""A real server on a socket: slow, silent, lying and numerous clients, while others are answered.

The limits are those of `opt-ds serve`, shortened.
"""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from opt_ds.serving.app import build_app
from opt_ds.serving.guard import SECURITY_HEADERS
from opt_ds.serving.limits import Limits
from opt_ds.serving.session import Session
from tests.serving.conftest import serving

LIMITS = Limits(
    connections=40, header_s=3.0, body_s=4.0, draining_s=1.5, closing_s=1.0, ahead_bytes=1024, steady_s=0.5, places=3,
    retry_after_s=1,
)  # fmt: skip
HEAD = b"POST /api/describe HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def port(session: Session) -> Iterator[int]:
    with serving(build_app(session, limits=LIMITS), LIMITS) as port:
        yield port


def connect(port: int, *parts: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    for part in parts:
        connection.sendall(part)
    return connection


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Everything up to the connection's end: the first status (0: none), and all bytes."""
    received = b""
    with connection:
        try:
            while part := connection.recv(65536):
                received += part
        except ConnectionResetError:
            pass
    match = re.match(rb"HTTP/1\.1 (\d+)", received)
    return int(match[1]) if match else 0, received


def describe(port: int, text: str = "a red square") -> httpx.Response:
    return httpx.post(f"http://127.0.0.1:{port}/api/describe", data={"text": text}, timeout=PATIENCE_S)


def test_half_sent_requests_are_closed_within_the_limits(port: int) -> None:
    cases = [
        (b"", 0),
        (b"GET / HT", 408),
        (b"POST /api/describe HTTP/1.1\r\nHost: localhost\r\nX: ", 408),
        (HEAD + b"Content-Length: 1000\r\n\r\ntext=a", 408),
        (HEAD + b"Content-Length: 1000000\r\n\r\n" + b"text=" + b"a" * 5000, 408),
        (b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc", 200),
    ] * LIMITS.places
    connections = [connect(port, sent) for sent, _ in cases]
    found = [answer(connection) for connection in connections]  # each ends: a socket that stays open is a TimeoutError
    assert [status for status, _ in found] == [status for _, status in cases], found
    assert describe(port).status_code == 200


def test_slow_senders_are_closed_while_another_client_is_answered(port: int) -> None:
    def drip(start: bytes) -> float:
        begin = time.monotonic()
        connection = connect(port, start)
        try:
            while time.monotonic() - begin < PATIENCE_S:
                connection.sendall(b"a")
                time.sleep(0.1)
        except OSError:
            pass
        return time.monotonic() - begin

    starts = [HEAD + b"X: ", HEAD + b"Content-Length: 100000\r\n\r\ntext="] * 8
    with ThreadPoolExecutor(len(starts)) as threads:
        dripping = [threads.submit(drip, start) for start in starts]
        served = 0
        while not all(future.done() for future in dripping):
            assert describe(port).status_code == 200, "slow senders take no place in the queue"
            served += 1
    assert served > 0
    assert max(future.result() for future in dripping) < PATIENCE_S, "each was closed"


def test_uploads_that_stall_make_room_for_others(port: int) -> None:
    stalled = [connect(port, HEAD + b"Content-Length: 1000000\r\n\r\ntext=" + b"a" * 2000) for _ in range(LIMITS.places)]
    time.sleep(LIMITS.steady_s + 0.2)
    assert describe(port).status_code == 200
    statuses = [answer(connection) for connection in stalled]
    assert [status for status, _ in statuses] == [408] * LIMITS.places
    assert b"others are waiting" in statuses[0][1]


LYING = [
    (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
    (HEAD + b"Content-Length: %d\r\n\r\n" % (LIMITS.upload_bytes + 1), 413),
    (HEAD + b"Content-Length: -1\r\n\r\n", 400),
    (HEAD + b"Content-Length: 1_0\r\n\r\ntext=a....", 400),
    (HEAD + b"Content-Length: 6\r\nContent-Length: 7\r\n\r\ntext=a", 400),
    (HEAD + b"\r\n", 411),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n6\r\ntext=a\r\n0\r\n\r\n", 411),
    (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\nffffffff\r\n" + b"a" * 9000, 411),
    (HEAD + b"Content-Length: 6\r\n\r\ntext=a and more", 200),
    (b"GET /api/about HTTP/1.1\r\n\r\n", 400),
    (b"GET /api/about HTTP/1.0\r\n\r\n", 403),
    (b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    (b"GET http://evil.example/api/about HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /api/about HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
]


def test_lying_and_malformed_requests_are_answered_with_all_headers(port: int) -> None:
    connections = [connect(port, sent) for sent, _ in LYING]
    for connection, (sent, status) in zip(connections, LYING, strict=True):
        found, received = answer(connection)
        assert found == status, (sent, received)
        head = received.split(b"\r\n\r\n")[0].lower()
        assert all(f"{name}: {value}".lower().encode() in head for name, value in SECURITY_HEADERS.items())
    assert describe(port).status_code == 200


def test_connections_beyond_the_limit_make_the_oldest_idle_one_leave(port: int) -> None:
    idle = [connect(port) for _ in range(LIMITS.connections)]
    time.sleep(0.3)
    assert describe(port).status_code == 200
    found = [answer(connection) for connection in idle]
    assert found[0][0] == 503 and b"retry-after: 1" in found[0][1]
    assert sum(status == 503 for status, _ in found) == 1, "and no other one"


class SlowModel:
    """Makes each description take as long as wished."""

    def __init__(self, session: Session, patch: pytest.MonkeyPatch) -> None:
        self.done, self.started, self.count = threading.Event(), threading.Semaphore(0), 0
        real = session.text

        def text(*arguments: object) -> str:
            self.count += 1
            self.started.release()
            assert self.done.wait(PATIENCE_S)
            return real(*arguments)  # type: ignore[arg-type]

        patch.setattr(session, "text", text)


@pytest.fixture
def slow_model(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowModel]:
    model = SlowModel(session, monkeypatch)
    yield model
    model.done.set()


def test_beyond_the_queue_a_request_is_refused_before_its_body_and_the_rest_still_answers(
    port: int, slow_model: SlowModel
) -> None:
    with ThreadPoolExecutor(LIMITS.places) as threads:
        waiting = [threads.submit(describe, port) for _ in range(LIMITS.places)]
        assert slow_model.started.acquire(timeout=PATIENCE_S)
        _wait_for_full_queue(port)
        # Not one byte of the body is sent: the answer comes before it.
        for path in (b"describe", b"generate_image"):
            connection = connect(port, HEAD.replace(b"describe", path) + b"Content-Length: 20000000\r\n\r\n")
            received = connection.recv(65536).lower()
            assert received.startswith(b"http/1.1 503") and b"retry-after: 1" in received
            connection.close()
        start = time.monotonic()
        for path in ("/api/about", "/", "/api/openapi.json"):
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
        assert time.monotonic() - start < PATIENCE_S
        slow_model.done.set()
        assert [future.result().status_code for future in waiting] == [200] * LIMITS.places


def test_a_client_that_hangs_up_while_it_waits_frees_its_place(port: int, slow_model: SlowModel) -> None:
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(describe, port)
        assert slow_model.started.acquire(timeout=PATIENCE_S)
        others = [connect(port, HEAD + b"Content-Length: 6\r\n\r\ntext=b") for _ in range(LIMITS.places - 1)]
        _wait_for_full_queue(port)
        for connection in others:
            connection.close()
        last = connect(port, HEAD + b"Connection: close\r\nContent-Length: 6\r\n\r\ntext=c")
        slow_model.done.set()
        assert answer(last)[0] == 200 and first.result().status_code == 200
    assert slow_model.count == 2, "what nobody waits for is not computed"


def test_who_does_not_read_the_answer_holds_no_place(port: int) -> None:
    """Pipelined requests fill the socket's buffers; the connection is closed, and others are answered meanwhile."""
    page = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    deaf = connect(port)
    deaf.setblocking(False)
    try:
        for _ in range(5000):
            deaf.send(page)
    except BlockingIOError:
        pass
    assert describe(port).status_code == 200
    deaf.close()


def test_the_server_stops_at_once_whatever_clients_do(session: Session, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(build_app(session)) as port:  # with the usual limits: a body may take a minute
        stuck = [connect(port), connect(port, b"GET / HT"), connect(port, HEAD + b"Content-Length: 100\r\n\r\ntext=a")]
        assert describe(port).status_code == 200
        start = time.monotonic()
    assert time.monotonic() - start < 8, "not the ten seconds that running requests get"
    assert [answer(connection)[0] for connection in stuck] == [0] * len(stuck)
    assert capfd.readouterr().err == ""


def _wait_for_full_queue(port: int) -> None:
    for _ in range(100):
        with connect(port, HEAD + b"Content-Length: 100\r\n\r\n") as probe:
            probe.settimeout(0.1)
            try:
                if probe.recv(100).startswith(b"HTTP/1.1 503"):
                    return
            except TimeoutError:
                pass
    raise AssertionError("the queue never was full")


def test_the_queue_counts_bytes_whatever_the_header_said() -> None:
    """Below uvicorn, which holds a body to its Content-Length, the application counts by itself."""
    from fastapi import HTTPException

    from opt_ds.serving.admission import Upload

    async def endless() -> dict[str, object]:
        return {"type": "http.request", "body": b"a" * 1000, "more_body": True}

    async def read() -> None:
        upload = Upload(endless, LIMITS.model_copy(update={"upload_bytes": 5000}))  # type: ignore[arg-type]
        await upload.read_ahead()
        while True:
            await upload.receive()

    with pytest.raises(HTTPException) as caught:
        asyncio.run(read())
    assert caught.value.status_code == 413
