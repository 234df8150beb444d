"""The web API: what it answers, what it refuses and with which status, and that it lives on."""

import base64
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from PIL import Image

from opt_ds.errors import UserError
from opt_ds.serving.app import build_app
from opt_ds.serving.limits import Limits
from opt_ds.serving.neighbours import evaluator_of
from opt_ds.serving.session import Session
from tests.serving.conftest import with_condition_dropout, without


@pytest.fixture(scope="module")
def client(address: str) -> httpx.Client:
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client


def test_any_mixture_is_described(client: httpx.Client, raw: Path) -> None:
    files = {"image": (raw / "0.png").read_bytes(), "audio": (raw / "0.wav").read_bytes()}
    answer = client.post("/api/describe", data={"text": "a red square"}, files=files).json()
    assert isinstance(answer["text"], str) and answer["notes"] == []
    assert set(answer["matching"]) == {"all", "image_audio", "text_audio", "text_image", "none"}
    assert len(answer["neighbours"]) == 5 and answer["neighbours"][0]["cosine"] >= answer["neighbours"][4]["cosine"]
    assert [len(word["regions"]) for word in answer["attention"]] == [16] * len(answer["attention"])
    assert all(max(word["frames"]) == 1.0 for word in answer["attention"])
    alone = client.post("/api/describe", files={"image": files["image"]}).json()
    assert "matching" not in alone and "attention" not in alone


def test_a_drawing_is_read_only_where_the_server_allows_it_and_never_one_that_names_other_files(
    client: httpx.Client, session: Session
) -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">%s<circle r="4"/></svg>'
    refused = client.post("/api/describe", files={"image": svg % b""})
    assert refused.status_code == 422 and "--allow-svg" in refused.text
    allowing = TestClient(build_app(session, allow_svg=True), base_url="http://localhost")
    assert allowing.post("/api/describe", files={"image": svg % b""}).status_code == 200
    answer = allowing.post("/api/describe", files={"image": svg % b'<image href="/etc/hostname"/>'})
    assert answer.status_code == 422
    assert "other files are never fetched" in answer.text


def test_images_are_generated(client: httpx.Client) -> None:
    answer = client.post("/api/generate_image", data={"text": "a red square", "count": 2}).json()
    images = [Image.open(io.BytesIO(base64.b64decode(p["png"].split(",")[1]))) for p in answer["images"]]
    assert [image.size for image in images] == [(64, 64)] * 2
    assert answer["images"][0]["matching"] >= answer["images"][1]["matching"]


def test_guidance_is_a_field_where_the_model_learned_it_and_otherwise_one_line(session: Session) -> None:
    def generated(app: Any, **fields: Any) -> httpx.Response:
        data = {"text": "a red square", "count": 1, **fields}
        return TestClient(app, base_url="http://localhost").post("/api/generate_image", data=data)

    able = with_condition_dropout(session)
    plain, app = generated(build_app(session)).json()["images"], build_app(able)
    assert generated(app, guidance=1).json()["images"] == generated(app).json()["images"] == plain
    guided = generated(app, guidance=4).json()["images"]
    assert guided != plain and generated(build_app(able, guidance=4.0)).json()["images"] == guided
    refused = generated(build_app(session), guidance=4)
    assert refused.status_code == 422 and "trained without dropped conditions" in refused.json()["detail"]
    for bad in ("-1", "nan", "inf", "many"):
        answer = generated(app, guidance=bad)
        assert answer.status_code == 422 and answer.json()["detail"].startswith("guidance: "), answer.text


def test_what_was_not_learned_is_left_out_and_the_rest_is_answered(session: Session, raw: Path) -> None:
    files = {"image": (raw / "0.png").read_bytes()}
    client = TestClient(build_app(without(session, "dtr", "matching")), base_url="http://localhost")
    answer = client.post("/api/describe", data={"text": "a red square"}, files=files).json()
    assert "text" not in answer and "matching" not in answer and answer["attention"]
    generated = client.post("/api/generate_image", data={"text": "a red square", "count": 2}).json()
    assert [image["matching"] for image in generated["images"]] == [None, None]
    assert "trained without matching" in generated["notes"][0]
    client = TestClient(build_app(without(session, "matching")), base_url="http://localhost")
    generated = client.post("/api/generate_image", data={"text": "a red square", "count": 2}).json()
    assert [image["matching"] for image in generated["images"]] == [None, None]
    assert "in the order of the log likelihood of the text" in generated["notes"][0]


