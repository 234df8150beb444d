"""The process that decodes untrusted files, one after another, under limits.

`decoder.py` starts it and communicates with it. Nothing that happens here harms the process that asked, not even a
crash of a native library:

- Memory (RLIMIT_AS) and CPU time (RLIMIT_CPU) are limited per file, based on its header. A timer limits the wall-clock
  time. Exceeding a limit ends this process only.
- It ends with the process that started it, whatever it computes at that moment (see `_end_with_parent`).
- It writes nothing but its answer. There are no core dumps, and output of libraries goes to memory that the parent may
  read.

A request is one JSON message: kind (image, audio, arrays), path, limits. The path may be a reference to a member of a
tar (tar_members.py), which is copied into memory and then treated like a file. The answer is one JSON message; the bytes
of its arrays are in shared memory. A file is first read to its end, for its hash, before any decoder sees it. This
separates errors of the file system ("fault") from errors of the content ("failure").
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import resource
import select
import signal
import socket
import stat
import sys
from typing import Any, BinaryIO, cast

from opt_ds.decoding.limits import Budget, Limits, readable
from opt_ds.decoding.reasons import BrokenFileError
from opt_ds.decoding.tar_members import MemberReference, content_blocks, find_member, member_reference

MESSAGE_BYTES = 2**17  # a request contains one path
DIGEST_BYTES = 8  # enough to count identical files, not to prove identity
_STACK_BYTES = 64 * 2**20  # enough for an SVG of a thousand nested groups; deeper nesting ends this process
_RETIRE_BYTES = 512 * 2**20  # memory that libraries did not free; above it, the process is replaced
_UNUSABLE_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO)
#: Errors of the file system, the network or the kernel, never caused by the content of a file.
FAULTS = tuple(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EMFILE", "ENFILE", "EREMOTEIO", "EHOSTDOWN",
                 "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNRESET", "ECONNABORTED", "ENODEV", "ENOLINK", "EAGAIN", "EBUSY")
)  # fmt: skip


class Process:
    """The main loop of the process.

    `answers` is the descriptor of memory shared with the parent. `status` is that of the current budget, for the
    parent's error messages.
    """

    def __init__(self, requests: socket.socket, answers: int, status: int) -> None:
        self._requests, self._answers, self._status = requests, answers, status
        self._idle_bytes = 0
        self._budget = Budget()

    def run(self) -> None:
        """Answer requests until the parent closes its end of the socket."""
        while message := self._requests.recv(MESSAGE_BYTES):
            answer = self._answer(json.loads(message))
            self._allow(None)
            answer["retire"] = bool(self._idle_bytes) and _own_memory() > self._idle_bytes + _RETIRE_BYTES
            self._requests.send(json.dumps(answer).encode())

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        path, limits = request["path"], Limits(**request["limits"])
        kind = request["kind"].removeprefix("digest of ")
        digest_only = kind != request["kind"]
        if not digest_only:
            _import_decoders(kind)
        self._idle_bytes = self._idle_bytes or _own_memory()
        reference = member_reference(path)
        try:
            with _open(path if reference is None else reference.tar) as file:
                size = os.fstat(file.fileno()).st_size if reference is None else reference.size
                if size > limits.file_bytes(kind):
                    allowed = f"{readable(limits.file_bytes(kind))} are allowed"
                    return {"failure": f"the file has {readable(size)}, {allowed}", "refused": True}
                if reference is None:
                    return self._content(kind, file, path, size, limits, digest_only)
                with _in_memory(file, reference) as member:
                    return self._content(kind, member, f"/proc/self/fd/{member.fileno()}", size, limits, digest_only)
        except BrokenFileError as error:
            return {"failure": str(error)}
        except OSError as error:
            return _answer_of_os_error(error)

    def _content(self, kind: str, file: BinaryIO, path: str, size: int, limits: Limits, digest_only: bool) -> dict[str, Any]:
        digest = hashlib.file_digest(cast(io.BufferedReader, file), _new_digest).hexdigest()
        if digest_only:
            return {"digest": digest}
        if kind == "audio":
            _import_pyav(file)
        file.seek(0)
        return {"digest": digest, **self._decode(kind, file, path, size, limits)}

    def _decode(self, kind: str, file: BinaryIO, path: str, size: int, limits: Limits) -> dict[str, Any]:
        from opt_ds.decoding.reasons import RefusedError, reason_of

        self._allow(limits.of_header(size))
        try:
            if kind == "image":
                return self._image(file, path, size, limits)
            if kind == "audio":
                return self._audio(file, path, size, limits)
            return self._arrays(file, limits)
        except MemoryError:
            return {"failure": f"it needs more than {readable(self._budget.memory_bytes)} of memory", "refused": True}
        except Exception as error:  # decoders raise exceptions of any type
            if isinstance(error, OSError) and error.errno in FAULTS:
                raise
            file.seek(0)
            return {"failure": reason_of(error, kind, file.read(4096)), "refused": isinstance(error, RefusedError)}

    def _image(self, file: BinaryIO, path: str, size: int, limits: Limits) -> dict[str, Any]:
        from opt_ds.decoding import drawings, images

        if drawings.is_drawing(file):
            image = drawings.draw(path, limits, lambda pixels: self._allow(limits.of_drawing(size, pixels)))
        else:
            image = images.load_bitmap(
                file, limits.max_pixels, lambda pixels: self._allow(limits.of_image(size, pixels))
            )
        self._write(image.tobytes(), 0)
        return {"size": image.size}

    def _audio(self, file: BinaryIO, path: str, size: int, limits: Limits) -> dict[str, Any]:
        from opt_ds.decoding.audio import decode_audio

        def allow(values: int) -> None:
            self._allow(limits.of_audio(size, values))

        mono, rate_hz = decode_audio(file, limits.max_seconds, allow)
        self._write(mono, 0)
        return {"samples": len(mono), "rate_hz": rate_hz}

    def _arrays(self, file: BinaryIO, limits: Limits) -> dict[str, Any]:
        from opt_ds.decoding.array_files import load_arrays

        arrays = load_arrays(file, lambda unpacked_bytes: self._allow(limits.of_arrays(unpacked_bytes)))
        described, offset = [], 0
        for name, array in arrays.items():
            self._write(array.tobytes(), offset)
            described.append([name, array.dtype.str, array.shape, offset])
            offset += array.nbytes
        return {"arrays": described}

    def _allow(self, budget: Budget | None) -> None:
        """Set the limits for the next step of decoding. None removes them, for work that belongs to no file."""
        self._budget = budget or Budget()
        hard = resource.RLIM_INFINITY
        if budget is None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            return
        os.pwrite(self._status, json.dumps([budget.memory_bytes, budget.cpu_s]).ljust(64).encode(), 0)
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + budget.cpu_s), hard))
        resource.setrlimit(resource.RLIMIT_AS, (_own_memory() + budget.memory_bytes, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (budget.memory_bytes, hard))  # shared memory counts as a file
        signal.setitimer(signal.ITIMER_REAL, budget.wall_s)

    def _write(self, data: Any, offset: int) -> None:
        left = memoryview(data).cast("B")
        while left:
            done = os.pwrite(self._answers, left, offset)
            left, offset = left[done:], offset + done


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def _import_decoders(kind: str) -> None:
    """Import what the kind requires before any limit is set, since code does not count towards the memory of a file."""
    if kind == "image":
        import opt_ds.decoding.drawings
        from opt_ds.decoding.images import accepted_formats

        accepted_formats()
    elif kind == "audio":
        import opt_ds.decoding.audio
    else:
        import opt_ds.decoding.array_files  # noqa: F401


def _import_pyav(file: BinaryIO) -> None:
    """Import PyAV before any limit is set if the file needs it and it is installed. Most files do not."""
    from opt_ds.decoding.containers import is_container

    if is_container(file):
        with contextlib.suppress(ImportError):
            import av  # noqa: F401


def _open(path: str) -> BinaryIO:
    # Open without blocking: opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _in_memory(tar: BinaryIO, reference: MemberReference) -> BinaryIO:
    """Return a file in memory with the content of a member. Raise BrokenFileError if the tar does not have it."""
    member = find_member(tar, reference)
    descriptor = os.memfd_create("member")
    try:
        for block in content_blocks(tar, member):
            left = memoryview(block)
            while left:
                left = left[os.write(descriptor, left) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _answer_of_os_error(error: OSError) -> dict[str, Any]:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return {"missing": True}
    if error.errno in _UNUSABLE_NAME:
        return {"failure": "the name is not that of a regular file", "refused": True}
    return {"fault": error.errno or errno.EIO}


def _own_memory() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _end_with_parent(lifeline: int) -> None:
    """Let the kernel end this process (SIGIO) as soon as the parent's end of the pipe is closed.

    Only the parent holds it. A thread could not do that, since native code may hold the interpreter lock forever.
    PR_SET_PDEATHSIG would end this process together with the *thread* that started it, and the threads of a web server
    are short-lived.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it was closed before the signal was requested
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Run the process.

    The arguments are inherited descriptors: socket, memory for answers, memory for the status, pipe.
    """
    connection, answers, status, lifeline = map(int, arguments)
    _end_with_parent(lifeline)
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends these to the parent too, which decides
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES if hard < 0 else min(_STACK_BYTES, hard), hard))
    with socket.socket(fileno=connection) as requests:
        Process(requests, answers, status).run()


if __name__ == "__main__":
    main(sys.argv[1:])
