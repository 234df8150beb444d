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
_Audio = Annotated[Path, typer.Option(help="Folder that the paths of the audio files are relative to.")]
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
    annotations: Annotated[
        list[Path], typer.Option(help="Karpathy's dataset_coco.json, or COCO's captions_….json. May be repeated.")
    ],
    images: _Images,
    output: _Output,
) -> None:
    """Import COCO captions in Karpathy's splits, or in COCO's own."""
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
    images: _Images,
    output: _Output,
    questions: Annotated[
        list[str] | None, typer.Option(help="v2_OpenEnded_…_questions.json, as FILE or SPLIT=FILE. May be repeated.")
    ] = None,
    annotations: Annotated[list[str] | None, typer.Option(help="v2_…_annotations.json. Once per --questions.")] = None,
    unanswered: Annotated[
        list[str] | None, typer.Option(help="Questions of a test set, which has no annotations, as FILE or SPLIT=FILE.")
    ] = None,
    min_count: Annotated[
        int, typer.Option(help="An answer is a label if it is the most frequent one of N questions.", min=1)
    ] = 9,
) -> None:
    """Import VQA v2: one question and its image per sample, with the annotators' answers as labels."""
    from opt_ds.ingest.importers.vqa import import_vqa as run

    given = (questions or [], annotations or [])
    _next(run(*given, output, images=images, min_count=min_count, unanswered=unanswered or []))


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


@imports.command("webdataset")
def webdataset(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Tar files, as PATTERN or SPLIT=PATTERN: a file, a folder, or a name with braces or *, such as "
            "'train=shards/{00000..00099}.tar'."
        ),
    ],
    output: _Output,
    member: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=ENDING for image, audio, text or labels, such as image=png, or a field of a .json member, such as "
            "text=json:caption. May be repeated. Default: the only image and audio; .txt, or the caption in .json."
        ),
    ] = None,
    last_dot: Annotated[
        bool, typer.Option("--last-dot", help="A key ends at the last dot of a name. Default: at the first one.")
    ] = False,
) -> None:
    """Import WebDataset tars, such as img2dataset's. Images and audio are read in place; nothing is unpacked."""
    from opt_ds.ingest.importers.webdataset import import_webdataset as run

    _next(run(shards, output, members=member or (), last_dot=last_dot))


@imports.command("hugging-face")
def hugging_face(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of save_to_disk, folders with Parquet shards, or such files, as PATTERN or SPLIT=PATTERN with braces "
            "or *."
        ),
    ],
    output: _Output,
    files: Annotated[
        Path | None, typer.Option(help="Folder that paths in the cells are relative to. Default: the first file's.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, such as text=caption. May be repeated.")
    ] = None,
) -> None:
    """Import a Hugging Face data set on disk: Arrow or Parquet files with Image and Audio columns."""
    from opt_ds.ingest.importers.hugging_face import import_hugging_face as run

    _next(run(sources, output, files=files, columns=column or ()))


@imports.command("metadata")
def metadata(
    folder: Annotated[
        Path, typer.Argument(help="Folder with metadata.jsonl, .csv or .parquet, in it or in its subfolders.")
    ],
    output: _Output,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, such as text=caption. May be repeated.")
    ] = None,
) -> None:
    """Import a folder of images or audio with a table of their file_name, as Hugging Face's ImageFolder reads it."""
    from opt_ds.ingest.importers.metadata_folder import import_metadata_folder as run

    _next(run(folder, output, columns=column or ()))


@imports.command("spoken-captions")
def spoken_captions(
    annotations: Annotated[
        list[str],
        typer.Option(help="SpokenCOCO_….json or the JSON of Places Audio Captions, as FILE or SPLIT=FILE. May be repeated."),
    ],
    images: _Images,
    audio: _Audio,
    output: _Output,
    keep_incomplete: _KeepIncomplete = False,
) -> None:
    """Import SpokenCOCO or Places Audio Captions: one audio file, its text and its image per sample."""
    from opt_ds.ingest.importers.spoken_captions import import_spoken_captions as run

    _next(run(annotations, output, images=images, audio=audio, keep_incomplete=keep_incomplete))


@imports.command("flickr8k-audio")
def flickr8k_audio(
    annotations: Annotated[Path, typer.Option(help="wav2capt.txt.")],
    images: _Images,
    audio: _Audio,
    output: _Output,
    captions: Annotated[
        Path | None, typer.Option(help="Flickr8k.token.txt, or dataset_flickr8k.json with splits. Default: no texts.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="SPLIT=FILE with a list of images, such as train=Flickr_8k.trainImages.txt. May be repeated."),
    ] = None,
    keep_incomplete: _KeepIncomplete = False,
) -> None:
    """Import Flickr8k Audio Captions: one audio file, its text and its image per sample."""
    from opt_ds.ingest.importers.flickr8k_audio import import_flickr8k_audio as run

    _next(run(annotations, output, images=images, audio=audio, captions=captions, splits=split or (),
              keep_incomplete=keep_incomplete))  # fmt: skip


@imports.command("blip")
def blip(
    annotations: Annotated[
        list[str], typer.Option(help="JSON list of image and caption, as FILE or SPLIT=FILE. May be repeated.")
    ],
    images: _Images,
    output: _Output,
) -> None:
    """Import a JSON list of images and captions, as BLIP and LAVIS publish them."""
    from opt_ds.ingest.importers.blip import import_blip as run

    _next(run(annotations, output, images=images))


@imports.command("common-voice")
def common_voice(
    annotations: Annotated[list[str], typer.Option(help="train.tsv, dev.tsv, …, as FILE or SPLIT=FILE. May be repeated.")],
    audio: Annotated[Path, typer.Option(help="Folder clips.")],
    output: _Output,
) -> None:
    """Import Common Voice: one clip and its sentence per sample."""
    from opt_ds.ingest.importers.common_voice import import_common_voice as run

    _next(run(annotations, output, audio=audio))


@imports.command("kaldi")
def kaldi(
    folders: Annotated[list[str], typer.Argument(help="Folders with wav.scp and text, as FOLDER or SPLIT=FOLDER.")],
    output: _Output,
    audio: Annotated[
        Path | None, typer.Option(help="Folder that the files in wav.scp are relative to. Default: that of wav.scp.")
    ] = None,
) -> None:
    """Import data folders of Kaldi: plain audio files in wav.scp, and their texts."""
    from opt_ds.ingest.importers.kaldi import import_kaldi as run

    _next(run(folders, output, audio=audio))
