"""What one client may take from `opt-ds serve`: every number in one place. docs/serving.md has them as a table."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of the server. A request beyond one of them is answered with a status code; the server stays up."""

    # Connections (opt_ds.serve.server)
    connections: int = 256  # open at the same time; beyond, the oldest one without a request makes room
    header_s: float = 10.0  # from the connection, or the last answer, to the end of the request's header
    answer_s: float = 30.0  # for a client to take in an answer that does not fit into the socket's buffers
    draining_s: float = 10.0  # for the rest of a body that was refused: its client can read why
    closing_s: float = 5.0  # for the last bytes, in both directions, of a connection that is being closed

    # Request bodies (opt_ds.serve.admission)
    upload_bytes: int = 20 * MIB
    body_s: float = 60.0  # from the end of the header to the end of the body
    ahead_bytes: int = 64 * 1024  # read before a request takes a place in the queue: slow senders take none
    steady_s: float = 2.0  # after this, a body slower than the next number gives up its place when others need it
    steady_bytes_per_s: int = 128 * 1024

    # The queue (opt_ds.serve.admission)
    places: int = 17  # requests that are being uploaded, waiting (16) and computed (1)
    retry_after_s: int = 2

    # What a request holds (opt_ds.serve.app)
    text_characters: int = 10_000
    pictures: int = 8
    recording_s: float = 300.0  # a small file can hold hours of silence
