"""Limits for decoding one untrusted file: bytes on disk, memory, CPU time.

All limits are derived from --max-pixels and --max-seconds, so that every file that these allow can be decoded. The
needs of a file are known once its header has been read. Until then it gets the allowance of a small file.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from opt_ds.config.section import Section
from opt_ds.decoding.reasons import RefusedError

MAX_PIXELS = 100_000_000
MAX_SECONDS = 3600.0
VALUES_PER_SECOND = 192_000  # mean over an audio file, all channels; silence of any length is a small file

MIB = 2**20
_BASE_MEMORY, CPU_S = 256 * MIB, 20.0
_DRAWING_MEMORY, _DRAWING_FILE = 1024 * MIB, 64 * MIB
_ARRAYS_FILE = 256 * MIB  # region features; the 100 regions of an image take 1.5 MiB
_MEMORY_PER_PIXEL, _CPU_S_PER_PIXEL = (
    48,
    0.6e-6,
)  # RGBA on white plus the decoder's buffers; JPEG 2000 is the slowest format
_MEMORY_PER_VALUE, _CPU_S_PER_VALUE = 12, 2e-7


@dataclass(frozen=True)
class Budget:
    """The allowance of one step of decoding.

    It consists of memory in bytes beyond that of the idle process, and CPU time in seconds.
    """

    memory_bytes: int = _BASE_MEMORY
    cpu_s: float = CPU_S

    @property
    def wall_s(self) -> float:
        """Allowed wall-clock time in seconds, with a margin for busy machines."""
        return 5 * self.cpu_s


class Limits(Section):
    """What one file may be, and what decoding it may cost.

    `opt-ds prepare` takes the first two from its settings, `opt-ds serve` the second one from its own limits.
    """

    label: ClassVar[str] = "decoding limits"

    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="Largest image, in pixels. Larger ones are refused before decoding."
    )
    max_seconds: float = Field(
        MAX_SECONDS, gt=0, description="Longest audio, in seconds. Longer audio is refused before decoding."
    )
    allow_svg: bool = Field(True, description="Decode SVG drawings. False: refuse them.")
    cpu_s: float = Field(
        CPU_S,
        gt=0,
        description="CPU time for decoding any file, in seconds. Large files get more in proportion to their size.",
    )

    def as_dict(self) -> dict[str, Any]:
        """Return the limits as plain values, for a request to the decoding process."""
        return self.model_dump()

    def file_bytes(self, kind: str) -> int:
        """Return the maximum size in bytes of a file of `kind` (image, audio, arrays): uncompressed, at full depth."""
        if kind == "image":
            return 64 * MIB + 16 * self.max_pixels
        if kind == "audio":
            return 64 * MIB + int(8 * VALUES_PER_SECOND * self.max_seconds)
        return _ARRAYS_FILE

    def of_header(self, file_bytes: int) -> Budget:
        """Return the budget for reading a header. Some decoders read the whole file for it."""
        return Budget(_BASE_MEMORY + 3 * file_bytes, self.cpu_s)

    def of_image(self, file_bytes: int, pixels: int) -> Budget:
        """Return the budget for decoding an image of `pixels` pixels."""
        return Budget(
            _BASE_MEMORY + 3 * file_bytes + _MEMORY_PER_PIXEL * pixels, self.cpu_s + _CPU_S_PER_PIXEL * pixels
        )

    def of_drawing(self, file_bytes: int, pixels: int) -> Budget:
        """Return the budget for an SVG whose embedded bitmaps have `pixels` pixels.

        Raise RefusedError if the file is too large.
        """
        if file_bytes > _DRAWING_FILE:
            raise RefusedError(f"the drawing has {file_bytes / MIB:.0f} MiB, {_DRAWING_FILE // MIB} are allowed")
        return Budget(_DRAWING_MEMORY + _MEMORY_PER_PIXEL * pixels, self.cpu_s)

    def of_audio(self, file_bytes: int, values: int) -> Budget:
        """Return the budget for decoding `values` audio samples, counted over all channels."""
        return Budget(_BASE_MEMORY + _MEMORY_PER_VALUE * values, self.cpu_s + _CPU_S_PER_VALUE * values)

    def of_arrays(self, unpacked_bytes: int) -> Budget:
        """Return the budget for arrays of this size.

        Raise RefusedError if they are larger than the regions of any image.
        """
        if unpacked_bytes > _ARRAYS_FILE:
            raise RefusedError(f"its arrays take {unpacked_bytes / MIB:.0f} MiB, {_ARRAYS_FILE // MIB} are allowed")
        return Budget(_BASE_MEMORY + 2 * unpacked_bytes, self.cpu_s)


def readable(size_bytes: float) -> str:
    """Format a size: 1610612736 -> "1.5 GiB"."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / MIB:.0f} MiB"
