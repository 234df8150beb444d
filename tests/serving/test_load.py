"""`opt-ds serve` under 300 simultaneous connections and 50 slow senders, while two clients work."""

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.clients import GoodClients, ServeProcess, serve_process

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

CONNECTIONS, SLOW, SLOW_S = 300, 50, 75.0
_HEAD = b"POST /api/describe HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
_BODY = b"text=a+red+square"


def test_a_crowd_and_slow_senders_end_no_server_and_fail_no_working_client(run: Path, raw: Path) -> None:
    files = {"image": (raw / "0.png").read_bytes(), "audio": (raw / "0.wav").read_bytes()}
    with serve_process(run) as server:
        _crowd(server, 60)  # warm-up: threads, the allocator's arenas
        with GoodClients(server.address, files):
            time.sleep(5)
        before = server.settled_mib(10)
        slow: Counter[str] = Counter()
        with GoodClients(server.address, files) as clients:
            dripping = [threading.Thread(target=_drip, args=(server, number, slow)) for number in range(SLOW)]
            for thread in dripping:
                thread.start()
            crowd = _crowd(server, CONNECTIONS)
            for thread in dripping:
                thread.join()
        after = server.settled_mib(30)
        print(f"{CONNECTIONS} connections: {dict(crowd)}; {SLOW} slow senders: {dict(slow)}")
        print(f"two clients: {clients.served} served, {clients.retries} retries, slowest {clients.slowest_s:.1f} s, "
              f"failed: {dict(clients.failures)}")  # fmt: skip
        print(f"memory: {before:.0f} MiB before, {after:.0f} MiB after")
        assert server.lives() and "Traceback" not in server.log()
        assert set(crowd) <= {"200", "503"} and crowd["200"] > 0 and crowd.total() == CONNECTIONS
        assert slow["open"] == 0, "every slow sender was closed"
        assert not clients.failures and clients.served > 10
        assert after < 1.1 * before


def _crowd(server: ServeProcess, count: int) -> Counter[str]:
    """The statuses of requests that are all sent at once."""
    barrier = threading.Barrier(count)

    def ask(_: int) -> str:
        barrier.wait()
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
                connection.sendall(_HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(_BODY) + _BODY)
                return connection.recv(12).decode()[9:] or "closed"
        except OSError as error:
            return repr(error)

    with ThreadPoolExecutor(count) as threads:
        return Counter(threads.map(ask, range(count)))


def _drip(server: ServeProcess, number: int, found: Counter[str]) -> None:
    """Send a header, a body's beginning or a body's middle, one byte at a time, and start again when the server hangs up."""
    body = _HEAD + b"Content-Length: 20000000\r\n\r\n"
    start = (_HEAD + b"X: ", body, body + b"a" * 100_000)
    end = time.monotonic() + SLOW_S
    while time.monotonic() < end:
        try:
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                connection.sendall(start[number % len(start)])
                for _ in range(150):
                    time.sleep(1)
                    connection.sendall(b"a")
            found["open"] += 1
        except OSError:
            found["closed"] += 1
