"""Decode untrusted files in a separate process, under limits. Every command that reads such files uses this module.

    decoder = Decoder(Limits(max_pixels=100_000_000))
    image = decoder.image(path).content      # RGB, upright, on white
    audio = decoder.audio(path).content      # mono float32 at 16 kHz
    arrays = decoder.arrays(path).content    # of a file of array_files.py

A path may also be a reference to a member of a tar (tar_members.py).

The content of a file can cause a `DecodingError` and nothing else. The process (decoder_process.py) may crash, hang, or
reach its limit of memory or time; the next file gets a new process. Errors of the file system raise
`EnvironmentFaultError` instead: the file may be good, so it must not be counted as bad.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from opt_ds.decoding.decoder_process import MESSAGE_BYTES
from opt_ds.decoding.limits import MIB, Budget, Limits, readable
from opt_ds.decoding.tar_members import file_on_disk, shown_name
from opt_ds.errors import RunError
from opt_ds.version import PACKAGE_FOLDER

Content = TypeVar("Content")

_PROGRAM = "opt_ds.decoding.decoder_process"
_READ_S = 600.0  # time for the process to start and the file system to respond
_LOOK_EVERY_S = 5.0
_KEPT_ANSWER_BYTES = 64 * MIB  # shared memory that is kept for the next answer
_RETRY_AFTER_S = (0.2, 1.0, 3.0)
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY,
              errno.ECONNRESET, errno.EREMOTEIO)  # fmt: skip
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class DecodingError(ValueError):
    """The content of a file cannot be used. The message is the reason.

    `refused`: the file may be intact, but its format or size is not accepted.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class MissingFileError(DecodingError):
    """The file does not exist, but the folder that should contain it does."""


class EnvironmentFaultError(RunError):
    """A file could not be read for a reason outside it: permissions, I/O errors, lost mounts, too little memory."""


@dataclass(frozen=True)
class Decoded(Generic[Content]):
    """The content of a file, and a hash of its bytes."""

    content: Content
    digest: str


class Decoder:
    """Decodes one file at a time, in a process that is started for the first file and after each crash.

    `close` ends it. The decoding methods raise `DecodingError` and `EnvironmentFaultError`, as described in the module
    docstring.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._child: _Child | None = None
        self._turn = threading.Lock()

    def image(self, path: Path, limits: Limits | None = None) -> Decoded[Image.Image]:
        """Return the image as RGB, upright, on white."""

        def take(child: "_Child", answer: dict[str, Any]) -> Image.Image:
            width, height = answer["size"]
            with child.answer_view(3 * width * height) as pixels:
                return Image.frombytes("RGB", (width, height), pixels)  # a copy: Pillow's pixels have four bytes

        return self._ask("image", path, limits, take)

    def audio(self, path: Path, limits: Limits | None = None) -> Decoded[np.ndarray]:
        """Return the audio as mono float32 [S] at 16 kHz."""
        from opt_ds.decoding.audio import resample

        def take(child: "_Child", answer: dict[str, Any]) -> np.ndarray:
            mono = np.frombuffer(child.answer_bytes(0, 4 * answer["samples"]), "float32")
            return resample(mono, answer["rate_hz"])

        return self._ask("audio", path, limits, take)

    def arrays(self, path: Path, limits: Limits | None = None) -> Decoded[dict[str, np.ndarray]]:
        """Return the arrays of an .npz, .npy, safetensors or HDF5 file by name."""

        def take(child: "_Child", answer: dict[str, Any]) -> dict[str, np.ndarray]:
            arrays = {}
            for name, dtype, shape, offset in answer["arrays"]:
                count = int(np.prod(shape, dtype="int64")) * np.dtype(dtype).itemsize
                arrays[name] = np.frombuffer(child.answer_bytes(offset, count), dtype).reshape(shape)
            return arrays

        return self._ask("arrays", path, limits, take)

    def digest(self, path: Path, kind: str) -> str:
        """Return the hash of a file's bytes.

        Its size is checked, its content is not decoded. Raise the errors of decoding.
        """
        return self._ask(f"digest of {kind}", path, None, lambda *_: None).digest

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self, kind: str, path: Path, limits: Limits | None, take: Callable[["_Child", dict[str, Any]], Content]
    ) -> Decoded[Content]:
        request = {"kind": kind, "path": os.fspath(path), "limits": (limits or self.limits).as_dict()}
        if "\0" in request["path"]:
            raise MissingFileError("a file's name has no NUL")
        with self._turn:
            for wait_s in (*_RETRY_AFTER_S, None):
                answer = self._answer(request)
                if wait_s is None or answer.get("fault") not in (*_TRANSIENT, _KILLED):
                    break
                time.sleep(wait_s)
            if "fault" in answer:
                raise EnvironmentFaultError(_fault_message(path, answer["fault"]))
            if "missing" in answer:
                refuse_lost_folder(path)
                raise MissingFileError(f"{shown_name(path)} is missing")
            if "failure" in answer:
                raise DecodingError(answer["failure"], refused=answer.get("refused", False))
            assert self._child is not None
            content = take(self._child, answer)
            self._child.release_answer()
            if answer["retire"]:
                self.close()
            return Decoded(content, answer["digest"])

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._child is None or self._child.has_ended():  # an end between two requests is no fault of a file
            self.close()
            self._child = _Child()
        answer = self._child.ask(request)
        if self._child.has_ended() or answer.get("fault") == errno.ETIMEDOUT:
            self.close()
        return answer


_own: Decoder | None = None


def own_decoder() -> Decoder:
    """Return the decoder of this process, created at the first call. For callers that receive only a path."""
    global _own
    if _own is None:
        _own = Decoder()
    return _own


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz`, `.npy`, safetensors or HDF5 file by name, using the decoder of this process."""
    return own_decoder().arrays(path).content


