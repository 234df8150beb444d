"""Limits of `opt-ds serve`: the resources that one client may use.

`docs/serving.md` describes what happens beyond each limit.
"""

from typing import ClassVar

from pydantic import Field

from opt_ds.config.section import Section

MIB = 2**20


class Limits(Section):
    """Limits of the server. A request beyond one of them is answered with a status code; the server stays up."""

    label: ClassVar[str] = "serving limits"
    renamed = {"pictures": "images", "recording_s": "audio_s"}  # noqa: RUF012

    # Connections (opt_ds.serving.server)
    connections: int = Field(
        256, ge=1, description="Open connections. Beyond them, the oldest connection without a request is closed."
    )
    header_s: float = Field(
        10.0,
        gt=0,
        description="Time from the connection, or from the last answer, to the end of a request's header, in seconds.",
    )
    answer_s: float = Field(
        30.0,
        gt=0,
        description="Time for a client to read an answer that does not fit into the socket's buffers, in seconds.",
    )
    draining_s: float = Field(
        10.0,
        ge=0,
        description="Time for receiving the rest of a refused body, in seconds, so that its client can read why.",
    )
    closing_s: float = Field(
        5.0,
        gt=0,
        description="Time for the last bytes, in both directions, of a connection that is being closed, in seconds.",
    )

    # Request bodies (opt_ds.serving.admission)
    upload_bytes: int = Field(20 * MIB, ge=1, description="Largest request body, in bytes.")
    body_s: float = Field(60.0, gt=0, description="Time from the end of the header to the end of the body, in seconds.")
    ahead_bytes: int = Field(
        64 * 1024, ge=0, description="Bytes of a body that are read before the request takes a place in the queue."
    )
    steady_s: float = Field(
        2.0, ge=0, description="Time after which a slow body may lose its place to another request, in seconds."
    )
    steady_bytes_per_s: int = Field(
        128 * 1024, ge=0, description="Rate below which a body counts as slow, in bytes per second."
    )

    # The queue (opt_ds.serving.admission)
    places: int = Field(
        17, ge=1, description="Requests that are uploaded, wait (16) or are computed (1) at the same time."
    )
    retry_after_s: int = Field(2, ge=0, description="`Retry-After` of an answer 503, in seconds.")

    # What a request holds (opt_ds.serving.app)
    text_characters: int = Field(10_000, ge=1, description="Longest text, in characters.")
    images: int = Field(8, ge=1, description="Largest number of generated images per request.")
    audio_s: float = Field(
        300.0, gt=0, description="Longest audio, in seconds: a small file can hold hours of silence."
    )
