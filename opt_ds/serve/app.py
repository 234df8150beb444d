"""The web server: a page to try a model on, and a JSON API beside it.

    POST /api/describe   text, image, audio (any mixture) -> what the model writes, what belongs together (where it learned to),
                         neighbours, attention
    POST /api/paint      the same inputs -> pictures
    GET  /api/about      the model

Uploads are bounded, decoded from files of our own naming in a folder that is gone afterwards, and refused with a status code
that says why. One request at a time is computed; a bounded number may wait.
"""

import base64
import io
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image

from opt_ds.data.samples import Sample
from opt_ds.errors import UserError
from opt_ds.model.generation import DecodingConfig
from opt_ds.serve.attention import word_attention
from opt_ds.serve.neighbours import Neighbours
from opt_ds.serve.session import Session

MAX_UPLOAD_MIB, MAX_WAITING, MAX_TEXT_CHARACTERS, MAX_PICTURES = 20, 16, 10_000, 8
MAX_SECONDS = 300.0  # of a recording: a small file can hold hours of silence
_PAGE = Path(__file__).parent / "page.html"

_Text = Annotated[str | None, Form(max_length=MAX_TEXT_CHARACTERS)]
_Upload = Annotated[UploadFile | None, File()]


def build_app(session: Session, neighbours: Neighbours | None = None, *, allow_svg: bool = False) -> FastAPI:
    """The application around one model. Handlers are plain functions: Starlette runs them in threads, `turn` one at a time.

    `allow_svg`: uploads may be drawings, which can take the decoder's whole time limit.
    """
    app = FastAPI(title="opt_ds", docs_url="/api/docs", openapi_url="/api/openapi.json", redoc_url=None)
    turns, learned = _Turns(MAX_WAITING), session.config.learned_losses

    @app.middleware("http")
    async def bound_upload(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            size = int(request.headers.get("content-length", 0))
        except ValueError:
            return JSONResponse({"detail": "content-length is not a number"}, 400)
        # A body in chunks has no size before its end, whatever Content-Length says beside it.
        sized = "content-length" in request.headers and "transfer-encoding" not in request.headers
        if not sized and (request.method == "POST" or "transfer-encoding" in request.headers):
            return JSONResponse({"detail": "say the upload's size (Content-Length)"}, 411)
        if size > MAX_UPLOAD_MIB * 2**20:
            return JSONResponse({"detail": f"the upload is {size / 2**20:.0f} MiB, {MAX_UPLOAD_MIB} are allowed"}, 413)
        return await call_next(request)

    @app.exception_handler(UserError)
    async def bad_input(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return _PAGE.read_text(encoding="utf-8")

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        parameters = sum(p.numel() for p in session.model.parameters())
        return {"preset": session.config.preset, "parameters": parameters, "device": str(session.device),
                "extractors": session.processor.description.extractors, "neighbours": neighbours is not None}  # fmt: skip

    @app.post("/api/describe")
    def describe(
        text: _Text = None, image: _Upload = None, audio: _Upload = None, attention: Annotated[bool, Form()] = True
    ) -> dict[str, Any]:
        with turns.turn():
            sample, notes = _read(session, text, image, audio, allow_svg)
            answer: dict[str, Any] = {"notes": notes}
            if "dtr" in learned:
                answer["text"] = session.text(sample)
            given = sum(part is not None for part in (sample.token_ids, sample.region_features, sample.frames))
            if "matching" in learned and given > 1:
                answer["matching"] = session.matching(sample)
            if neighbours is not None:
                answer["neighbours"] = [vars(found) for found in neighbours.nearest(sample)]
            if attention and sample.token_ids is not None:
                answer["attention"] = word_attention(session, sample)
            return answer

    @app.post("/api/paint")
    def paint(
        text: _Text = None,
        image: _Upload = None,
        audio: _Upload = None,
        count: Annotated[int, Form(ge=1, le=MAX_PICTURES)] = 4,
        seed: Annotated[int, Form(ge=0, lt=2**31)] = 1,
    ) -> dict[str, Any]:
        with turns.turn():
            sample, notes = _read(session, text, image, audio, allow_svg)
            options = DecodingConfig(method="sample", top_k=32, temperature=0.8, seed=seed)
            painted = session.pictures(sample, count, options)
            if count > 1 and "matching" not in learned:
                notes.append("this model was trained without matching: the pictures are in the order of painting")
            return {"notes": notes, "pictures": [{"png": _png_url(p), "matching": score} for p, score in painted]}

    return app


class _Turns:
    """One computation at a time; who would be too far back in the queue is sent away."""

    def __init__(self, most: int) -> None:
        self._lock, self._places = threading.Lock(), threading.BoundedSemaphore(most)

    @contextmanager
    def turn(self) -> Any:
        if not self._places.acquire(blocking=False):
            raise HTTPException(503, "too many requests are waiting: try again soon", headers={"Retry-After": "2"})
        try:
            with self._lock:
                yield
        finally:
            self._places.release()


def _read(
    session: Session, text: str | None, image: UploadFile | None, audio: UploadFile | None, allow_svg: bool
) -> tuple[Sample, list[str]]:
    """The sample, and what was cut off from it."""
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="opt-ds-") as folder:
        # The names are ours: an upload's own name says nothing about where it is written.
        picture = _kept(image, Path(folder) / "image")
        recording = _kept(audio, Path(folder) / "audio")
        processor = session.processor.with_notes(notes.append, MAX_SECONDS, allow_svg=allow_svg)
        return processor(text or None, picture, recording), notes


def _kept(upload: UploadFile | None, path: Path) -> Path | None:
    if upload is None or not upload.size:
        return None
    path.write_bytes(upload.file.read())
    return path


def _png_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
