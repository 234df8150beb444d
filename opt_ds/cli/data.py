"""`opt-ds corpus`, `prepare` and `merge`: write a corpus, prepare a store, merge its partitions."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import (
    ExtractorOption,
    FrameOptions,
    Pixels,
    ReadingOptions,
    TokenizerOptions,
    Workers,
    parse_extractor_options,
)
from opt_ds.errors import UserError, did_you_mean

_LOG = logging.getLogger(__name__)
_CORPORA = ("emoji", "scenes")


def corpus(
    name: Annotated[str, typer.Argument(help="Name of the built-in corpus: emoji or scenes.")],
    output: Annotated[Path, typer.Option(help="Folder for manifest.jsonl, images/ and audio/. A stopped run resumes.")],
    workers: Workers = 2,
    limit: Annotated[
        int | None, typer.Option(help="emoji: write only about N samples, evenly spread. Default: all.", min=1)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="scenes: number of samples. Default: 16000. More add to a corpus.", min=1, max=1_000_000),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="scenes: seed of everything random. Default: 1.")] = None,
    speech: Annotated[bool, typer.Option(help="scenes: speak the captions.")] = True,
) -> None:
    """Write a built-in corpus as raw files and a manifest, ready for `opt-ds prepare`.

    emoji: 3,944 OpenMoji images, their English names, and the names spoken by Piper. Takes about 4 minutes on two cores.

    scenes: one to three OpenMoji pictograms in a relation on a coloured ground, spoken captions, and the truth of each
    scene: further captions, hard negatives, questions.
    """
    if name not in _CORPORA:
        raise UserError(f'corpus "{name}": unknown{did_you_mean(name, _CORPORA)}: choose {", ".join(_CORPORA)}')
    _check_corpus_options(name, limit=limit, samples=samples, seed=seed, no_speech=None if speech else True)
    if name == "emoji":
        from opt_ds.ingest.importers.emoji import write_emoji_corpus

        manifest = write_emoji_corpus(output, workers=workers, limit=limit)
    else:
        from opt_ds.ingest.importers.scenes import DEFAULT_SAMPLES, DEFAULT_SEED, write_scenes_corpus

        manifest = write_scenes_corpus(
            output,
            samples=DEFAULT_SAMPLES if samples is None else samples,
            seed=DEFAULT_SEED if seed is None else seed,
            workers=workers,
            speech=speech,
        )
    _LOG.info(f"next: opt-ds prepare --manifest {manifest} --output STORE")


def _check_corpus_options(name: str, **given: int | bool | None) -> None:
    """Raise UserError for an option of another corpus."""
    own = ("limit",) if name == "emoji" else ("samples", "seed", "no_speech")
    for option, value in given.items():
        if value is not None and option not in own:
            raise UserError(f"--{option.replace('_', '-')}: corpus {name} does not have it: leave it out")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The region extractor; the fields are those of `PrepareSettings`."""

    images: Annotated[
        str,
        typer.Option(
            help="Extractor of image regions: grid (cells of a classifier), faster_rcnn, vit (patches of a vision transformer), "
            "hf_detector (object queries), region_files (own features), npz (UNITER's files), the name of an installed "
            "package's, or module:Class."
        ),
    ] = "grid"
    image_weights: Annotated[
        Path | None,
        typer.Option(help="State dict of the detector or backbone; vit: a folder. Default for grid: its own weights."),
    ] = None
    image_backbone: Annotated[
        str | None,
        typer.Option(
            help="grid: torchvision's name of the backbone of --image-weights, or timm/NAME. vit: the architecture that they "
            "must have."
        ),
    ] = None
    image_labels: Annotated[
        str | None,
        typer.Option(
            help="Classes of the regions for MRC: kmeans:K finds K clusters of the train split's features; the folder of a "
            "store or run takes its clusters. Default: the extractor's classes."
        ),
    ] = None
    image_min_side: Annotated[
        int, typer.Option(help="faster_rcnn: length of the scaled image's shorter side, in pixels.", min=1)
    ] = 600
    image_max_side: Annotated[
        int, typer.Option(help="faster_rcnn: largest length of the scaled image's longer side, in pixels.", min=1)
    ] = 1000


