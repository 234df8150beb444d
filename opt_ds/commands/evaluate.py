"""`opt-ds evaluate …`: a checkpoint and a store in, figures out (JSON, and a table where there is one)."""

import atexit
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ds.commands import MAX_SEED, finite, output_file, rank_of_environment
from opt_ds.errors import UserError

if TYPE_CHECKING:
    from opt_ds.engine.distributed import ProcessGroup
    from opt_ds.evaluate.evaluator import Evaluator
    from opt_ds.model.dvae import DiscreteVAE
    from opt_ds.model.generation import DecodingConfig
    from opt_ds.store.reader import FeatureStore

evaluate = typer.Typer(
    help="Evaluate a checkpoint: one experiment of the paper, or all of a run: summary. Several ranks share the work: "
    "torchrun --nproc_per_node 4 -m opt_ds evaluate …",
    no_args_is_help=True,
)

_Checkpoint = Annotated[
    Path, typer.Option(help="A run's output directory (its best checkpoint) or one checkpoint; no exported folder.")
]
_Store = Annotated[Path, typer.Option(help="The feature store.")]
_Output = Annotated[Path, typer.Option(help="JSON file for the figures.", callback=output_file)]
_Split = Annotated[
    str | None, typer.Option(help="Split of the store. Default: test_variant, else the first that begins with test, else valid.")
]
_Limit = Annotated[int | None, typer.Option(help="Samples at most, a seeded choice.", min=1)]
_Seed = Annotated[int, typer.Option(help="Of the choice of samples and of sampling.", min=0, max=MAX_SEED)]
_Force = Annotated[
    bool, typer.Option("--force", help="Take a store of another vocabulary or other extractors too, and say what will be wrong.")
]


