"""The web application: a page for trying a model, and a JSON API.

    POST /api/describe       text, image, audio (any mixture) -> generated text, match probabilities (if the model
                             learned matching), neighbours, attention
    POST /api/generate_image the same inputs -> images
    GET  /api/about          the model
    GET  /api/openapi.json   the API's schema

Requests pass the guard (opt_ds.serving.guard: allowed hosts and origins) and the queue (opt_ds.serving.admission: size,
time, order). Uploads are decoded from files with names chosen by the server, in a folder that is deleted afterwards.
Every error is answered with a status code and one line that states the reason.

There is no Swagger page. It loads its scripts from another server, which the Content-Security-Policy forbids and which
fails on a machine without internet access.
"""

import base64
import io
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image

from opt_ds.abilities import MATCH, WRITE_TEXT
from opt_ds.data.modalities import TEXT
from opt_ds.data.sample import Sample
from opt_ds.errors import UserError, did_you_mean
from opt_ds.evaluation.reranking import MatchingReranker, Reranker
from opt_ds.model.generation import DecodingConfig
from opt_ds.serving.admission import Admission, Queue
from opt_ds.serving.attention import word_attention
from opt_ds.serving.guard import Guard
from opt_ds.serving.limits import Limits
from opt_ds.serving.neighbours import Neighbours
from opt_ds.serving.processor import OPTProcessor
from opt_ds.serving.session import Session, matched

_LOG = logging.getLogger(__name__)
_LIMITS = Limits()
_HERE = Path(__file__).parent
_PAGE = {
    "/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"), "/page.css": ("page.css", "text/css"),
}  # fmt: skip
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^/\s:]+/)+")
_PLAIN_ENDING = re.compile(r"\.[A-Za-z0-9]{1,8}")

#: Former path of /api/generate_image; it goes with the next release.
_FORMER_PATH = "/api/paint"

_Upload = Annotated[UploadFile | None, File()]


def build_app(
    session: Session,
    neighbours: Neighbours | None = None,
    *,
    host: str = "127.0.0.1",
    allow_hosts: Iterable[str] = (),
    allow_svg: bool = False,
    allow_further: bool = False,
    limits: Limits = _LIMITS,
    guidance: float = 1.0,
) -> FastAPI:
    """Build the application for one model.

    Args:
        session: The model.
        neighbours: Index for the nearest samples of a store. None: no neighbours are reported.
        host: The address that the server listens on. See opt_ds.serving.guard.
        allow_hosts: Further names of the server.
        allow_svg: Whether uploads may be SVG drawings, which can take the decoder's whole time limit.
        allow_further: Whether uploads may be files of the model's further modalities, which code of other packages reads in
            this process.
        limits: Limits of connections, bodies, the queue and the fields of a request.
        guidance: Guidance of images of requests that give none (see `DecodingConfig`).

    Returns:
        The application.
    """
    # Types of the handlers' parameters. FastAPI validates with them and includes them in the schema.
    _Text = Annotated[str | None, Form(max_length=limits.text_characters)]  # noqa: N806
    _Count = Annotated[int, Form(ge=1, le=limits.images)]  # noqa: N806
    default_count, default_guidance = min(4, limits.images), guidance

    further = session.processor.further if allow_further else ()

    async def check_fields(request: Request) -> None:
        await _check_fields(request, further)

    async def further_of(request: Request) -> dict[str, Any]:
        form = await request.form()
        return {name: form[name] for name in further if name in form}

    def read(
        text: str | None, image: UploadFile | None, audio: UploadFile | None, others: dict[str, Any]
    ) -> tuple[Sample, list[str]]:
        notes: list[str] = []
        processor = session.processor.with_notes(notes, limits.audio_s, allow_svg=allow_svg)
        return _sample(processor, text, image, audio, others), notes

    app = FastAPI(title="opt_ds", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    queue = Queue(limits)
    reported: set[str] = set()
    _add_error_answers(app)
    _add_page(app)

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        parameters = sum(p.numel() for p in session.model.parameters())
        return {"preset": session.config.preset, "parameters": parameters, "device": str(session.device),
                "extractors": session.processor.description.extractors, "neighbours": neighbours is not None}  # fmt: skip

    @app.post("/api/describe", dependencies=[Depends(check_fields)])
    async def describe(
        request: Request,
        text: _Text = None,
        image: _Upload = None,
        audio: _Upload = None,
        attention: Annotated[bool, Form()] = True,
    ) -> dict[str, Any]:
        others = await further_of(request)

        def work() -> dict[str, Any]:
            sample, notes = read(text, image, audio, others)
            return {"notes": notes} | _describe(session, neighbours, sample, attention)

        return await queue.compute(request.receive, work)

    @app.post("/api/generate_image", dependencies=[Depends(check_fields)])
    @app.post(_FORMER_PATH, dependencies=[Depends(check_fields)], include_in_schema=False)
    async def generate_image(
        request: Request,
        text: _Text = None,
        image: _Upload = None,
        audio: _Upload = None,
        count: _Count = default_count,
        seed: Annotated[int, Form(ge=0, lt=2**31)] = 1,
        guidance: Annotated[float, Form(ge=0, le=100, allow_inf_nan=False)] = default_guidance,
    ) -> dict[str, Any]:
        others, is_former = await further_of(request), request.scope["route"].path == _FORMER_PATH
        if is_former:
            _report_former_path(reported)

        def work() -> dict[str, Any]:
            sample, notes = read(text, image, audio, others)
            reranker = _reranker(session, sample, notes) if count > 1 else None
            images = _generate(session, sample, count, seed, guidance, reranker)
            return {"notes": notes, "images": images, **({"pictures": images} if is_former else {})}

        return await queue.compute(request.receive, work)

    computed = {"/api/describe", "/api/generate_image", _FORMER_PATH}
    app.add_middleware(Admission, queue=queue, limits=limits, paths=computed)
    app.add_middleware(Guard, host=host, allow_hosts=tuple(allow_hosts))  # the middleware that is added last runs first
    return app


async def _check_fields(request: Request, further: Iterable[str]) -> None:
    """Raise UserError for an unknown field, a field that is sent twice, and parameters in the URL."""
    known = [*(field.alias for field in request.scope["route"].dependant.body_params), *further]
    if request.query_params:
        name = next(iter(request.query_params))
        raise UserError(f'"{name[:80]}" is given in the URL: send it as a field of the form')
    given = Counter(name for name, _ in (await request.form()).multi_items())
    for name, count in given.items():
        if name not in known:
            raise UserError(f'unknown field "{name[:80]}"{did_you_mean(name[:80], known)}: choose from {", ".join(known)}')
        if count > 1:
            raise UserError(f"{name}: is given {count} times: give it once")
    for name in further:
        if isinstance((await request.form()).get(name), str):
            raise UserError(f"{name}: a text: send a file")


def _add_error_answers(app: FastAPI) -> None:
    @app.exception_handler(UserError)
    async def bad_input(_: Request, error: UserError) -> JSONResponse:
        # Clients must not learn where the server keeps its files.
        return JSONResponse({"detail": _FOLDERS.sub("", str(error))}, 422)

    @app.exception_handler(RequestValidationError)
    async def bad_field(_: Request, error: RequestValidationError) -> JSONResponse:
        fields = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
        return JSONResponse({"detail": fields}, 422)


def _add_page(app: FastAPI) -> None:
    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=media_type)

    for path, (name, media_type) in _PAGE.items():
        add(path, (_HERE / name).read_bytes(), media_type)