_KILLED = -1  # used instead of an errno: the process was ended by a signal that no file content can cause


class _Child:
    """One decoding process, and the memory and descriptors shared with it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, self._lifeline = os.pipe()
        self._answers, self._status, self._chatter = (os.memfd_create(name) for name in ("answers", "status", "chatter"))
        # Libraries may print while they decode. Their output goes to memory and is always appended.
        fcntl.fcntl(self._chatter, fcntl.F_SETFL, os.O_APPEND)
        inherited = [theirs.fileno(), self._answers, self._status, lifeline]
        self._process = subprocess.Popen(
            [sys.executable, "-P", *(["-S"] if sys.flags.no_site else []), "-m", _PROGRAM, *map(str, inherited)],
            stdin=subprocess.DEVNULL, stdout=self._chatter, stderr=self._chatter, pass_fds=inherited, env=_environment(),
        )  # fmt: skip
        theirs.close()
        os.close(lifeline)
        descriptors = (self._lifeline, self._answers, self._status, self._chatter)
        self.end = weakref.finalize(self, _end, self._process, self._socket, descriptors)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the answer. If the process ends, by itself or by us, the cause is the answer."""
        os.ftruncate(self._chatter, 0)
        os.ftruncate(self._status, 0)
        try:
            self._socket.send(json.dumps(request).encode())
            began = time.monotonic()
            while not select.select([self._socket], [], [], _LOOK_EVERY_S)[0]:
                budget = self._budget()
                if time.monotonic() - began > _READ_S + (budget.wall_s if budget else 0):
                    self._process.kill()
                    return _too_slow(5 * budget.cpu_s) if budget else {"fault": errno.ETIMEDOUT}
            if message := self._socket.recv(MESSAGE_BYTES):
                return json.loads(message)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return self._epitaph()

    def answer_bytes(self, offset: int, count: int) -> np.ndarray:
        """Return the answer's content, uint8 [count]. It is a copy, so later writes of the process cannot change it."""
        content = np.empty(count, "uint8")
        left = memoryview(content)  # type: ignore[arg-type]
        while left:
            done = os.preadv(self._answers, [left], offset)
            if not done:
                raise RuntimeError("the decoder's answer is shorter than announced")
            left, offset = left[done:], offset + done
        return content

    @contextlib.contextmanager
    def answer_view(self, count: int) -> Iterator[memoryview]:
        """Yield the first `count` bytes of the answer's content. The caller must copy them before the next request."""
        if os.fstat(self._answers).st_size < count:
            raise RuntimeError("the decoder's answer is shorter than announced")
        with mmap.mmap(self._answers, count, access=mmap.ACCESS_READ) as answer, memoryview(answer) as view:
            yield view

    def release_answer(self) -> None:
        """Free the memory of a large answer. The memory of a small one is reused."""
        if os.fstat(self._answers).st_size > _KEPT_ANSWER_BYTES:
            os.ftruncate(self._answers, 0)

    def _budget(self) -> Budget | None:
        """Return the current budget of the process; None while it reads the file."""
        fields = os.pread(self._status, 64, 0)
        return Budget(*json.loads(fields)) if fields else None

    def _epitaph(self) -> dict[str, Any]:
        """Return the answer for a process that ended: the limit that it reached, or that it crashed."""
        code = self._process.wait()
        chatter = os.pread(self._chatter, 4096, max(0, os.fstat(self._chatter).st_size - 4096)).decode(errors="replace")
        budget = self._budget()
        if budget is None and code > 0:  # for example an incomplete installation
            last = (chatter.strip().splitlines() or [f"exit code {code}"])[-1]
            raise EnvironmentFaultError(f"the process that decodes files cannot start ({last}): reinstall opt_ds")
        if -code in _FROM_OUTSIDE or budget is None:  # without a budget it had not begun to decode
            return {"fault": _KILLED}
        if code == -signal.SIGXCPU:
            return _too_slow(budget.cpu_s)
        if code == -signal.SIGALRM:
            return _too_slow(budget.wall_s)
        if "memory allocation of" in chatter or "MemoryError" in chatter:  # last messages of Rust and of Python
            return {"failure": f"it needs more than {readable(budget.memory_bytes)} of memory", "refused": True}
        return {"failure": f"the decoder crashed ({f'signal {-code}' if code < 0 else f'exit code {code}'})"}