@evaluate.command()
def retrieval(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: _Split = None,
    candidates: Annotated[int, typer.Option(help="Gallery of the text decoder's likelihood.", min=2)] = 200,
    matching_candidates: Annotated[
        int, typer.Option(help="Gallery of the matching head, of triples too (summary takes 100, and 50 triples).", min=2)
    ] = 200,
    shortlist: Annotated[
        int | None, typer.Option(help="In two stages: a projection of [CLS] ranks all, the model re-ranks so many.", min=1)
    ] = None,
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """Zero-shot retrieval in five directions, by the matching head and by the text decoder's likelihood.

    With --shortlist a small projection, fitted on the frozen [CLS] of the training split, ranks the --candidates, and the model
    scores only the best with the query: for galleries of thousands.
    """
    from opt_ds.evaluate.retrieval import retrieval as run
    from opt_ds.evaluate.summary import retrieval_lines
    from opt_ds.evaluate.two_stage_retrieval import table, two_stage_retrieval

    evaluator, split = _evaluator_of_split(checkpoint, store, force, split)
    if shortlist is not None:
        figures = two_stage_retrieval(evaluator, split, shortlist, candidates, seed=seed)
        _write(figures, output)
        _echo(table(figures))
        return
    figures = run(evaluator, split, candidates, matching_candidates, matching_candidates, seed)
    _write(figures, output)
    _echo("\n".join(retrieval_lines(figures)))


@evaluate.command()
def transcription(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: _Split = None,
    limit: _Limit = None,
    beam_size: Annotated[int, typer.Option(help="1: greedy.", min=1)] = 4,
    ignore_words: Annotated[str, typer.Option(help="A second word error rate leaves these out: words, spaces between.")] = "",
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """Word error rate of audio→text, audio+image→text and image→text, beside shuffled audio and a constant caption."""
    from opt_ds.evaluate.summary import transcription_lines
    from opt_ds.evaluate.transcription import transcription as run
    from opt_ds.evaluate.words import normalize

    evaluator, split = _evaluator_of_split(checkpoint, store, force, split)
    evaluator.require("dtr", "write text")
    ignored = frozenset(normalize(ignore_words).split())
    figures = run(evaluator, split, limit=limit, seed=seed, options=_text_decoding(beam_size), ignored_words=ignored)
    _write(figures, output)
    _echo("\n".join(transcription_lines(figures)))


@evaluate.command()
def classification(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: _Split = None,
    train_split: Annotated[str, typer.Option(help="Split that the probe is fitted on.")] = "train",
    min_positives: Annotated[int, typer.Option(help="Training samples that a label needs.", min=1)] = 10,
    regularisation: Annotated[
        float, typer.Option(help="scikit-learn's C of the logistic regressions.", min=1e-6, callback=finite)
    ] = 1.0,
    limit: _Limit = None,
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """mAP of a linear probe on the frozen model, for each of the seven modality subsets (of what the store has)."""
    from opt_ds.evaluate.classification import classification as run
    from opt_ds.evaluate.classification import table

    evaluator, split = _evaluator_of_split(checkpoint, store, force, split, train_split)
    figures = run(evaluator, split, train_split, None, min_positives, regularisation, limit, seed)
    _write(figures, output)
    _echo(table(figures))


@evaluate.command()
def vqa(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: Annotated[str, typer.Option(help="Split of the store.")] = "valid",
    limit: _Limit = None,
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """VQA accuracy of a model fine-tuned for answers, beside one constant answer and the best that its answers allow."""
    from opt_ds.evaluate.vqa import vqa as run

    evaluator, split = _evaluator_of_split(checkpoint, store, force, split)
    figures = run(evaluator, split, limit=limit, seed=seed)
    _write(figures, output)
    _echo(
        f"VQA accuracy {figures['accuracy']:.1%} of {figures['questions']} questions (\"{figures['constant_answer']['answer']}\" "
        f"for all: {figures['constant_answer']['accuracy']:.1%}; best possible: {figures['best_possible']:.1%})"
    )


@evaluate.command()
def captioning(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: _Split = None,
    limit: Annotated[int | None, typer.Option(help="Pictures at most, a seeded choice.", min=1)] = None,
    beam_size: Annotated[int, typer.Option(help="1: greedy.", min=1)] = 4,
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """BLEU-4 and CIDEr of captions written from pictures, beside a constant caption and another picture's."""
    from opt_ds.evaluate.captioning import captioning as run

    evaluator, split = _evaluator_of_split(checkpoint, store, force, split)
    evaluator.require("dtr", "write text")
    figures = run(evaluator, split, limit, seed, _text_decoding(beam_size))
    _write(figures, output)
    for name, row in (("written", figures), *((n, figures[n]) for n in ("another_picture", "constant_caption"))):
        bleu = "undefined" if row["bleu_4"] is None else f"{row['bleu_4']:>6.1f}"
        cider = "undefined" if row["cider"] is None else f"{row['cider']:>6.3f}"
        _echo(f"  {name.replace('_', ' '):<20}BLEU-4 {bleu}   CIDEr {cider}")
    for metric, reason in figures.get("undefined", {}).items():
        _echo(f"  {metric} is undefined: {reason}")


@evaluate.command("image-generation")
def image_generation(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: _Split = None,
    limit: _Limit = None,
    dvae: Annotated[Path | None, typer.Option(help="Folder of the dVAE. Default: the store's own.")] = None,
    pictures: Annotated[int, typer.Option(help="Rows of the picture grid beside the JSON; 0: none.", min=0)] = 8,
    paint: Annotated[int, typer.Option(help="Samples to paint and judge, for each input; 0: none.", min=0)] = 100,
    candidates: Annotated[int, typer.Option(help="Pictures a sample; the one that the model matches best is kept.", min=1)] = 1,
    top_k: Annotated[int, typer.Option(help="Of the image codes; 0: all.", min=0)] = 32,
    top_p: Annotated[float, typer.Option(help="Of the image codes.", min=0.0, max=1.0, callback=finite)] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the image codes.", min=1e-3, callback=finite)] = 0.8,
    inception: Annotated[
        Path | None, typer.Option(help="Weights of torch-fidelity's Inception-v3: Fréchet inception distance.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face CLIP: CLIP score.")] = None,
    image_weights: Annotated[
        Path | None, typer.Option(help="Weights of the image extractor, if no package brings them.")
    ] = None,
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """Bits per image code from text, from audio and from both; pictures painted from each, judged, and a picture grid.

    Paintings are judged by the features of the model's own image extractor: whether the true picture is the nearest. --inception
    and --clip add what other networks say.
    """
    if output.suffix == ".png":
        raise UserError(f"--output {output}: the picture grid gets this name: name the figures' file, such as {output.stem}.json")
    from PIL import Image

    from opt_ds.evaluate.image_generation import Painter, bits_per_code, painted_figures, possible_inputs, table
    from opt_ds.evaluate.image_networks import ClipScore, check_inception
    from opt_ds.evaluate.picture_grid import draw_picture_grid
    from opt_ds.model.generation import DecodingConfig
    from opt_ds.serve.session import Session

    evaluator, split = _evaluator_of_split(checkpoint, store, force, split)
    evaluator.require("dir", "paint pictures")
    if paint + pictures and candidates > 1:
        evaluator.require("matching", "choose the best of several pictures: give --candidates 1")
    if not evaluator.store.has_codes:
        raise UserError(f"store {store}: it has no image codes: write them with opt-ds train-dvae --store {store}")
    if (pictures or paint) and not evaluator.store.has_pixels:
        raise UserError(f"store {store}: it has no pixels to judge pictures by: give --paint 0 --pictures 0")
    if inception is not None:
        check_inception(inception)
    if clip is not None:
        ClipScore(clip)
    inputs = possible_inputs(evaluator, split)
    options = DecodingConfig(method="sample", top_k=top_k, top_p=max(top_p, 1e-6), temperature=temperature, seed=seed)
    painter = look = None
    if pictures or paint:
        session = Session.load(checkpoint, image_weights=image_weights, device=str(evaluator.device), warn=lambda _: None)
        painter = Painter(_dvae(evaluator, dvae), options, candidates, session.belongs)
        look = session.look
    figures: dict[str, Any] = {name: bits_per_code(evaluator, split, name, limit, seed) for name in inputs}
    if painter is not None and paint:
        count = min(paint, limit or paint)
        for name, row in figures.items():
            row["painted"] = painted_figures(evaluator, split, name, painter, count, seed, look, inception, clip)
    if painter is not None and pictures:
        grid = output.with_suffix(".png")
        drawn = draw_picture_grid(evaluator, painter, split, pictures, seed)
        if evaluator.is_main:
            output.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(grid)
        figures["picture_grid"] = grid.name
    _write(figures, output)
    _echo(table(figures))


@evaluate.command()
def summary(
    checkpoint: _Checkpoint,
    store: _Store,
    output: _Output,
    split: Annotated[
        list[str] | None, typer.Option(help="Held-out split; may be repeated. Default: all that begin with test, else valid.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Gallery of the text decoder's likelihood.", min=2)] = 200,
    matching_candidates: Annotated[
        int, typer.Option(help="Gallery of the matching head, of triples 50 (retrieval takes 200 of both).", min=2)
    ] = 100,
    dvae: Annotated[Path | None, typer.Option(help="Folder of the dVAE. Default: the store's own.")] = None,
    seed: _Seed = 1,
    force: _Force = False,
) -> None:
    """What `make pretrain` ends with: validation losses, retrieval, word error rates, bits per image code, picture grids."""
    from opt_ds.engine.checkpoint import resolve_checkpoint
    from opt_ds.evaluate.summary import summarize, table
    from opt_ds.store.verify import open_store

    resolve_checkpoint(checkpoint)
    opened = open_store(store)
    splits = split or _held_out(opened)
    evaluator = _evaluator(checkpoint, opened, force, *splits)
    painter = _dvae(evaluator, dvae) if evaluator.store.has_codes and evaluator.store.has_pixels else None
    figures = summarize(evaluator, painter, splits, output.parent, candidates, matching_candidates, seed)
    _write(figures, output)
    _echo(table(figures))
    _echo(f"\ncheckpoint    {checkpoint}\nfigures       {output}")
    for name in [figures["splits"][s].get("picture_grid") for s in splits]:
        if name:
            _echo(f"picture grid  {output.parent / name}")
    _echo(f"curves        tensorboard --logdir {checkpoint}")


def _held_out(store: "FeatureStore", most: int | None = None) -> list[str]:
    """The store's held-out splits, `most` of them, where none was asked for."""
    from opt_ds.evaluate.evaluator import held_out_splits

    found = held_out_splits(store)[:most]
    seen = ", since none begins with test (early stopping saw it too)" if found == ["valid"] else ""
    _echo(f"note: evaluated on {', '.join(found)}{seen}; --split chooses", err=True)
    return found


def _evaluator_of_split(
    checkpoint: Path, store_path: Path, force: bool, split: str | None, *others: str
) -> "tuple[Evaluator, str]":
    """The evaluator, and the split that was asked for or the first held-out one; `others` are needed too."""
    from opt_ds.engine.checkpoint import resolve_checkpoint
    from opt_ds.store.verify import open_store

    resolve_checkpoint(checkpoint)
    store = open_store(store_path)
    split = split or _held_out(store, 1)[0]
    return _evaluator(checkpoint, store, force, split, *others), split


def _evaluator(checkpoint: Path, store: "FeatureStore", force: bool, *splits: str) -> "Evaluator":
    """Model and store, checked against each other before anything is computed; of several ranks, each joins here."""
    import torch

    from opt_ds.engine.checkpoint import load_model, resolve_checkpoint
    from opt_ds.engine.preflight import check_store
    from opt_ds.evaluate.evaluator import Evaluator
    from opt_ds.store.processor_files import PROCESSOR_FOLDER, check_identity

    for split in splits:
        store.split_samples(split)
    run = resolve_checkpoint(checkpoint).parent.parent
    check_identity(run / PROCESSOR_FOLDER, store, force, lambda line: _echo(f"note: {line}", err=True))
    group = _join_ranks()
    device = group.device if group else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(checkpoint, device)
    check_store(config, store)
    return Evaluator(model, config, store, device, group)


def _join_ranks() -> "ProcessGroup | None":
    """The ranks that a launcher started; None for a process of its own."""
    if not {"RANK", "WORLD_SIZE", "SLURM_STEP_ID"} & os.environ.keys():
        return None
    from opt_ds.engine.distributed import ProcessGroup, find_ranks

    ranks = find_ranks()
    if ranks.world_size == 1:
        return None
    group = ProcessGroup(ranks)
    atexit.register(group.close)
    return group


def _echo(text: str, err: bool = False) -> None:
    """Of several ranks the first one speaks."""
    if rank_of_environment() == 0:
        typer.echo(text, err=err)


def _text_decoding(beam_size: int) -> "DecodingConfig":
    from opt_ds.model.generation import DecodingConfig

    return DecodingConfig(method="beam" if beam_size > 1 else "greedy", beam_size=beam_size)


def _dvae(evaluator: "Evaluator", folder: Path | None) -> "DiscreteVAE":
    from opt_ds.model.dvae import DiscreteVAE
    from opt_ds.model.dvae_storage import load_store_dvae

    store = evaluator.store
    dvae = DiscreteVAE.from_pretrained(folder) if folder else load_store_dvae(store.path, store.description)
    return dvae.to(evaluator.device)


def _write(figures: dict[str, Any], output: Path) -> None:
    from opt_ds.store.files import write_json

    if rank_of_environment():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, figures)
