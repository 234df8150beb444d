"""A file mapped into memory for reading, without keeping it open.

Python's own mmap keeps one file descriptor per map. A store of a thousand shards would exhaust the usual limit of 1,024
per process.
"""

import ctypes
import mmap
import os
import time
import weakref
from pathlib import Path

import numpy as np

from opt_ds.errors import RunError

_LOOK_EVERY_S = 0.2
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedFile:
    """A memory-mapped file.

    `bytes` is its content, read-only uint8 [size]. The mapping stays valid as long as `bytes` or a view of it is
    referenced.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._next_look = path, 0.0
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.size = os.fstat(descriptor).st_size
            address = _libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0) if self.size else None
            if address == _FAILED:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot be mapped into memory ({os.strerror(code)})", str(path))
        finally:
            os.close(descriptor)
        self._address = address
        if address is None:
            self.bytes = np.zeros(0, np.uint8)
        else:
            buffer = (ctypes.c_ubyte * self.size).from_address(address)
            # Not at interpreter exit, since a thread may still read.
            weakref.finalize(buffer, _libc.munmap, address, self.size).atexit = False
            self.bytes = np.ctypeslib.as_array(buffer)
        self.bytes.flags.writeable = False

    def array(self, dtype: str, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """Return the array that begins at byte `offset`, without a copy."""
        return np.ndarray(shape, dtype, buffer=self.bytes, offset=offset)

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to read these bytes from disk, without waiting for it."""
        start -= start % mmap.PAGESIZE
        self._advise(start, stop - start, mmap.MADV_WILLNEED)

    def check_size(self) -> None:
        """Raise RunError if the file has become shorter.

        Reading the missing part would end the process by a signal (SIGBUS). The file system is queried at most five
        times per second.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY_S
        try:
            size = os.stat(self._path).st_size
        except FileNotFoundError:
            return  # the content of a removed file stays mapped
        except OSError as error:
            raise RunError(f"{self._path}: is no longer readable ({error.strerror}): check its disk or mount") from None
        if size < self.size:
            raise RunError(
                f"{self._path}: was truncated from {self.size} to {size} bytes while it was read: restore it, and run the "
                "same command again"
            )

    def release(self) -> None:
        """Remove the pages from this process's memory. They stay in the page cache."""
        self._advise(0, self.size, mmap.MADV_DONTNEED)

    def _advise(self, start: int, length: int, advice: int) -> None:
        if self._address is not None and length > 0:
            _libc.madvise(self._address + start, length, advice)  # only a hint, so the result is ignored
