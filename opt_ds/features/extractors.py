"""The interface of all feature extractors, how one is found and built, and the loading of its weights.

An extractor is one class in a file of its own: `RegionExtractor` (regions.py) for images, `SpeechExtractor` (speech.py) for
audio, `FurtherExtractor` (further.py) for any other modality. It is found by its name in `BUILT_IN` (of this package), as an
entry point of the group "opt_ds.features", or as `module:Class` (see `opt_ds.registry`). Nothing else names an extractor.

    class Thumbnails(RegionExtractor):
        name = "thumbnails"
        options = ThumbnailOptions  # a Section: opt-ds prepare --images thumbnails --extractor-option image.side=8

        def __init__(self, options: ThumbnailOptions, device: str) -> None: ...
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

from opt_ds.config.section import Section, section_from_dict
from opt_ds.errors import UserError
from opt_ds.registry import EXTRACTORS
from opt_ds.store.files import file_sha256

#: Key of a fingerprint: how the extractor was named, if that is not its own name.
PLUGIN = "plugin"
#: What extractors of a built-in modality are called in messages, and the option that names one.
_OPTION = {"image": "--images", "audio": "--speech"}
#: Keys of a fingerprint that may differ: they change at most the last bits, or do not concern the extractor.
_MAY_DIFFER = ("version", "package", "precision", "trim_silence", PLUGIN)


class Extractor(ABC):
    """Converts inputs of one modality to features. It is built inside the worker process that uses it.

    `extract` takes a short list of inputs and returns one result per input, in order. The results depend on this list only.
    None stands for an unreadable file; its result is None. The results of the other inputs are the same bytes as if the file
    had been readable. An exception costs the file whose extraction raises it; its message is the reason in report.json.
    """

    #: The extractor's name, a plain identifier.
    name: ClassVar[str]
    #: The modality: "image", "audio" or the name of a further one.
    kind: ClassVar[str]
    #: The section of its options; Section itself has none. An option `weights` is the file that `--image-weights` or
    #: `--speech-weights` names.
    options: ClassVar[type[Section]] = Section
    #: Options that `fingerprint` states under other names, or leaves out at their default (see `options_from`).
    stated_otherwise: ClassVar[tuple[str, ...]] = ()
    #: Whether the inputs are paths. Otherwise they are decoded images or waveforms.
    reads_files: ClassVar[bool] = False
    #: Inputs per call of `extract` in preparation. The last bits of features may depend on it.
    files_per_call: ClassVar[int] = 16

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Accept a class of another package that still defines `fingerprint` by its former name."""
        super().__init_subclass__(**keywords)
        if "identity" in cls.__dict__ and "fingerprint" not in cls.__dict__:
            message = f"{cls.__qualname__}.identity is now called fingerprint; the former name works until the next release"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            cls.fingerprint = cls.__dict__["identity"]  # type: ignore[method-assign]

    @abstractmethod
    def __init__(self, options: Any, device: str) -> None:
        """Load what `extract` needs.

        Args:
            options: The options, of the class `options`.
            device: Device that the network runs on.

        Raises:
            UserError: The weights are missing or do not fit.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return name, package, version, SHA-256 of the weights (`weights_sha256`) and whatever else the features depend on.

        The values are JSON. Options need not be listed (see `ExtractorChoice.complete_fingerprint`).
        """

    @abstractmethod
    def extract(self, inputs: Sequence[Any]) -> list[Any]:
        """Return one feature item per input; None for None."""

    @classmethod
    def settle(cls, options: Any, files: Iterable[Path]) -> Any:
        """Return the options with those set that depend on the files, such as the size of features that they have.

        Args:
            options: The options, of the class `options`.
            files: The files that will be read, in order. Only the first ones should be opened.

        Raises:
            UserError: They cannot be set.
        """
        return options

    @classmethod
    def options_from(cls, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options, besides paths, that build the extractor with this fingerprint again."""
        return {name: fingerprint[name] for name in cls.options.model_fields if name in fingerprint}

    @classmethod
    def needs_weights(cls, fingerprint: Mapping[str, Any]) -> bool:
        """Return whether the extractor with this fingerprint takes the option `weights`."""
        return "weights" in cls.options.model_fields and fingerprint.get("weights_sha256") is not None


@dataclass(frozen=True)
class ExtractorChoice:
    """An extractor that is not built yet. `given` is how it was named: its name, an entry point's, or `module:Class`."""

    found: type[Extractor]
    given: str
    options: Section

    def settled(self, files: Iterable[Path]) -> "ExtractorChoice":
        """Return the choice with the options that depend on the files, see `Extractor.settle`."""
        return replace(self, options=self.found.settle(self.options, files))

    def build(self, device: str) -> Extractor:
        """Build the extractor. Raise UserError if its weights are missing or do not fit."""
        return self.found(self.options, device)

    def complete_fingerprint(self, extractor: Extractor) -> dict[str, Any]:
        """Return what store.json records of the built extractor: its fingerprint, and the other options besides paths.

        Raise UserError if the fingerprint is not JSON.
        """
        try:
            fingerprint = json.loads(json.dumps(extractor.fingerprint()))
        except (TypeError, ValueError) as error:
            message = f"extractor {self.given}: its fingerprint is not JSON ({error}): return plain values"
            raise UserError(message) from None
        values = self.options.model_dump(mode="json")
        left_out = {
            name: values[name]
            for name, field in self.found.options.model_fields.items()
            if name not in fingerprint and name not in self.found.stated_otherwise and not _is_path(field.annotation)
        }
        named = {} if self.given == self.found.name else {PLUGIN: self.given}
        return {**fingerprint, **left_out, **named}


def choose(kind: str, given: str, options: Mapping[str, Any], where: str | None = None) -> ExtractorChoice:
    """Find an extractor and check its options.

    Args:
        kind: The modality that it must be for.
        given: Its name, or `module:Class`.
        options: Values of its options.
        where: What names it, for messages. None: the option of `opt-ds prepare`.

    Raises:
        UserError: There is none, it may not be loaded (see `opt_ds.registry`), or an option is unknown or has a bad value.
    """
    where = where or option_of(kind)
    found = extractor_class(kind, given, where)
    section = section_from_dict(found.options, dict(options), where=f"{where} {given}")
    paths = {name: value.expanduser() for name, value in section if isinstance(value, Path)}
    return ExtractorChoice(found, given, section.model_copy(update=paths))


def extractor_class(kind: str, given: str, where: str) -> type[Extractor]:
    """Return the class of an extractor. The arguments and errors are those of `choose`."""
    try:
        found = EXTRACTORS.load(given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Extractor)):
        raise UserError(f"{where}: {given} is no subclass of {Extractor.__module__}.{Extractor.__name__}")
    if found.kind != kind:
        raise UserError(f"{where}: {given} makes features of {found.kind}, not of {kind}: name it with {option_of(found.kind)}")
    return found


