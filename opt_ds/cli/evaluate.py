"""`opt-ds evaluate …`: evaluate a checkpoint on a store and write the figures (JSON and a table).

`EXPERIMENTS` is the list of subcommands. What they share (opening model and store, writing figures) is here, their options
are in `opt_ds/cli/evaluation_options.py`.
Each experiment is in `opt_ds/evaluation/experiments/<name>.py`, which is imported when it is called.
"""

import atexit
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from opt_ds.cli.evaluation_options import (
    CaptioningOptions,
    Choice,
    ClassificationOptions,
    ImageGenerationInputs,
    ImageGenerationOptions,
    Inputs,
    RetrievalOptions,
    ScenesInputs,
    ScenesOptions,
    SummaryInputs,
    SummaryOptions,
    Target,
    TranscriptionOptions,
    VqaInputs,
    VqaOptions,
)
from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import ProbeOptions
from opt_ds.cli.program import rank_of_environment
from opt_ds.log import ON_STDERR

if TYPE_CHECKING:
    from opt_ds.evaluation.evaluator import Evaluator
    from opt_ds.evaluation.reranking import ImageRater
    from opt_ds.store.reader import FeatureStore
    from opt_ds.training.distributed import ProcessGroup

_LOG = logging.getLogger(__name__)


class Row(NamedTuple):
    """A subcommand: its name and help text, the group of its own options, and the group of its inputs."""

    name: str
    help: str
    options: type
    inputs: type[Target] = Inputs


EXPERIMENTS = (
    Row(
        "retrieval",
        "Measure zero-shot retrieval in five directions, by the matching head and by the text decoder's likelihood, "
        "beside a projection of [CLS] and of an untrained encoder's [CLS].\n\n"
        "With --shortlist, a projection of [CLS], fitted on the training split, ranks the gallery first. The model then "
        "scores only the top N. Use it for galleries of thousands.",
        RetrievalOptions,
    ),
    Row(
        "transcription",
        "Measure the word error rate of audio→text, audio+image→text and image→text, beside that with another "
        "sample's audio or image and that of a constant caption.",
        TranscriptionOptions,
    ),
    Row(
        "classification",
        "Measure the mAP of a linear probe on the frozen model, for each subset of the store's modalities, beside that on an "
        "untrained model.",
        ClassificationOptions,
    ),
    Row(
        "vqa",
        "Measure the VQA accuracy of a fine-tuned model by kind of question, beside constant answers, the answers to another "
        "sample's image or question, and those of an untrained model that was fine-tuned the same way.",
        VqaOptions,
        VqaInputs,
    ),
    Row(
        "captioning",
        "Measure BLEU-4, CIDEr, ROUGE-L, sacreBLEU and METEOR of captions, with a constant caption and the caption of another "
        "image as baselines.",
        CaptioningOptions,
    ),
    Row(
        "image-generation",
        "Measure image generation from text, audio and both: bits per image code, generated images, an image grid.\n\n"
        "A generated image counts as correct if the true image is the nearest by the features of the model's extractor. "
        "--inception and --clip add figures of other networks.",
        ImageGenerationOptions,
        ImageGenerationInputs,
    ),
    Row(
        "scenes",
        "Judge generated texts and images by the truth of the corpus `scenes`, measure how often the true caption is "
        "preferred to hard negatives, and probe [CLS] for labels that need binding, each beside its controls.",
        ScenesOptions,
        ScenesInputs,
    ),
    Row(
        "summary",
        "Measure what `make pretrain` reports: validation losses, retrieval, word error rates, bits per image code, grids.",
        SummaryOptions,
        SummaryInputs,
    ),
)


def _command(row: Row) -> Callable[..., None]:
    """Return the subcommand of a row."""

    def command(inputs: Target, options: Any, choice: Choice) -> None:
        _evaluate(row.name, inputs, options, choice)

    command.__annotations__ = {"inputs": row.inputs, "options": row.options, "choice": Choice, "return": None}
    command.__doc__ = row.help
    return with_option_groups(command)


evaluate = typer.Typer(
    help="Evaluate a checkpoint by one experiment. Several ranks divide the work: "
    "torchrun --nproc_per_node 4 -m opt_ds evaluate …",
    no_args_is_help=True,
)
for _row in EXPERIMENTS:
    evaluate.command(_row.name)(_command(_row))


def _evaluate(name: str, inputs: Target, options: Any, choice: Choice) -> None:
    """Run an experiment: open model and store, measure, write and print the figures."""
    from opt_ds.evaluation.experiments import Request, load_experiment
    from opt_ds.store.verify import open_store
    from opt_ds.training.checkpoint import resolve_checkpoint

    experiment = load_experiment(name)
    resolve_checkpoint(inputs.checkpoint)
    store = open_store(inputs.store)
    splits = inputs.splits(store)
    others = [options.train_split] if isinstance(options, ProbeOptions) else []
    evaluator = _evaluator(inputs.checkpoint, store, choice.force, [*splits, *others])
    for ability, what in experiment.needs:
        evaluator.require(ability, what)
    open_rater = partial(_open_session, inputs.checkpoint, str(evaluator.device))
    request = Request(evaluator, tuple(splits), inputs.checkpoint, inputs.output, choice.seed, open_rater)
    started = time.perf_counter()
    figures = experiment.measure(request, **vars(options))
    _LOG.info(f"note: measured in {time.perf_counter() - started:.0f} s, including the controls", extra=ON_STDERR)
    _write(figures, inputs.output)
    _echo(experiment.report(request, figures))


def _evaluator(checkpoint: Path, store: "FeatureStore", force: bool, splits: Sequence[str]) -> "Evaluator":
    """Return the evaluator after checking model and store against each other. With several ranks, each joins here."""
    import torch

    from opt_ds.evaluation.evaluator import Evaluator
    from opt_ds.store.processor_files import PROCESSOR_FOLDER, check_fingerprints
    from opt_ds.training.checkpoint import load_model, resolve_checkpoint
    from opt_ds.training.preflight import check_store

    for split in splits:
        store.split_samples(split)
    run = resolve_checkpoint(checkpoint).parent.parent
    check_fingerprints(run / PROCESSOR_FOLDER, store, force)
    group = _join_ranks()
    device = group.device if group else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(checkpoint, device)
    check_store(config, store)
    return Evaluator(model, config, store, device, group)


def _open_session(checkpoint: Path, device: str, image_weights: Path | None) -> "ImageRater":
    from opt_ds.serving.session import Session

    return Session.load(checkpoint, image_weights=image_weights, device=device)


def _join_ranks() -> "ProcessGroup | None":
    """Return the ranks that a launcher started, or None for a single process."""
    if not {"RANK", "WORLD_SIZE", "SLURM_STEP_ID"} & os.environ.keys():
        return None
    from opt_ds.training.distributed import ProcessGroup, find_ranks

    ranks = find_ranks()
    if ranks.world_size == 1:
        return None
    group = ProcessGroup(ranks)
    atexit.register(group.close)
    return group


def _echo(text: str) -> None:
    """Print a result on the first rank."""
    if rank_of_environment() == 0:
        typer.echo(text)


def _write(figures: dict[str, Any], output: Path) -> None:
    from opt_ds.store.files import write_json

    if rank_of_environment():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, figures)