@pytest.mark.parametrize(
    ("data", "files", "status", "expected"),
    [
        ({}, {}, 422, "no input"),
        ({"text": "x" * 20_000}, {}, 422, ""),
        ({}, {"image": b"no image"}, 422, "cannot be read"),
        ({}, {"audio": b"RIFF no sound"}, 422, "cannot be read"),
        ({}, {"image": b"x" * (Limits().upload_bytes + 1)}, 413, "are allowed"),
        ({"text": "a", "count": 100}, {}, 422, ""),
    ],
)
def test_bad_requests_get_a_status_and_a_reason(
    data: dict[str, object], files: dict[str, bytes], status: int, expected: str, client: httpx.Client
) -> None:
    reply = client.post("/api/generate_image", data=data, files=files)
    assert reply.status_code == status
    assert expected in str(reply.json()["detail"]) and "/tmp" not in reply.text
    assert client.get("/api/about").status_code == 200, "it lives on"


def test_the_fields_of_a_request_keep_to_the_limits_that_are_given(session: Session) -> None:
    client = TestClient(build_app(session, limits=Limits(text_characters=5, images=1)), base_url="http://localhost")
    assert client.post("/api/generate_image", data={"text": "a red"}).status_code == 200
    for data in ({"text": "a red "}, {"text": "a red", "count": 2}):
        assert client.post("/api/generate_image", data=data).status_code == 422


@pytest.mark.parametrize(
    ("path", "data", "expected"),
    [
        (
            "/api/generate_image",
            {"text": "a", "sead": "2"},
            'unknown field "sead" (did you mean "seed"?): choose from text, image',
        ),
        (
            "/api/describe",
            {"text": "a", "seed": "2"},
            'unknown field "seed": choose from text, image, audio, attention',
        ),
        ("/api/generate_image", {"text": ["a", "b"]}, "text: is given 2 times: give it once"),
        ("/api/generate_image?seed=2", {"text": "a"}, '"seed" is given in the URL: send it as a field of the form'),
    ],
)
def test_a_field_that_would_not_be_used_is_refused(
    path: str, data: dict[str, Any], expected: str, client: httpx.Client
) -> None:
    reply = client.post(path, data=data)
    assert reply.status_code == 422 and reply.json()["detail"].startswith(expected)


def test_an_upload_without_a_size_is_refused(client: httpx.Client) -> None:
    assert client.post("/api/generate_image", content=iter([b"a" * 10])).status_code == 411
    chunks = {"content": iter([b"a" * 10]), "headers": {"Content-Length": "10", "Transfer-Encoding": "chunked"}}
    assert client.post("/api/generate_image", **chunks).status_code == 411, "chunks are not what Content-Length says"


def test_a_small_upload_that_holds_a_long_audio_file_is_refused(client: httpx.Client) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000 * 301), 8000, format="FLAC")
    reply = client.post("/api/describe", files={"audio": file.getvalue()})
    assert reply.status_code == 422
    assert "301 s are more than 300)" in reply.json()["detail"], "the reason names no option that a server has not"


def test_fifty_requests_at_once_are_answered_or_sent_away(address: str) -> None:
    def ask(number: int) -> int:
        with httpx.Client(base_url=address, timeout=240) as own:
            return own.post("/api/describe", data={"text": f"a red square {number}"}).status_code

    with ThreadPoolExecutor(50) as threads:
        statuses = list(threads.map(ask, range(50)))
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 10
    assert ask(0) == 200


def test_a_client_that_hangs_up_takes_nothing_down(address: str, client: httpx.Client) -> None:
    host, port = address.removeprefix("http://").split(":")
    for part in (b"POST /api/describe HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc", b"GET / HT"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(part)
    time.sleep(0.2)
    assert client.post("/api/describe", data={"text": "a red square"}).status_code == 200


def test_another_store_is_refused_by_fingerprint(session: Session, tmp_path: Path) -> None:
    from opt_ds.store.synthetic import write_synthetic_store

    write_synthetic_store(tmp_path / "other", 10)
    with pytest.raises(UserError, match="its vocabulary is not the model's"):
        evaluator_of(session, tmp_path / "other")