def option_of(kind: str) -> str:
    """Return the option of `opt-ds prepare` that names the extractor of a modality."""
    return _OPTION.get(kind, f"--extractor {kind}")


def named_in(fingerprint: Mapping[str, Any]) -> str:
    """Return the name, or `module:Class`, of the extractor with this fingerprint."""
    return str(fingerprint.get(PLUGIN, fingerprint.get("name", "")))


def difference(fingerprint: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return a key in which two fingerprints differ, so that the features mean something else; None if there is none."""
    keys = sorted(fingerprint.keys() | other.keys())
    return next((key for key in keys if key not in _MAY_DIFFER and fingerprint.get(key) != other.get(key)), None)


def layer_number(layer: int | None, count: int, option: str) -> int | None:
    """Return a layer counted from 1, given from 1, or from -1 for the last; None for None.

    Args:
        layer: The layer.
        count: Number of layers.
        option: The option that names it, for messages.

    Raises:
        UserError: There is no such layer.
    """
    if layer is None:
        return None
    number = layer if layer > 0 else count + 1 + layer
    if not 1 <= number <= count or layer == 0:
        raise UserError(f"{option} {layer}: the model has layers 1 to {count} (or -1 to -{count}, from the last)")
    return number


def _is_path(annotation: Any) -> bool:
    return annotation is Path or Path in get_args(annotation)


def weights_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a weights file, or of all weight files in a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if not files:
        raise UserError(f"{path}: no weights there (*.safetensors or *.bin): give a folder saved by Hugging Face")
    return "+".join(file_sha256(file) for file in files)


def load_state_dict(path: Path | None, what: str) -> dict[str, Any]:
    """Load the tensors of a checkpoint without running code from it.

    Raise UserError if it is missing or not a state dict.
    """
    from opt_ds.weights import read_state_dict  # torch takes seconds to import

    if path is None:
        raise UserError(f"{what}: it needs a checkpoint: name its file")
    return read_state_dict(path, what)
