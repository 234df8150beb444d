"""Options of `opt-ds evaluate …`: a group per experiment, and the groups that all experiments share."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opt_ds.cli.options import BeamSize, CodeSamplingOptions, ImageWeights, Limit, ProbeOptions, SamplingOptions
from opt_ds.cli.program import MAX_SEED, output_file
from opt_ds.errors import UserError
from opt_ds.log import ON_STDERR

if TYPE_CHECKING:
    from opt_ds.store.reader import FeatureStore

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """What is evaluated, on what, and where the figures go."""

    checkpoint: Annotated[
        Path,
        typer.Option(help="A run's output directory (its best checkpoint) or one checkpoint, not an exported model."),
    ]
    store: Annotated[Path, typer.Option(help="Feature store.")]
    output: Annotated[Path, typer.Option(help="JSON file to write.", callback=output_file)]

    @abstractmethod
    def splits(self, store: "FeatureStore") -> list[str]:
        """Return the splits to measure on."""


@dataclass(frozen=True, kw_only=True)
class Inputs(Target):
    """The inputs of an experiment on one split."""

    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the store. Default: test_variant, otherwise the first that begins with test, otherwise valid."
        ),
    ] = None

    def splits(self, store: "FeatureStore") -> list[str]:
        """Return the given split, or the first held-out split."""
        return [self.split] if self.split else held_out(store, 1)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What every experiment has at the end."""

    seed: Annotated[int, typer.Option(help="Seed of the choice of samples and of sampling.", min=0, max=MAX_SEED)] = 1
    force: Annotated[
        bool,
        typer.Option("--force", help="Accept a store of another vocabulary or other extractors, with a warning."),
    ] = False


