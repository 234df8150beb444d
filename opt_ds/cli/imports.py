"""`opt-ds import …`: convert published collections, folders and tables to a manifest for `opt-ds prepare`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

_LOG = logging.getLogger(__name__)

imports = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Write a manifest from a published collection's files."
)

_Output = Annotated[
    Path, typer.Option(help="Manifest to write, such as my/manifest.jsonl. A report is written next to it.")
]
_Images = Annotated[Path, typer.Option(help="Folder of the images. Subfolders are searched.")]
_KeepIncomplete = Annotated[
    bool,
    typer.Option("--keep-incomplete", help="Keep samples whose image or audio file is missing, without that modality."),
]


def _next(manifest: Path) -> None:
    outside = any('": "../' in line for line in manifest.open(encoding="utf-8"))
    _LOG.info(f"next: opt-ds prepare --manifest {manifest} --output STORE{' --allow-outside' if outside else ''}")


@imports.command("localized-narratives")
def localized_narratives(
    annotations: Annotated[list[Path], typer.Option(help="JSONL file of narratives. May be repeated.")],
    images: _Images,
    output: _Output,
    audio: Annotated[
        Path | None, typer.Option(help="Folder that the paths in voice_recording are relative to.")
    ] = None,
    labels: Annotated[
        list[Path] | None, typer.Option(help="CSV of Open Images' image-level labels. May be repeated.")
    ] = None,
    label_names: Annotated[Path | None, typer.Option(help="CSV of Open Images' class descriptions.")] = None,
    keep_incomplete: _KeepIncomplete = False,
) -> None:
    """Import Localized Narratives of Open Images, COCO, Flickr30k or ADE20K: text, images, speech, labels."""
    from opt_ds.ingest.importers.localized_narratives import import_localized_narratives as run

    _next(run(annotations, output, images=images, audio=audio, labels=labels or (), label_names=label_names,
              keep_incomplete=keep_incomplete))  # fmt: skip


@imports.command("conceptual-captions")
def conceptual_captions(
    annotations: Annotated[
        list[str], typer.Option(help="TSV of caption and URL, as FILE or SPLIT=FILE. May be repeated.")
    ],
    images: Annotated[list[Path], typer.Option(help="Folder of the images. Once per --annotations.")],
    output: _Output,
    pattern: Annotated[
        str, typer.Option(help="File name of an image: {index} of its row, {crc32} or {md5} of its URL.")
    ] = "{index:09d}",
    url_first: Annotated[bool, typer.Option("--url-first", help="The URL comes before the caption (CC12M).")] = False,
    first_index: Annotated[int, typer.Option(help="The {index} of the first row after the header.")] = 0,
) -> None:
    """Import Conceptual Captions or CC12M with the downloaded images. Dead links are reported."""
    from opt_ds.ingest.importers.conceptual_captions import import_conceptual_captions as run

    _next(run(annotations, output, images=images, pattern=pattern, url_first=url_first,
              first_index=first_index))  # fmt: skip


@imports.command("visual-genome")
def visual_genome(
    annotations: Annotated[list[Path], typer.Option(help="region_descriptions.json. May be repeated.")],
    images: _Images,
    output: _Output,
    image_data: Annotated[Path | None, typer.Option(help="image_data.json, which lists COCO's images.")] = None,
    leave_out: Annotated[
        Path | None, typer.Option(help="dataset_coco.json, whose val and test images are left out.")
    ] = None,
    max_phrases: Annotated[
        int | None, typer.Option(help="Largest number of phrases per image. Default: all.", min=1)
    ] = None,
) -> None:
    """Import Visual Genome's region descriptions: one phrase and the complete image per sample."""
    from opt_ds.ingest.importers.visual_genome import import_visual_genome as run

    _next(run(annotations, output, images=images, image_data=image_data, leave_out=leave_out, max_phrases=max_phrases))


@imports.command("coco")
def coco(
    annotations: Annotated[list[Path], typer.Option(help="Karpathy's dataset_coco.json. May be repeated.")],
    images: _Images,
    output: _Output,
) -> None:
    """Import COCO captions in Karpathy's splits."""
    from opt_ds.ingest.importers.karpathy import import_karpathy as run

    _next(run(annotations, output, images=images))


@imports.command("flickr30k")
def flickr30k(
    annotations: Annotated[
        list[Path], typer.Option(help="dataset_flickr30k.json or results_….token. May be repeated.")
    ],
    images: _Images,
    output: _Output,
) -> None:
    """Import Flickr30k, in Karpathy's splits or from its own token file."""
    from opt_ds.ingest.importers.karpathy import import_karpathy as run

    _next(run(annotations, output, images=images))


@imports.command("vqa")
def vqa(
    questions: Annotated[
        list[str], typer.Option(help="v2_OpenEnded_…_questions.json, as FILE or SPLIT=FILE. May be repeated.")
    ],
    annotations: Annotated[list[str], typer.Option(help="v2_…_annotations.json. Once per --questions.")],
    images: _Images,
    output: _Output,
    min_count: Annotated[
        int, typer.Option(help="An answer is a label if it is the most frequent one of N questions.", min=1)
    ] = 9,
) -> None:
    """Import VQA v2: one question and its image per sample, with the annotators' answers as labels."""
    from opt_ds.ingest.importers.vqa import import_vqa as run

    _next(run(questions, annotations, output, images=images, min_count=min_count))


@imports.command("folder")
def folder(
    folder: Annotated[Path, typer.Argument(help="Folder of name.jpg, name.txt, name.wav …")],
    output: Annotated[
        Path | None, typer.Option(help="Manifest to write. Default: manifest.jsonl in the folder.")
    ] = None,
    folder_splits: Annotated[
        bool | None,
        typer.Option(
            "--folder-splits/--no-folder-splits",
            help="Use the top-level folders train, valid and test as splits, or ignore folder names. "
            "Default: inferred; an unclear layout is an error.",
        ),
    ] = None,
) -> None:
    """Import a folder: files of the same name are one sample."""
    from opt_ds.ingest.importers.folder import import_folder as run

    _next(run(folder, output, folder_splits=folder_splits))


@imports.command("table")
def table(
    table: Annotated[Path, typer.Argument(help="CSV, TSV or Parquet file with one row per sample.")],
    output: _Output,
    files: Annotated[Path | None, typer.Option(help="Folder that paths are relative to. Default: the table's.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, such as text=caption. May be repeated.")
    ] = None,
) -> None:
    """Import a table with columns id, image, text, audio, labels, group, split, or others named by --column."""
    from opt_ds.ingest.importers.table import import_table as run

    _next(run(table, output, files=files, columns=column or ()))
