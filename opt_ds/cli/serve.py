"""`opt-ds generate`, `opt-ds export` and `opt-ds serve`: use a trained model."""

import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import BeamSize, ExtractorOptions, SamplingOptions, parse_extractor_options
from opt_ds.cli.program import MAX_SEED, check_output, finite, output_file
from opt_ds.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from opt_ds.serving.session import Session

# A name, an IPv4 address, or an IPv6 address (at least two colons, because a single one would separate a port).
_HOST_NAME = re.compile(r"[\w.-]+|\[?[0-9a-f]*:[0-9a-f.]*:[0-9a-f:.]*\]?", re.ASCII | re.IGNORECASE)
_Checkpoint = Annotated[
    Path, typer.Option(help="A run's output directory (its best checkpoint), one checkpoint, or an exported model.")
]


def utf8(value: str | None, param: typer.CallbackParam) -> str | None:
    """Return the text of an option. Raise UserError if it is not UTF-8, which Python passes on as lone surrogates."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        byte = os.fsencode(value[error.start])[0] if value else 0
        raise UserError(
            f"{param.opts[0]}: is not UTF-8 (byte 0x{byte:02x} at character {error.start + 1}): "
            "convert it, as with iconv -t UTF-8"
        ) from None
    return value


def host_names(names: list[str] | None) -> list[str] | None:
    """Return the names given for --allow-host. Raise UserError if one has a scheme or a port."""
    for name in names or ():
        if not _HOST_NAME.fullmatch(name):
            raise UserError(
                f'--allow-host "{name}": give a name alone, such as opt.example.org, without http:// and port'
            )
    return names


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """The raw input: any mixture of text, image and audio."""

    text: Annotated[str | None, typer.Option(help="Input text.", callback=utf8)] = None
    image: Annotated[Path | None, typer.Option(help="Input image: JPEG, PNG, WebP, SVG and others.")] = None
    audio: Annotated[Path | None, typer.Option(help="Input audio: WAV, FLAC, OGG, MP3 and others.")] = None


@with_option_groups
def generate(
    *,
    checkpoint: _Checkpoint,
    output: Annotated[
        Path, typer.Option(help="File to write: a text, or a PNG. -: standard output.", callback=output_file)
    ],
    to: Annotated[str, typer.Option(help="Output modality: text or image.")],
    given: InputOptions,
    beam_size: BeamSize = 4,
    sampling: SamplingOptions,
    seed: Annotated[int, typer.Option(help="Seed of the sampling of image codes.", min=0, max=MAX_SEED)] = 1,
    extractors: ExtractorOptions,
) -> None:
    """Generate a text or a 64×64 image from text, image, audio or any mixture of them.

    The raw input goes through the extractors that the model was trained with.
    """
    from opt_ds.model.generation import text_decoding

    if to not in ("text", "image"):
        raise UserError(f'--to "{to}": choose text or image{did_you_mean(to, ("text", "image"))}')
    if given == InputOptions():
        raise UserError("no input: give --text, --image, --audio, or several of them")
    if to == "image" and _is_stdout(output) and sys.stdout.isatty():
        raise UserError("--output -: a PNG cannot be shown on a terminal: redirect standard output, or name a file")
    session = _session(checkpoint, extractors)
    candidates = sampling.candidates
    if to == "image" and sampling.guidance != 1:
        session.require_guidance()
    sample = session.processor(**vars(given))
    if to == "text":
        written = session.text(sample, text_decoding(beam_size))
        _write(output, f"{written}\n".encode())
        if not _is_stdout(output):
            typer.echo(written)
        return
    reranker = session.reranker(sample, sampling.rank_by) if candidates > 1 else None
    image, score = session.ranked_images(sample, candidates, sampling.decoding(seed), reranker)[0]
    file = io.BytesIO()
    image.save(file, format="PNG")
    _write(output, file.getvalue())
    chosen = "" if score is None or not reranker else f" ({reranker.title} {score:.3f}, the best of {candidates})"
    typer.echo(f"{output}{chosen}", err=_is_stdout(output))


def export(
    checkpoint: _Checkpoint, output: Annotated[Path, typer.Option(help="New folder for the exported model.")]
) -> None:
    """Export a model: safetensors, configuration, tokenizer, extractors' fingerprints, dVAE and a model card.

    The folder loads with opt_ds.load, with OPTModel.from_pretrained (opt_ds.serving.pretrained), and with transformers'
    AutoModel after that module is imported.
    """
    check_output(output, "--output")
    from opt_ds.serving.export import export as run

    typer.echo(f"exported to {run(checkpoint, output)}")


@with_option_groups
def serve(
    *,
    checkpoint: _Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen on. The default is reachable from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on. 0: any free one.", min=0, max=65535)] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            callback=host_names,
            help="Further name of this server, for instance behind a proxy. May be repeated. "
            "Requests by names other than these, localhost, loopback addresses and --host are refused.",
        ),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Feature store whose nearest neighbours the page shows.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of limits. See docs/configuration.md, Serving.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one limit. May be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --store.")] = "train",
    allow_svg: Annotated[
        bool, typer.Option(help="Accept SVG drawings in requests. Rendering one may take 20 s.")
    ] = False,
    allow_further: Annotated[
        bool,
        typer.Option(
            help="Accept files of further modalities in requests. Code of other packages reads them in the server's process."
        ),
    ] = False,
    guidance: Annotated[
        float,
        typer.Option(
            help="Scale of classifier-free guidance for requests that give none (see opt-ds generate).", min=0.0, callback=finite
        ),
    ] = 1.0,
    extractors: ExtractorOptions,
) -> None:
    """Start a web page to try the model and a JSON API (schema: /api/openapi.json).

    There is no password. See docs/serving.md.
    """
    try:
        import python_multipart  # noqa: F401 - FastAPI's forms

        from opt_ds.serving.app import build_app
        from opt_ds.serving.server import build_server, listen
    except ImportError as error:
        raise UserError(f"opt-ds serve needs {error.name}: pip install 'opt_ds[web]'") from None
    from opt_ds.config.section import load_section
    from opt_ds.serving.limits import Limits

    limits = load_section(Limits, str(config) if config else None, set_ or ())
    from opt_ds.serving.neighbours import Neighbours, evaluator_of

    session = _session(checkpoint, extractors)
    if guidance != 1:
        session.require_guidance()
    neighbours = Neighbours(evaluator_of(session, store), split) if store else None
    app = build_app(
        session, neighbours, host=host, allow_hosts=allow_host or (), allow_svg=allow_svg, allow_further=allow_further,
        limits=limits, guidance=guidance,
    )  # fmt: skip
    try:
        listening = listen(host, port)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}: choose another one, or --port 0") from None
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    build_server(app, limits).run(sockets=[listening])


def _session(checkpoint: Path, extractors: ExtractorOptions) -> "Session":
    from opt_ds.devices import choose_device
    from opt_ds.serving.session import Session

    return Session.load(
        checkpoint,
        image_weights=extractors.image_weights,
        speech_weights=extractors.speech_weights,
        extractor_options=parse_extractor_options(extractors.extractor_option),
        device=choose_device(extractors.device),
    )


def _is_stdout(output: Path) -> bool:
    return str(output) == "-"


def _write(output: Path, content: bytes) -> None:
    from opt_ds.store.files import atomic_file

    if _is_stdout(output):
        typer.echo(content, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as temporary:
        temporary.write_bytes(content)
