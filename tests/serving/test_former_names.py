"""Names of earlier versions: import paths that the cards of exported models name, an argument, a path of the server."""

import importlib
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from opt_ds.errors import UserError
from opt_ds.serving.app import build_app
from opt_ds.serving.model import Model
from opt_ds.serving.pretrained import OPTModel
from opt_ds.serving.session import Session


def test_the_former_name_of_the_package_warns_and_works() -> None:
    for name in ("opt_ds.serve.pretrained", "opt_ds.serve"):
        sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match="is opt_ds.serving.pretrained now"):
        former = importlib.import_module("opt_ds.serve.pretrained")
    assert former.OPTModel is OPTModel


def test_the_former_argument_of_rank_audio_warns_and_works(session: Session, raw: Path) -> None:
    model, audio = Model(session), [raw / f"{number}.wav" for number in range(3)]
    expected = model.rank_audio(audio, text="a red square")
    assert model.rank_audio(audio=audio, text="a red square") == expected
    with pytest.warns(DeprecationWarning, match="the argument recordings is now called audio"):
        assert model.rank_audio(recordings=audio, text="a red square") == expected
    with pytest.raises(UserError, match="recordings is the former name of audio: give one of them"):
        model.rank_audio(audio, recordings=audio, text="a red square")


def test_the_former_path_of_the_server_warns_once_and_answers_by_both_names(session: Session, logged: list[str]) -> None:
    client, fields = TestClient(build_app(session), base_url="http://localhost"), {"text": "a red square", "count": 2}
    answer = client.post("/api/generate_image", data=fields).json()
    assert len(answer["images"]) == 2 and "pictures" not in answer and not logged
    for _ in range(2):
        assert client.post("/api/paint", data=fields).json() == {**answer, "pictures": answer["images"]}
    assert len(logged) == 1 and "POST /api/paint, which is now called /api/generate_image" in logged[0]
    assert client.post("/api/paint", content=iter([b"a"])).status_code == 411, "it passes the queue"
    assert list(client.get("/api/openapi.json").json()["paths"]) == ["/api/about", "/api/describe", "/api/generate_image"]
