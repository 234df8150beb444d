"""Options that several commands share: single options (type aliases) and groups (see `option_groups`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ds.cli.program import finite
from opt_ds.errors import UserError

if TYPE_CHECKING:
    from opt_ds.model.generation import DecodingConfig

Workers = Annotated[int, typer.Option(help="Number of processes, each with one thread.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ImageWeights = Annotated[Path | None, typer.Option(help="Weights of the image extractor, if no package includes them.")]
Limit = Annotated[int | None, typer.Option(help="Largest number of samples, chosen by the seed. Default: all.", min=1)]
BeamSize = Annotated[int, typer.Option(help="Beam size of the text decoder. 1: greedy search.", min=1)]
Pixels = Annotated[bool, typer.Option(help="Store each image at 64 x 64 pixels too, for the dVAE and image grids.")]
ExtractorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--extractor-option",
        metavar="KIND.KEY=VALUE",
        help="Set one option of the extractor of a modality, such as image.side=224. May be repeated.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting. May be repeated.")
]


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
        str | None, typer.Option(help="Name of a preset, or a YAML file. Default: chosen by hardware and stores.")
    ] = None
    store: Annotated[list[str] | None, typer.Option(help="Feature store. May be repeated.")] = None
    settings: Settings = None

    @property
    def stores(self) -> list[str]:
        """The stores of --store, or an empty list."""
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
class CodeSamplingOptions:
    """How image codes are sampled."""

    top_k: Annotated[int, typer.Option(help="Sample from the k most probable image codes. 0: all.", min=0)] = 32
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the most probable image codes of this total probability. 1: all.", min=0.0, max=1.0,
                     callback=finite),
    ] = 1.0  # fmt: skip
    temperature: Annotated[
        float, typer.Option(help="Divisor of the logits of image codes.", min=1e-3, callback=finite)
    ] = 0.8
    guidance: Annotated[
        float,
        typer.Option(
            help="Scale S of classifier-free guidance: logits without the input plus S times their difference from those "
            "with it. 1: none. Others require a model trained with tasks.modality.condition_dropout.",
            min=0.0,
            callback=finite,
        ),
    ] = 1.0

    def decoding(self, seed: int) -> "DecodingConfig":
        """Return the settings of the image decoder."""
        from opt_ds.model.generation import image_decoding

        return image_decoding(self.top_k, self.top_p, self.temperature, seed, self.guidance)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(CodeSamplingOptions):
    """How images are generated."""

    candidates: Annotated[
        int,
        typer.Option(help="Images to generate per sample. The best one by --rank-by is kept.", min=1),
    ] = 1
    rank_by: Annotated[
        str | None,
        typer.Option(
            help="matching: the match probability of image and input. likelihood: that of the input text as a caption of the "
            "image. Default: the first of them that the model learned."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """How a linear probe is fitted."""

    train_split: Annotated[str, typer.Option(help="Split that the probe is fitted on.")] = "train"
    min_positives: Annotated[int, typer.Option(help="Training samples that a label requires.", min=1)] = 10
    regularisation: Annotated[
        float, typer.Option(help="C of scikit-learn's logistic regressions.", min=1e-6, callback=finite)
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How texts become tokens; the fields are those of `PrepareSettings`."""

    vocab_size: Annotated[int, typer.Option(help="text: vocabulary size of the tokenizer that is trained.", min=1)] = (
        1200
    )
    unicode_form: Annotated[str, typer.Option(help="text: Unicode normal form: NFC, NFKC, NFD, NFKD or none.")] = "NFC"
    max_tokens: Annotated[
        int,
        typer.Option(
            help="text: largest number of tokens. Longer texts are truncated and counted in the report.", min=1
        ),
    ] = 510


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """How many speech frames are kept; the fields are those of `PrepareSettings`."""

    pool_frames: Annotated[int, typer.Option(help="audio: number of neighbouring frames averaged into one.", min=1)] = 1
    max_frames: Annotated[
        int | None, typer.Option(help="audio: largest number of frames (after pooling). Default: no limit.", min=1)
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How raw files are read."""

    workers: Workers = 2
    device: Device = "auto"
    strict: Annotated[bool, typer.Option(help="Stop at the first sample that cannot be used. Default: skip it.")] = (
        False
    )
    allow_outside: Annotated[bool, typer.Option(help="Accept files outside the manifest's folder.")] = False
