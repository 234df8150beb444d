"""Upload damaged images and audio files to a running server while two clients work.

    python -m tests.serving.hostile_uploads --checkpoint RUN --mutants FOLDER --good FOLDER

Every file of --mutants is sent once to POST /api/describe, as an image or as audio by the ending of its name. Each must be
answered with 200, 413 or 422, or with 503 and then again. None of the clients' requests may fail, and the server's memory
afterwards must be within 10 % of before.
"""

import argparse
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from opt_ds.serving.limits import Limits
from tests.serving.clients import GoodClients, ServeProcess, serve_process

RECORDINGS = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".m4a", ".w64", ".caf", ".rf64"}
ANSWERS = {"200", "413", "422"}


def _upload(path: Path) -> bytes:
    """Return the file; of one that is too large for the server (some have gigabytes of zeros) just more than it takes."""
    with path.open("rb") as file:
        return file.read(Limits().upload_bytes + 2**20)


def send_all(server: ServeProcess, mutants: list[Path], senders: int = 3) -> Counter[str]:
    """Return the statuses of all files. A failure of the connection counts as a status."""

    def send(path: Path) -> str:
        field = "audio" if path.suffix.lower() in RECORDINGS else "image"
        while True:
            try:
                reply = httpx.post(f"{server.address}/api/describe", files={field: _upload(path)}, timeout=300)
            except httpx.HTTPError as error:
                return repr(error)
            if reply.status_code != 503:
                return str(reply.status_code)
            time.sleep(float(reply.headers["retry-after"]))

    with ThreadPoolExecutor(senders) as threads:
        return Counter(threads.map(send, mutants))


def campaign(checkpoint: Path, mutants: list[Path], good: dict[str, bytes], *options: str) -> list[str]:
    """Run all; returns what went wrong, and prints figures."""
    with serve_process(checkpoint, *options) as server:
        with GoodClients(server.address, good):
            send_all(server, mutants[: len(mutants) // 10])  # warm-up
        before = server.settled_mib(10)
        start = time.monotonic()
        with GoodClients(server.address, good) as clients:
            statuses = send_all(server, mutants)
        seconds = time.monotonic() - start
        after = server.settled_mib(20)
        print(f"{len(mutants)} files in {seconds:.0f} s: {dict(statuses)}")
        print(f"two clients: {clients.served} served, {clients.retries} retries, failed: {dict(clients.failures)}")
        print(f"memory: {before:.0f} MiB before, {after:.0f} MiB after")
        wrong = [f"{count} files: {status}" for status, count in statuses.items() if status not in ANSWERS]
        wrong += [f"{count} requests of the clients: {status}" for status, count in clients.failures.items()]
        wrong += [] if server.lives() else ["the server ended"]
        wrong += [] if after < 1.1 * before else [f"memory rose from {before:.0f} to {after:.0f} MiB"]
        return wrong


def good_files(folder: Path) -> dict[str, bytes]:
    """Return an image and an audio file of a folder."""
    return {"image": next(folder.glob("*.png")).read_bytes(), "audio": next(folder.glob("*.wav")).read_bytes()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "mutants", "good"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    mutants = sorted(path for path in given.mutants.rglob("*") if path.is_file())
    wrong = campaign(given.checkpoint, mutants, good_files(given.good))
    print("\n".join(wrong) or "nothing went wrong")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