def refuse_lost_folder(path: Path) -> None:
    """Raise EnvironmentFaultError if the folder of a missing file is missing too.

    That is the case for a lost mount or a moved corpus.
    """
    folder = file_on_disk(path).parent
    try:
        os.stat(folder)
    except OSError as error:
        raise EnvironmentFaultError(_fault_message(folder, error.errno or errno.EIO)) from None


def _too_slow(seconds: float) -> dict[str, Any]:
    return {"failure": f"it took more than {seconds:.0f} s to decode", "refused": True}


def _fault_message(path: Path, fault: int) -> str:
    if fault == _KILLED:
        return f"{path}: the process that decodes it was ended from outside (out of memory?): free memory"
    return f"{path}: cannot be read ({os.strerror(fault)}): check its permissions and the disk or mount that it is on"


def _environment() -> dict[str, str]:
    """Return the environment of the process: the same package, one thread, one heap.

    Each further heap would count as memory.
    """
    root = str(PACKAGE_FOLDER.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Freed memory is reused for the next file, instead of being returned to the system and mapped again page by page.
    reuse = {"PILLOW_BLOCKS_MAX": "8", "MALLOC_MMAP_THRESHOLD_": str(64 * MIB), "MALLOC_TRIM_THRESHOLD_": str(256 * MIB)}
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return {**os.environ, "PYTHONPATH": path, **one, **reuse}


def _end(process: subprocess.Popen[bytes], connection: socket.socket, descriptors: tuple[int, ...]) -> None:
    process.kill()
    connection.close()
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may wait for a file system that does not respond
        process.wait(5)
