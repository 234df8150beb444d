"""`opt-ds import …`: convert published collections, folders and tables to a manifest for `opt-ds prepare`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

_LOG = logging.getLogger(__name__)

imports = typer.Typer(add_completion=False, no_args_is_help=True, help="Write a manifest from a published collection's files.")

_Output = Annotated[Path, typer.Option(help="The manifest to write, such as my/manifest.jsonl. A report is put beside it.")]
_Images = Annotated[Path, typer.Option(help="Folder of the pictures; folders below it are searched.")]
_KeepIncomplete = Annotated[
    bool, typer.Option("--keep-incomplete", help="Keep samples whose picture or recording is missing, without it.")
]


def _next(manifest: Path) -> None:
    outside = any('": "../' in line for line in manifest.open(encoding="utf-8"))
    _LOG.info(f"next: opt-ds prepare --manifest {manifest} --output STORE{' --allow-outside' if outside else ''}")


@imports.command("localized-narratives")
def localized_narratives(
    annotations: Annotated[list[Path], typer.Option(help="JSONL file of narratives; may be given several times.")],
    images: _Images,
    output: _Output,
    recordings: Annotated[Path | None, typer.Option(help="Folder that voice_recording is relative to.")] = None,
    labels: Annotated[list[Path] | None, typer.Option(help="Open Images' image-level label CSV; several times.")] = None,
    label_names: Annotated[Path | None, typer.Option(help="Open Images' class descriptions CSV.")] = None,
    keep_incomplete: _KeepIncomplete = False,
) -> None:
    """Localized Narratives of Open Images, COCO, Flickr30k or ADE20K: text, pictures, speech, labels."""
    from opt_ds.ingest.importers.localized_narratives import import_localized_narratives as run

    _next(run(annotations, output, images=images, recordings=recordings, labels=labels or (), label_names=label_names,
              keep_incomplete=keep_incomplete))  # fmt: skip


@imports.command("conceptual-captions")
def conceptual_captions(
    annotations: Annotated[list[str], typer.Option(help="TSV of caption and URL, as FILE or SPLIT=FILE; several times.")],
    images: Annotated[list[Path], typer.Option(help="Folder of the pictures; once for each --annotations.")],
    output: _Output,
    pattern: Annotated[str, typer.Option(help="A picture's name: {index}, {crc32}, {md5} of its URL.")] = "{index:09d}",
    url_first: Annotated[bool, typer.Option("--url-first", help="The URL comes before the caption (CC12M).")] = False,
    first_index: Annotated[int, typer.Option(help="The {index} of the first row after the header.")] = 0,
) -> None:
    """Conceptual Captions and CC12M, of the pictures that were downloaded; dead links are reported."""
    from opt_ds.ingest.importers.conceptual_captions import import_conceptual_captions as run

    _next(run(annotations, output, images=images, pattern=pattern, url_first=url_first,
              first_index=first_index))  # fmt: skip


@imports.command("visual-genome")
def visual_genome(
    annotations: Annotated[list[Path], typer.Option(help="region_descriptions.json; may be given several times.")],
    images: _Images,
    output: _Output,
    image_data: Annotated[Path | None, typer.Option(help="image_data.json: which pictures are COCO's.")] = None,
    leave_out: Annotated[Path | None, typer.Option(help="dataset_coco.json: leave out its val and test pictures.")] = None,
    max_phrases: Annotated[int | None, typer.Option(help="At most so many phrases of a picture.", min=1)] = None,
) -> None:
    """Visual Genome's region descriptions: a phrase and the whole picture a sample."""
    from opt_ds.ingest.importers.visual_genome import import_visual_genome as run

    _next(run(annotations, output, images=images, image_data=image_data, leave_out=leave_out, max_phrases=max_phrases))


@imports.command("coco")
def coco(
    annotations: Annotated[list[Path], typer.Option(help="Karpathy's dataset_coco.json; may be given several times.")],
    images: _Images,
    output: _Output,
) -> None:
    """COCO captions in Karpathy's splits."""
    from opt_ds.ingest.importers.karpathy import import_karpathy as run

    _next(run(annotations, output, images=images))


@imports.command("flickr30k")
def flickr30k(
    annotations: Annotated[list[Path], typer.Option(help="dataset_flickr30k.json or results_….token; several times.")],
    images: _Images,
    output: _Output,
) -> None:
    """Flickr30k, in Karpathy's splits or from its own token file."""
    from opt_ds.ingest.importers.karpathy import import_karpathy as run

    _next(run(annotations, output, images=images))


@imports.command("vqa")
def vqa(
    questions: Annotated[list[str], typer.Option(help="v2_OpenEnded_…_questions.json, as FILE or SPLIT=FILE; several times.")],
    annotations: Annotated[list[str], typer.Option(help="v2_…_annotations.json; once for each --questions.")],
    images: _Images,
    output: _Output,
    min_count: Annotated[int, typer.Option(help="Questions that an answer must be the most frequent one of.", min=1)] = 9,
) -> None:
    """VQA v2: a question and its picture a sample, the annotators' answers its labels."""
    from opt_ds.ingest.importers.vqa import import_vqa as run

    _next(run(questions, annotations, output, images=images, min_count=min_count))


@imports.command("folder")
def folder(
    folder: Annotated[Path, typer.Argument(help="Folder of name.jpg, name.txt, name.wav …")],
    output: Annotated[Path | None, typer.Option(help="The manifest to write. Default: manifest.jsonl in the folder.")] = None,
    folder_splits: Annotated[
        bool | None,
        typer.Option(
            "--folder-splits/--no-folder-splits",
            help="Take the splits from the folders train, valid and test at the top, or ignore the names of folders. "
            "Default: infer it, and stop where that is not certain.",
        ),
    ] = None,
) -> None:
    """A plain folder: files of one name are one sample."""
    from opt_ds.ingest.importers.folder import import_folder as run

    _next(run(folder, output, folder_splits=folder_splits))


@imports.command("table")
def table(
    table: Annotated[Path, typer.Argument(help="CSV, TSV or Parquet file with a row a sample.")],
    output: _Output,
    files: Annotated[Path | None, typer.Option(help="What paths are relative to. Default: the table's folder.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=COLUMN, such as text=caption; several times.")] = None,
) -> None:
    """A table with columns id, image, text, audio, labels, group, split, or others named by --column."""
    from opt_ds.ingest.importers.table import import_table as run

    _next(run(table, output, files=files, columns=column or ()))
