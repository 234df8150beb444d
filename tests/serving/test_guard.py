"""Whose requests are answered: Host and Origin, the headers of every answer, and what an exception costs."""

from collections.abc import Iterator

import httpx
import pytest
from fastapi.testclient import TestClient

from opt_ds.serving.app import build_app
from opt_ds.serving.guard import SECURITY_HEADERS
from opt_ds.serving.session import Session


@pytest.fixture(scope="module")
def client(session: Session) -> Iterator[TestClient]:
    app = build_app(session, allow_hosts=("opt.example.org", "2001:db8::1"))
    with TestClient(app, base_url="http://localhost:8080", raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, **headers: str) -> httpx.Response:
    return client.get("/api/about", headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1", "127.0.0.1:8080", "127.1.2.3", "[::1]", "[::1]:8080",
        "[0:0:0:0:0:0:0:1]:80", "opt.example.org", "Opt.Example.Org:443", "[2001:db8::1]:8080",
    ],
)  # fmt: skip
def test_own_names_are_answered(host: str, client: TestClient) -> None:
    assert ask(client, host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:localhost",
        "localhost@evil.example", "evil.localhost", "[::1", "[::2]", "::1", "192.168.1.2", "128.0.0.1", "2130706433", "0.0.0.0",
        "", " ", "localhost:8080:8080", "localhost:port", "localhost/evil", "localhost,evil.example", "localhost evil.example",
        "sub.opt.example.org", "testserver",
    ],
)  # fmt: skip
def test_foreign_names_are_refused_with_the_way_to_allow_them(host: str, client: TestClient) -> None:
    reply = ask(client, host=host)
    assert reply.status_code == 403
    assert "--allow-host" in reply.json()["detail"] or "names no valid Host" in reply.json()["detail"]
    for method, path in (("POST", "/api/describe"), ("GET", "/"), ("OPTIONS", "/api/generate_image"), ("GET", "/nowhere")):
        assert client.request(method, path, headers={"host": host}).status_code == 403


def test_the_address_of_host_is_allowed_and_of_all_addresses_only_the_servers_own(session: Session) -> None:
    def status(listens_on: str, host: str, own: str) -> int:
        app = build_app(session, host=listens_on)
        return TestClient(app, base_url=f"http://{own}").get("/api/about", headers={"host": host}).status_code

    assert status("192.168.1.2", "192.168.1.2:8080", "192.168.1.2") == 200
    assert status("gpu-box", "gpu-box:8080", "192.168.1.2") == 200
    assert status("192.168.1.2", "192.168.1.3", "192.168.1.2") == 403
    for wildcard in ("0.0.0.0", "::"):
        assert status(wildcard, "192.168.1.2:8080", "192.168.1.2") == 200
        assert status(wildcard, "localhost", "127.0.0.1") == 200
        assert status(wildcard, "192.168.1.3", "192.168.1.2") == 403
        assert status(wildcard, "evil.example", "192.168.1.2") == 403


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8080", "http://localhost:8080", 200),
        ("LOCALHOST:8080", "http://localhost:8080", 200),
        ("[::1]:8080", "http://[::1]:8080", 200),
        ("opt.example.org", "https://opt.example.org", 200),
        ("opt.example.org:443", "https://opt.example.org", 200),
        ("localhost", "http://localhost:80", 200),
        ("localhost:8080", "http://localhost:3000", 403),
        ("localhost:8080", "http://localhost", 403),
        ("localhost:8080", "http://127.0.0.1:8080", 403),
        ("localhost:8080", "http://evil.example", 403),
        ("localhost:8080", "http://evil.example:8080", 403),
        ("localhost:8080", "http://localhost:8080.evil.example", 403),
        ("localhost:8080", "http://localhost:8080@evil.example", 403),
        ("localhost:8080", "ftp://localhost:8080", 403),
        ("localhost:8080", "chrome-extension://localhost:8080", 403),
        ("localhost:8080", "null", 403),
        ("localhost:8080", "", 403),
    ],
)
def test_only_the_servers_own_page_may_send(host: str, origin: str, status: int, client: TestClient) -> None:
    assert ask(client, host=host, origin=origin).status_code == status
    reply = client.post("/api/describe", data={"text": "a red square"}, headers={"host": host, "origin": origin})
    assert reply.status_code == status
    if status == 403:
        assert "another web page" in reply.json()["detail"]
        wanted = {"host": host, "origin": origin, "access-control-request-method": "POST"}
        assert client.options("/api/describe", headers=wanted).status_code == 403
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_other_pages_may_link_to_the_page_and_do_no_more(client: TestClient) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    for path, changed in (
        ("/", {"sec-fetch-dest": "iframe"}),
        ("/", {"sec-fetch-mode": "no-cors"}),
        ("/api/about", {}),
        ("/page.js", {"sec-fetch-mode": "no-cors", "sec-fetch-dest": "script"}),
        ("/api/about", {"sec-fetch-site": "same-site"}),
    ):
        assert client.get(path, headers=link | changed).status_code == 403, (path, changed)
    assert client.post("/api/describe", data={"text": "a"}, headers=link).status_code == 403
    assert client.get("/api/about", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200), ("GET", "/page.js", 200), ("GET", "/page.css", 200), ("GET", "/api/about", 200),
        ("GET", "/api/openapi.json", 200), ("GET", "/api/docs", 404), ("GET", "/nowhere", 404),
        ("PUT", "/api/generate_image", 405), ("POST", "/api/describe", 422), ("POST", "/page.js", 405),
    ],
)  # fmt: skip
def test_every_answer_carries_the_security_headers(method: str, path: str, status: int, client: TestClient) -> None:
    reply = client.request(method, path)
    assert reply.status_code == status
    assert SECURITY_HEADERS.items() <= dict(reply.headers).items()
    assert "unsafe" not in reply.headers["content-security-policy"], "no inline script or style"