#: Type of --predictions.
Predictions = Annotated[
    Path | None,
    typer.Option(help="Also write the prediction and scores of each sample to this file (JSON Lines).", callback=output_file),
]


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Options of `opt_ds.evaluation.experiments.retrieval`."""

    candidates: Annotated[int, typer.Option(help="Size of the gallery for the text decoder's likelihood.", min=2)] = 200
    matching_candidates: Annotated[int, typer.Option(help="Size of the gallery for the matching head.", min=2)] = 200
    shortlist: Annotated[
        int | None,
        typer.Option(help="Re-rank only the top N candidates of the first stage (two-stage retrieval).", min=1),
    ] = None
    transductive: Annotated[
        bool,
        typer.Option(help="Also report texts ranked by likelihood over its mean over the test queries themselves."),
    ] = False


@dataclass(frozen=True, kw_only=True)
class TranscriptionOptions:
    """Options of `opt_ds.evaluation.experiments.transcription`."""

    limit: Limit = None
    beam_size: BeamSize = 4
    ignore_words: Annotated[
        str, typer.Option(help="Report a second word error rate without these words, separated by spaces.")
    ] = ""
    predictions: Predictions = None


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(ProbeOptions):
    """Options of `opt_ds.evaluation.experiments.classification`."""

    limit: Limit = None


@dataclass(frozen=True, kw_only=True)
class VqaInputs(Inputs):
    """Questions are usually asked on the validation split."""

    split: Annotated[str, typer.Option(help="Split of the store.")] = "valid"


@dataclass(frozen=True, kw_only=True)
class VqaOptions:
    """Options of `opt_ds.evaluation.experiments.vqa`."""

    limit: Limit = None
    untrained: Annotated[
        Path | None, typer.Option(help="Run of `opt-ds finetune vqa --untrained`, as a control. Default: not measured.")
    ] = None
    annotations: Annotated[
        list[Path] | None,
        typer.Option(
            help="Annotation file with the types of questions. May be repeated: also give that of the training questions. "
            "Default: the kinds of the corpus scenes, by the text."
        ),
    ] = None
    predictions: Predictions = None
    evalai: Annotated[
        Path | None,
        typer.Option(
            help="Also write the answers to all questions as EvalAI's server takes them (JSON). The split needs no answers.",
            callback=output_file,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CaptioningOptions:
    """Options of `opt_ds.evaluation.experiments.captioning`."""

    limit: Annotated[
        int | None, typer.Option(help="Largest number of images, chosen by the seed. Default: all.", min=1)
    ] = None
    beam_size: BeamSize = 4
    meteor: Annotated[
        bool, typer.Option("--meteor", help="Also measure METEOR of English captions. It needs Java, and 2 GiB of memory.")
    ] = False
    predictions: Predictions = None


def not_the_grid(path: Path, param: typer.CallbackParam) -> Path:
    """Return the path given for --output.

    Raise UserError if it is the name of the image grid, which is written next to it.
    """
    if path.suffix == ".png":
        raise UserError(
            f"--output {path}: the image grid gets this name: name the file of the figures, such as {path.stem}.json"
        )
    output_file(path, param)
    return path


@dataclass(frozen=True, kw_only=True)
class ImageGenerationInputs(Inputs):
    """An image grid is written next to the figures."""

    output: Annotated[Path, typer.Option(help="JSON file to write.", callback=not_the_grid)]


@dataclass(frozen=True, kw_only=True)
class ImageGenerationOptions(SamplingOptions):
    """Options of `opt_ds.evaluation.experiments.image_generation`."""

    limit: Limit = None
    dvae: Annotated[Path | None, typer.Option(help="Folder of the dVAE. Default: that of the store.")] = None
    images: Annotated[
        int, typer.Option(help="Rows of the image grid, which is written next to the JSON file. 0: no grid.", min=0)
    ] = 8
    generate: Annotated[
        int, typer.Option(help="Samples per kind of input to generate and rate images for. 0: none.", min=0)
    ] = 100
    inception: Annotated[
        Path | None, typer.Option(help="Weights of torch-fidelity's Inception-v3, for the Fréchet inception distance.")
    ] = None
    clip: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face CLIP, for the CLIP score.")] = None
    image_weights: ImageWeights = None


@dataclass(frozen=True, kw_only=True)
class ScenesInputs(Inputs):
    """Held-out compositions show whether a model binds colours, numbers and places to objects."""

    split: Annotated[str, typer.Option(help="Split of the store.")] = "test_composition"


@dataclass(frozen=True, kw_only=True)
class ScenesOptions(CodeSamplingOptions):
    """Options of `opt_ds.evaluation.experiments.scenes`."""

    truth: Annotated[Path, typer.Option(help="truth.jsonl of the corpus that the store was made of.")]
    limit: Annotated[
        int, typer.Option(help="Largest number of samples for texts and negatives, chosen by the seed.", min=1)
    ] = 200
    probe: Annotated[int, typer.Option(help="Samples that the linear probes are tested on. 0: no probes.", min=0)] = 1000
    generate: Annotated[
        int, typer.Option(help="Samples per kind of input to generate and judge images for. 0: none.", min=0)
    ] = 100
    beam_size: BeamSize = 4
    dvae: Annotated[Path | None, typer.Option(help="Folder of the dVAE. Default: that of the store.")] = None


@dataclass(frozen=True, kw_only=True)
class SummaryInputs(Target):
    """Several splits."""

    split: Annotated[
        list[str] | None,
        typer.Option(help="Held-out split. May be repeated. Default: all that begin with test, otherwise valid."),
    ] = None

    def splits(self, store: "FeatureStore") -> list[str]:
        """Return the given splits, or all held-out splits."""
        return list(self.split or held_out(store))


@dataclass(frozen=True, kw_only=True)
class SummaryOptions:
    """Options of `opt_ds.evaluation.experiments.summary`."""

    candidates: Annotated[
        int,
        typer.Option(help="Size of the gallery for the text decoder's likelihood; on further splits a quarter of it.", min=2),
    ] = 200
    matching_candidates: Annotated[
        int,
        typer.Option(
            help="Size of the gallery for the matching head; on further splits a quarter of it. For triples: 50.", min=2
        ),
    ] = 100
    dvae: Annotated[Path | None, typer.Option(help="Folder of the dVAE. Default: that of the store.")] = None
    truth: Annotated[
        Path | None,
        typer.Option(help="truth.jsonl of the corpus scenes that the store was made of: adds figures judged by it."),
    ] = None


def held_out(store: "FeatureStore", most: int | None = None) -> list[str]:
    """Return the store's held-out splits, at most `most` of them, and log them because the user chose none."""
    from opt_ds.evaluation.evaluator import held_out_splits

    found = held_out_splits(store)[:most]
    seen = ", since none begins with test (early stopping saw it too)" if found == ["valid"] else ""
    _LOG.info(f"note: evaluated on {', '.join(found)}{seen}; --split chooses", extra=ON_STDERR)
    return found