def _describe(session: Session, neighbours: Neighbours | None, sample: Sample, attention: bool) -> dict[str, Any]:
    can = session.config.can
    answer: dict[str, Any] = {}
    if can(WRITE_TEXT):
        answer["text"] = session.text(sample)
    if can(MATCH) and len(matched(sample)) > 1:
        answer["matching"] = session.matching(sample)
    if neighbours is not None:
        answer["neighbours"] = [vars(found) for found in neighbours.nearest(sample)]
    if attention and TEXT in sample.items:
        answer["attention"] = word_attention(session, sample)
    return answer


def _reranker(session: Session, sample: Sample, notes: list[str]) -> Reranker | None:
    """Return what orders the images of an answer, and note any other order than by match probability."""
    try:
        reranker = session.reranker(sample)
    except UserError as error:
        notes.append(f"{_FOLDERS.sub('', str(error))} (the images are in the order of generation)")
        return None
    if not isinstance(reranker, MatchingReranker):
        notes.append(f"this model was trained without matching: the images are in the order of the {reranker.title}")
    return reranker


def _generate(
    session: Session, sample: Sample, count: int, seed: int, guidance: float, reranker: Reranker | None
) -> list[dict[str, Any]]:
    """Return the images. "matching" is a match probability, or null."""
    options = DecodingConfig(method="sample", top_k=32, temperature=0.8, seed=seed, guidance=guidance)
    matching = isinstance(reranker, MatchingReranker)
    return [
        {"png": _png_url(image), "matching": score if matching else None}
        for image, score in session.ranked_images(sample, count, options, reranker)
    ]


def _sample(
    processor: OPTProcessor,
    text: str | None,
    image: UploadFile | None,
    audio: UploadFile | None,
    others: dict[str, UploadFile],
) -> Sample:
    with tempfile.TemporaryDirectory(prefix="opt-ds-") as folder:
        # The server chooses the names, so that an upload's own name does not affect where it is written. The file of a further
        # modality keeps its ending, because its extractor may choose a format by it.
        kept = {name: _kept(upload, Path(folder) / f"{name}{_ending(upload)}") for name, upload in others.items()}
        further = {name: path for name, path in kept.items() if path is not None}
        image_file, audio_file = _kept(image, Path(folder) / "image"), _kept(audio, Path(folder) / "audio")
        return processor(text or None, image_file, audio_file, **further)


def _ending(upload: UploadFile) -> str:
    """Return the ending of an upload's own name, such as ".npz", or "" if it is longer or not plain."""
    ending = Path(upload.filename or "").suffix
    return ending if _PLAIN_ENDING.fullmatch(ending) else ""


def _kept(upload: UploadFile | None, path: Path) -> Path | None:
    if upload is None or not upload.size:
        return None
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


def _report_former_path(reported: set[str]) -> None:
    """Log, once per application, that a client uses the former path."""
    if _FORMER_PATH not in reported:
        reported.add(_FORMER_PATH)
        _LOG.warning(
            f"a client uses POST {_FORMER_PATH}, which is now called /api/generate_image (its answer has images, not "
            "pictures); the former path works until the next release"
        )


def _png_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