def test_the_page_has_nothing_that_the_policy_forbids_or_another_server_holds(client: TestClient) -> None:
    page = client.get("/").text
    assert '<script src="page.js"' in page and "<style" not in page and " style=" not in page and " on" + "click" not in page
    assert "://" not in page + client.get("/page.js").text + client.get("/page.css").text


class Panic(BaseException):
    """What a panic in a Rust library is to Python."""


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, RecursionError, Panic])
def test_an_exception_costs_one_request(
    kind: type[BaseException],
    client: TestClient,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> str:
        raise kind("/secret/place")

    with monkeypatch.context() as patch:
        patch.setattr(session, "text", fail)
        reply = client.post("/api/describe", data={"text": "a red square"})
    assert reply.status_code == 500 and reply.json()["detail"].startswith("internal error ")
    assert "secret" not in reply.text and SECURITY_HEADERS.items() <= dict(reply.headers).items()
    assert caplog.text.count("Traceback") == 1 and "/secret/place" in caplog.text and "POST '/api/describe'" in caplog.text
    assert client.post("/api/describe", data={"text": "a red square"}).status_code == 200


def test_messages_are_one_line_and_name_no_folder_of_the_server(client: TestClient, session: Session) -> None:
    from opt_ds.errors import UserError

    def fail(*_: object) -> str:
        raise UserError("/srv/models/mine/processor/dvae: the model has no dVAE; see http://a/b/c")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "text", fail)
        reply = client.post("/api/describe", data={"text": "a red square"})
    assert reply.status_code == 422 and reply.json()["detail"] == "dvae: the model has no dVAE; see http://a/b/c"
    long = client.post("/api/generate_image", data={"text": "x" * 20_000, "count": 9}).json()["detail"]
    assert isinstance(long, str) and "text:" in long and "count:" in long and len(long) < 200, "the input is not sent back"


_PART = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\na red square\r\n--b--\r\n'


@pytest.mark.parametrize(
    ("content_type", "content", "status"),
    [
        ("multipart/form-data; boundary=b", b"--b\r\nrubbish", 422),
        ("multipart/form-data", b"abc", 400),
        ("multipart/form-data; boundary=b; charset=nonsense", _PART, 200),
        ("application/x-www-form-urlencoded", b"text=a%ED%A0%80%FF", 200),
        ("application/x-www-form-urlencoded", b"text=a%00b", 200),
        ("application/x-www-form-urlencoded", b"image=abc", 422),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % i for i in range(5000)), 400),
        ("application/json", b'{"text": "a"}', 415),
        ("text/plain", b"text=a", 415),
        ("", b"text=a", 415),
    ],
)  # fmt: skip
def test_odd_bodies_get_a_status_and_one_line(content_type: str, content: bytes, status: int, client: TestClient) -> None:
    reply = client.post("/api/describe", content=content, headers={"content-type": content_type})
    assert reply.status_code == status, reply.text
    if status != 200:
        assert isinstance(reply.json()["detail"], str) and "\n" not in reply.json()["detail"]