@dataclass(frozen=True, kw_only=True)
class SpeechOptions:
    """The speech extractor; the fields are those of `PrepareSettings`."""

    speech: Annotated[
        str,
        typer.Option(
            help="Extractor of audio frames: logmel, hf_speech (speech encoders of Hugging Face), wav2vec2, frame_files (own "
            "features), the name of an installed package's, or module:Class."
        ),
    ] = "logmel"
    speech_weights: Annotated[
        Path | None,
        typer.Option(help="hf_speech: a Hugging Face folder. wav2vec2: that or a torchaudio state dict."),
    ] = None
    speech_layer: Annotated[
        int | None,
        typer.Option(help="hf_speech, wav2vec2: layer whose output is used, counted from 1. Default: the last."),
    ] = None
    speech_window_s: Annotated[
        float,
        typer.Option(
            "--speech-window",
            help="hf_speech, wav2vec2: length of the windows that longer audio is split into, in seconds.",
        ),
    ] = 30.0
    speech_overlap_s: Annotated[
        float, typer.Option("--speech-overlap", help="hf_speech, wav2vec2: overlap of neighbouring windows, in seconds.")
    ] = 2.0
    trim_silence: Annotated[bool, typer.Option(help="Remove silence at both ends of audio.")] = False


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Limits of decoding, and storage of pixels; the fields are those of `PrepareSettings`."""

    max_pixels: Annotated[int, typer.Option(help="Refuse larger images before decoding them.", min=1)] = 100_000_000
    max_seconds: Annotated[float, typer.Option(help="Refuse longer audio before decoding it, in seconds.")] = 3600.0
    pixels: Pixels = True


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """The files of the store."""

    samples_per_shard: Annotated[
        int,
        typer.Option(help="Samples per file of the store. A stopped run resumes after the last complete file.", min=1),
    ] = 1024
    compress: Annotated[bool, typer.Option(help="Compress the shards with gzip, for archives. Reading is slower.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Which samples of the manifest are prepared."""

    retry_skipped: Annotated[bool, typer.Option(help="Process the files again that an earlier run skipped.")] = False
    limit: Annotated[
        int | None, typer.Option(help="Use only the first N valid lines of the manifest. Default: all.", min=1)
    ] = None
    partition: Annotated[
        str | None,
        typer.Option(help="i/n: prepare partition i (from 0) of n, for a job array. opt-ds merge joins them."),
    ] = None


@with_option_groups
def prepare(
    *,
    manifest: Annotated[
        Path,
        typer.Option(
            help="JSONL, one sample per line: id, and any of image, text, audio, labels, group, split. "
            "Or a folder of name.jpg, name.txt, name.wav."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new feature store. A stopped run resumes.")],
    image: ImageOptions,
    speech: SpeechOptions,
    extractor: Annotated[
        list[str] | None,
        typer.Option(
            "--extractor",
            metavar="KIND=NAME",
            help="Extractor of a further modality: the name of an installed package's, or module:Class; may be repeated. The "
            "manifest then has a field KIND, which names a file.",
        ),
    ] = None,
    extractor_option: ExtractorOption = None,
    text: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of a WordPiece tokenizer. Default: train one.")
    ] = None,
    tokenizer: TokenizerOptions,
    files: FileOptions,
    frames: FrameOptions,
    shards: ShardOptions,
    reading: ReadingOptions,
    samples: SampleOptions,
) -> None:
    """Extract the features of a manifest's files and write them as a feature store.

    Samples that cannot be used are skipped and listed in the store's report.json. See docs/data.md for examples.
    """
    from opt_ds.ingest import PrepareSettings
    from opt_ds.ingest import prepare as run
    from opt_ds.ingest.finish import parse_partition
    from opt_ds.ingest.importers.folder import folder_manifest

    partition = parse_partition(samples.partition) if samples.partition is not None else None
    settings = PrepareSettings(
        **vars(image),
        **vars(speech),
        **vars(tokenizer),
        **vars(files),
        **vars(frames),
        extractors=_parse_extractors(extractor),
        extractor_options=parse_extractor_options(extractor_option),
        text=text,
        samples_per_shard=shards.samples_per_shard,
        compression="gzip" if shards.compress else None,
    )
    prepared = run(
        folder_manifest(manifest, retry_skipped=samples.retry_skipped) if manifest.is_dir() else manifest,
        output,
        settings,
        workers=reading.workers,
        device=reading.device,
        strict=reading.strict,
        limit=samples.limit,
        allow_outside=reading.allow_outside,
        partition=partition,
        retry_skipped=samples.retry_skipped,
    )
    if prepared is not None:
        _log_training_notes(output)


def _parse_extractors(given: list[str] | None) -> dict[str, str]:
    """Return modality -> extractor of the values of --extractor. Raise UserError for another form than KIND=NAME."""
    extractors: dict[str, str] = {}
    for text in given or ():
        kind, equals, name = (part.strip() for part in text.partition("="))
        if not (kind and equals and name):
            raise UserError(f'--extractor "{text}": write it as KIND=NAME or KIND=module:Class')
        if kind in extractors:
            raise UserError(f"--extractor {kind} is given twice: give it once")
        extractors[kind] = name
    return extractors


def merge(
    store: Annotated[Path, typer.Argument(help="The store. Its partitions (STORE.part-…) are in the same folder.")],
) -> None:
    """Merge the partitions that `opt-ds prepare --partition i/n` wrote into one feature store, and remove them.

    The store equals, byte for byte, that of a single `opt-ds prepare`.
    """
    from opt_ds.ingest.finish import merge_parts

    merge_parts(store)
    _log_training_notes(store)


def _log_training_notes(store: Path) -> None:
    from opt_ds.cli.stores import training_notes

    for note in training_notes(store):
        _LOG.info(f"note: {note}")
