"""`opt-ds inspect`, `split`, `update` and `convert`: tools for an existing feature store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import ExtractorOption, FrameOptions, Pixels, ReadingOptions, TokenizerOptions, parse_extractor_options
from opt_ds.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

_Store = Annotated[Path, typer.Argument(help="Folder of a feature store.")]


def inspect_store(
    store: _Store,
    sample: Annotated[
        str | None, typer.Option(help="Show this sample in full: its id, or #N for sample N, counted from 0.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="With --sample: manifest that names its image. Boxes are drawn on the image.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder for lengths.png and the PNG of --sample.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Preset or YAML file of the training that the notes refer to. Default: that of pretrain.py."),
    ] = None,
    near_duplicates: Annotated[
        bool,
        typer.Option("--near-duplicates/--no-near-duplicates", help="Count near-duplicates."),
    ] = True,
) -> None:
    """Check a feature store and print a summary. The exit code is 2 if a check fails.

    Checked are checksums, NaN, ranges, offsets, rows, splits and store.json. Notes report what training would refuse
    and what the model's limits truncate. They do not change the exit code.
    """
    from opt_ds.store.inspect import inspect_store as inspect

    if manifest is not None and sample is None:
        raise UserError("--manifest requires --sample, whose image it names: add --sample")
    inspection = inspect(store, near_duplicates=near_duplicates)
    _print(inspection.summary)
    for note in inspection.notes:
        typer.echo(f"note: {note}")
    for failure in inspection.failures:
        typer.echo(f"FAILED {failure}", err=True)
    if inspection.failures:
        raise typer.Exit(2)
    for note in training_notes(store, config):
        typer.echo(f"note: {note}")
    typer.echo("all checks passed")
    if images is not None:
        _draw_lengths(store, images)
    if sample is not None:
        _show_sample(store, sample, manifest, images)


def training_notes(store: Path, source: str | None = None) -> list[str]:
    """Return notes on a store: why training would reject it, and what the model's limits drop.

    `source` is a preset or a YAML file; None means the one that pretrain.py would use.
    """
    from opt_ds.store.reader import FeatureStore
    from opt_ds.tools.doctor import default_config
    from opt_ds.training.preflight import settle, training_problems
    from opt_ds.training.preflight import training_notes as notes

    config, _, _ = settle(source or default_config([str(store)]), [], [str(store)])
    opened = [FeatureStore(store)]
    return [
        *(f"training would refuse: {problem}" for problem in training_problems(config, opened)),
        *(f"with {config.preset}, {line}" for line in notes(config, opened)),
    ]


def _print(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")


def _draw_lengths(store: Path, images: Path) -> None:
    from opt_ds.store.files import atomic_file
    from opt_ds.store.lengths import LENGTHS_FILE, draw_lengths, shard_lengths
    from opt_ds.store.schema import load_description

    images.mkdir(parents=True, exist_ok=True)
    description = load_description(store)
    lengths = shard_lengths([store / shard.file for shard in description.shards], description.modalities)
    with atomic_file(images / LENGTHS_FILE) as temporary:
        draw_lengths(lengths, temporary, description.units)
    typer.echo(f"wrote {images / LENGTHS_FILE}")


def _show_sample(store: Path, name: str, manifest: Path | None, images: Path | None) -> None:
    from opt_ds.ingest.manifest import read_manifest
    from opt_ds.store import FeatureStore
    from opt_ds.store.show import describe_sample, draw_sample, find_sample

    opened = FeatureStore(store)
    index = find_sample(opened, name)
    _print(describe_sample(opened, index))
    if images is None:
        return
    original = None
    if manifest is not None:
        lines = read_manifest(manifest, allow_outside=True, further=tuple(opened.description.further)).lines
        file = next((line.image for line in lines if line.id == opened.sample_id(index)), None)
        original = _original_image(manifest.parent / file) if file is not None else None
    target = images / f"sample-{index}.png"
    draw_sample(opened, index, target, original)
    typer.echo(f"wrote {target}")


def _original_image(file: Path) -> "Image":
    from opt_ds.decoding.decoder import DecodingError, own_decoder

    try:
        return own_decoder().image(file).content
    except DecodingError as error:
        raise UserError(
            f"{file}: not readable as an image ({error}): omit --manifest to show the sample without it"
        ) from None


def split(
    store: _Store,
    ratio: Annotated[
        list[str] | None,
        typer.Option(help="SPLIT=FRACTION, such as train=0.9. May be repeated. The fractions sum to 1."),
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="CSV or .tsv of sample id and split. Other samples keep their split.")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="CSV or .tsv of group and split. Other groups keep their split.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --ratio: seed of the assignment.")] = 0,
    source: Annotated[
        str | None, typer.Option("--from", help="With --ratio: reassign only samples of this split. Default: all.")
    ] = None,
    ignore_near_duplicates: Annotated[
        bool, typer.Option("--ignore-near-duplicates", help="Do not compare images.")
    ] = False,
) -> None:
    """Reassign a store's samples to splits: by ratio, by ids or by groups.

    By ratio, groups stay together, and so do groups that share a near-duplicate image. By ids or groups,
    near-duplicates between splits are counted.
    """
    from opt_ds.store.files import exclusive_use
    from opt_ds.store.split import parse_ratios, split_by_list, split_by_ratio

    given = [option for option in (ratio, ids, groups) if option]
    if len(given) != 1:
        raise UserError("opt-ds split: give one of --ratio, --ids and --groups")
    if source is not None and not ratio:
        raise UserError("--from requires --ratio: --ids and --groups name the samples themselves")
    ratios = parse_ratios(ratio) if ratio else {}
    with exclusive_use(store):
        if ratio:
            description = split_by_ratio(
                store, ratios, seed, source, near_duplicates_together=not ignore_near_duplicates
            )
        else:
            description = split_by_list(
                store,
                (ids or groups),  # type: ignore[arg-type]
                by_group=groups is not None,
                count_near_duplicates=not ignore_near_duplicates,
            )
    typer.echo(f"{store}: {', '.join(f'{name} {count}' for name, count in description.split_counts.items())}")


@with_option_groups
def update(
    *,
    store: _Store,
    modality: Annotated[
        str,
        typer.Option(
            help="What to add or replace: text, image, audio, codes, image_labels (classes of the regions by k-means), or a "
            "further modality with its --extractor."
        ),
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="image, audio, further ones: manifest that names the samples' files. text: new texts; default: the store's "
            "own."
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="image: grid, faster_rcnn, vit, hf_detector, region_files or npz; audio: logmel, hf_speech, wav2vec2 or "
            "frame_files; image_labels: kmeans:K or the folder of a store; or the name of an installed package's, or "
            "module:Class."
        ),
    ] = None,
    extractor_option: ExtractorOption = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights of the extractor; codes: folder of the dVAE; text: folder of a tokenizer (default: train one)."
        ),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="grid: torchvision's name of the backbone of --weights.")] = None,
    layer: Annotated[
        int | None, typer.Option(help="hf_speech, wav2vec2: layer whose output is used, from 1. Default: the last.")
    ] = None,
    frames: FrameOptions,
    tokenizer: TokenizerOptions,
    pixels: Pixels = True,
    reading: ReadingOptions,
) -> None:
    """Add or replace one modality of a store. The features of the others are kept."""
    from opt_ds.store.clusters import IMAGE_LABELS
    from opt_ds.store.schema import load_description

    known: tuple[str, ...] = ("text", "image", "audio", "codes", IMAGE_LABELS)
    if modality not in known and extractor is None and not did_you_mean(modality, known):
        known += tuple(load_description(store).further)
    if modality not in known and extractor is None:
        raise UserError(
            f'--modality "{modality}": unknown{did_you_mean(modality, known)}: choose {", ".join(known)}, or name the '
            "--extractor of a new one"
        )
    if modality == IMAGE_LABELS:
        from opt_ds.ingest.image_labels import update_image_labels

        if extractor is None:
            raise UserError(f"--modality {IMAGE_LABELS}: write --extractor kmeans:K, or name a store whose clusters are taken")
        update_image_labels(store, extractor)
        return
    if modality == "codes":
        from opt_ds.devices import choose_device
        from opt_ds.dvae.codes import CodeExtractor, write_missing_codes

        if weights is None:
            raise UserError("--modality codes: name the dVAE that opt-ds train-dvae wrote with --weights")
        write_missing_codes(store, CodeExtractor.from_pretrained(weights, choose_device(reading.device)))
        return
    from opt_ds.ingest.settings import PrepareSettings
    from opt_ds.ingest.update import update_modality

    if modality == "text":
        from opt_ds.ingest.update_text import update_text

        settings = PrepareSettings(text=weights, **vars(tokenizer))
        update_text(store, manifest, settings, strict=reading.strict, allow_outside=reading.allow_outside)
        return

    if manifest is None:
        raise UserError(f"--modality {modality}: name the manifest of the samples' files with --manifest")
    options = parse_extractor_options(extractor_option)
    for kind in options:
        if kind != modality:
            raise UserError(f'--extractor-option {kind}: this command makes features of {modality}: write {modality}.KEY=VALUE')
    if modality == "image":
        named = {"images": extractor} if extractor is not None else {}
        settings = PrepareSettings(
            **named,
            image_weights=weights,
            image_backbone=backbone,
            pixels=pixels,
            extractor_options=options,
        )
    elif modality == "audio":
        named = {"speech": extractor} if extractor is not None else {}
        settings = PrepareSettings(
            **named,
            speech_weights=weights,
            speech_layer=layer,
            extractor_options=options,
            **vars(frames),
        )
    elif extractor is None:
        raise UserError(f"--modality {modality}: name its extractor with --extractor")
    else:
        given = {"weights": weights} if weights is not None else {}
        settings = PrepareSettings(
            extractors={modality: extractor}, extractor_options={modality: {**given, **options.get(modality, {})}}
        )
    update_modality(store, manifest, modality, settings, **vars(reading))


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Feature store, folder with UNITER's LMDB of image features, or table of image features: TSV of LXMERT, Oscar "
            "or bottom-up-attention, HDF5, safetensors or NPZ with an entry per image."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the new store. For image features: folder for .npz files.")],
    compress: Annotated[
        bool, typer.Option(help="Compress the new store with gzip, for archives. Reading is slower.")
    ] = False,
) -> None:
    """Copy a store, compressed or uncompressed, or extract the image features of a database or table."""
    from opt_ds.ingest.importers.feature_tables import export_table
    from opt_ds.ingest.importers.uniter import export_lmdb, is_lmdb
    from opt_ds.store.convert import copy_store

    if is_lmdb(source):
        export_lmdb(source, output)
        return
    if source.is_file():
        export_table(source, output)
        return
    description = copy_store(source, output, "gzip" if compress else None)
    size = sum(shard.bytes for shard in description.shards) / 2**20
    typer.echo(f"{output}: {description.num_samples} samples, {size:.1f} MiB, compression {description.compression}")
