"""`opt-ds corpus`, `prepare`, `merge` and `inspect`: arguments in, one call, results out."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from opt_ds.errors import UserError, did_you_mean

_LOG = logging.getLogger(__name__)
_CORPORA = ("emoji",)
_Workers = Annotated[int, typer.Option(help="Processes that work at once, each on one thread.", min=1)]


def corpus(
    name: Annotated[str, typer.Argument(help="Which built-in corpus: emoji.")],
    output: Annotated[Path, typer.Option(help="Folder for manifest.jsonl, images/ and audio/. A stopped run resumes.")],
    workers: _Workers = 2,
    limit: Annotated[int | None, typer.Option(help="Take about this many samples, evenly spread.", min=1)] = None,
) -> None:
    """Write a built-in corpus as raw files and a manifest, ready for `opt-ds prepare`.

    emoji: 3,944 OpenMoji pictures, their English names, and the names spoken by Piper. About four minutes on two cores.
    """
    if name not in _CORPORA:
        raise UserError(f'corpus "{name}": unknown{did_you_mean(name, _CORPORA)}: choose {", ".join(_CORPORA)}')
    from opt_ds.prepare.importers.emoji import write_emoji_corpus

    manifest = write_emoji_corpus(output, workers=workers, limit=limit)
    _LOG.info(f"next: opt-ds prepare --manifest {manifest} --output STORE")


def prepare(
    manifest: Annotated[
        Path,
        typer.Option(
            help="JSONL, one sample a line: id, and any of image, text, audio, labels, group, split. "
            "Or a folder of name.jpg, name.txt, name.wav."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new feature store. A stopped run resumes.")],
    images: Annotated[
        str, typer.Option(help="Region extractor: grid (cells of a classifier), faster_rcnn, or npz (files made by one).")
    ] = "grid",
    image_weights: Annotated[
        Path | None, typer.Option(help="State dict of the detector or backbone. grid has its own.")
    ] = None,
    image_backbone: Annotated[
        str | None, typer.Option(help="grid: torchvision's name of the backbone of --image-weights, or timm/NAME.")
    ] = None,
    image_min_side: Annotated[int, typer.Option(help="faster_rcnn: pixels that the shorter side is scaled to.", min=1)] = 600,
    image_max_side: Annotated[int, typer.Option(help="faster_rcnn: unless the longer side then exceeds this.", min=1)] = 1000,
    speech: Annotated[str, typer.Option(help="Speech extractor: logmel or wav2vec2.")] = "logmel",
    speech_weights: Annotated[
        Path | None, typer.Option(help="wav2vec2: a torchaudio state dict or a Hugging Face folder.")
    ] = None,
    speech_layer: Annotated[
        int | None, typer.Option(help="wav2vec2: the Transformer layer whose output is taken, from 1. Default: the last.")
    ] = None,
    speech_window: Annotated[float, typer.Option(help="wav2vec2: seconds of a window of a longer recording.")] = 30.0,
    speech_overlap: Annotated[float, typer.Option(help="wav2vec2: seconds that neighbouring windows share.")] = 2.0,
    trim_silence: Annotated[bool, typer.Option(help="Cut the silence at both ends of recordings.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="Hugging Face folder of a WordPiece tokenizer. Default: train one.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of the tokenizer trained on the train split.", min=1)] = 1200,
    unicode_form: Annotated[str, typer.Option(help="Unicode normal form of texts: NFC, NFKC, NFD, NFKD or none.")] = "NFC",
    max_tokens: Annotated[int, typer.Option(help="Cut texts after this many tokens; the report counts them.", min=1)] = 510,
    max_pixels: Annotated[int, typer.Option(help="Refuse larger pictures, before decoding them.", min=1)] = 100_000_000,
    max_seconds: Annotated[float, typer.Option(help="Refuse longer recordings, before decoding them.")] = 3600.0,
    pixels: Annotated[
        bool, typer.Option(help="Keep each picture at 64 x 64 pixels, for the dVAE and picture grids.")
    ] = True,
    pool_frames: Annotated[int, typer.Option(help="Average this many neighbouring speech frames into one.", min=1)] = 1,
    max_frames: Annotated[
        int | None, typer.Option(help="Keep at most this many frames (after pooling).", min=1)
    ] = None,
    samples_per_shard: Annotated[
        int, typer.Option(help="Samples a file of the store; a stopped run resumes at the last whole one.", min=1)
    ] = 1024,
    compress: Annotated[bool, typer.Option(help="Compress shards with gzip: for archives, slower to read.")] = False,
    workers: _Workers = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    strict: Annotated[bool, typer.Option(help="Stop at the first sample that cannot be used, instead of skipping it.")] = False,
    retry_skipped: Annotated[
        bool, typer.Option(help="Try the files again that an earlier run skipped, and take in what is good now.")
    ] = False,
    allow_outside: Annotated[bool, typer.Option(help="Take files outside the manifest's folder too.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.", min=1)] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: only part i (from 0) of n, for a job array; opt-ds merge joins the parts.")
    ] = None,
) -> None:
    """Extract features from the files that a manifest names, and write them as a feature store.

    Samples that cannot be used are skipped and listed in the store's report.json. docs/data.md has recipes.
    """
    from opt_ds.prepare import PrepareSettings
    from opt_ds.prepare import prepare as run
    from opt_ds.prepare.finish import parse_share
    from opt_ds.prepare.importers.folder import folder_manifest

    share = parse_share(shard) if shard is not None else None

    settings = PrepareSettings(
        images=images,
        image_weights=image_weights,
        image_backbone=image_backbone,
        image_min_side=image_min_side,
        image_max_side=image_max_side,
        speech=speech,
        speech_weights=speech_weights,
        text=text,
        speech_layer=speech_layer,
        speech_window_s=speech_window,
        speech_overlap_s=speech_overlap,
        trim_silence=trim_silence,
        vocab_size=vocab_size,
        unicode_form=unicode_form,
        max_tokens=max_tokens,
        max_pixels=max_pixels,
        max_seconds=max_seconds,
        pixels=pixels,
        pool_frames=pool_frames,
        max_frames=max_frames,
        samples_per_shard=samples_per_shard,
        compression="gzip" if compress else None,
    )
    prepared = run(
        folder_manifest(manifest) if manifest.is_dir() else manifest,
        output,
        settings,
        workers=workers,
        device=device,
        strict=strict,
        limit=limit,
        allow_outside=allow_outside,
        share=share,
        retry_skipped=retry_skipped,
    )
    if prepared is not None:
        _log_training_notes(output)


def merge(
    store: Annotated[Path, typer.Argument(help="The store whose parts (STORE.part-…) lie beside it.")],
) -> None:
    """Join the parts that `opt-ds prepare --shard i/n` made into one feature store, and remove them.

    The store is the one that a single `opt-ds prepare` would have made, byte for byte.
    """
    from opt_ds.prepare.finish import merge_parts

    merge_parts(store)
    _log_training_notes(store)


def _log_training_notes(store: Path) -> None:
    from opt_ds.commands.stores import training_notes

    for note in training_notes(store):
        _LOG.info(f"note: {note}")
