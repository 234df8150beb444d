"""Options that several commands share: single options (type aliases) and groups (see `option_groups`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ds.cli.program import finite
from opt_ds.errors import UserError

if TYPE_CHECKING:
    from opt_ds.model.generation import DecodingConfig

Workers = Annotated[int, typer.Option(help="Processes that work at once, each on one thread.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ImageWeights = Annotated[Path | None, typer.Option(help="Weights of the image extractor, if no package brings them.")]
Limit = Annotated[int | None, typer.Option(help="Samples at most, a seeded choice.", min=1)]
BeamSize = Annotated[int, typer.Option(help="Beam size of the text decoder; 1: greedy.", min=1)]
Pixels = Annotated[bool, typer.Option(help="Keep each picture at 64 x 64 pixels, for the dVAE and picture grids.")]
ExtractorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--extractor-option",
        metavar="KIND.KEY=VALUE",
        help="Set one option of the extractor of a modality, such as image.side=224; may be repeated.",
    ),
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting.")]


def parse_extractor_options(given: list[str] | None) -> dict[str, dict[str, Any]]:
    """Return modality -> key -> value of the values of --extractor-option. Values are YAML.

    Raise UserError for another form than KIND.KEY=VALUE, and for a key that is given twice.
    """
    from opt_ds.config.sources import parse_value

    options: dict[str, dict[str, Any]] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        kind, dot, key = (part.strip() for part in name.partition("."))
        if not (kind and dot and key and equals):
            raise UserError(f'--extractor-option "{text}": write it as KIND.KEY=VALUE, such as image.side=224')
        if key in options.setdefault(kind, {}):
            raise UserError(f"--extractor-option {kind}.{key} is given twice: give it once")
        options[kind][key] = parse_value(f"{kind}.{key}", value, "--extractor-option")
    return options


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """The configuration of a run: a preset or file, its stores, single settings."""

    config: Annotated[
        str | None, typer.Option(help="A preset's name, or a YAML file. Default: by the hardware and the stores.")
    ] = None
    store: Annotated[list[str] | None, typer.Option(help="A feature store; may be given several times.")] = None
    settings: Settings = None

    @property
    def stores(self) -> list[str]:
        """The given stores; empty if none was given."""
        return self.store or []

    @property
    def changes(self) -> list[str]:
        """The values of --set, in their order."""
        return self.settings or []


@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """What a trained model needs in order to read raw files."""

    image_weights: ImageWeights = None
    speech_weights: Annotated[Path | None, typer.Option(help="Weights of the speech extractor, if it has any.")] = None
    extractor_option: ExtractorOption = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How images are generated."""

    candidates: Annotated[
        int, typer.Option(help="Pictures to paint per sample; the one that the model matches best is kept.", min=1)
    ] = 1
    top_k: Annotated[int, typer.Option(help="Of the image codes; 0: all.", min=0)] = 32
    top_p: Annotated[float, typer.Option(help="Of the image codes.", min=0.0, max=1.0, callback=finite)] = 1.0
    temperature: Annotated[float, typer.Option(help="Of the image codes.", min=1e-3, callback=finite)] = 0.8

    def decoding(self, seed: int) -> "DecodingConfig":
        """Return the settings of the image decoder."""
        from opt_ds.model.generation import image_decoding

        return image_decoding(self.top_k, self.top_p, self.temperature, seed)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How a linear probe is fitted."""

    train_split: Annotated[str, typer.Option(help="Split that the probe is fitted on.")] = "train"
    min_positives: Annotated[int, typer.Option(help="Training samples that a label needs.", min=1)] = 10
    regularisation: Annotated[
        float, typer.Option(help="scikit-learn's C of the logistic regressions.", min=1e-6, callback=finite)
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How texts become tokens; the fields are those of `PrepareSettings`."""

    vocab_size: Annotated[int, typer.Option(help="text: size of the tokenizer trained on the train split.", min=1)] = 1200
    unicode_form: Annotated[str, typer.Option(help="text: Unicode normal form, NFC, NFKC, NFD, NFKD or none.")] = "NFC"
    max_tokens: Annotated[
        int, typer.Option(help="text: cut after this many tokens; the report counts such texts.", min=1)
    ] = 510


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """How many speech frames are kept; the fields are those of `PrepareSettings`."""

    pool_frames: Annotated[int, typer.Option(help="audio: average this many neighbouring frames into one.", min=1)] = 1
    max_frames: Annotated[int | None, typer.Option(help="audio: keep at most this many frames (after pooling).", min=1)] = None


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How raw files are read."""

    workers: Workers = 2
    device: Device = "auto"
    strict: Annotated[bool, typer.Option(help="Stop at the first sample that cannot be used, instead of skipping it.")] = False
    allow_outside: Annotated[bool, typer.Option(help="Take files outside the manifest's folder too.")] = False
