"""Admission control of `opt-ds serve`: one bounded queue, and limits on the size and duration of request bodies.

A request takes a place in the queue before most of its body is read, so that the number of places bounds the memory and
disk that uploads use. The first 64 KiB are read without a place, so a client that sends more slowly than that never
takes a place from another one. Everything here runs and waits in the event loop. Only the computation itself runs in a
thread, one request at a time.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opt_ds.serving.limits import MIB, Limits

T = TypeVar("T")
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_CLIENT_CLOSED = 499  # sent to a client that is gone, so the code is never read


class Queue:
    """The queue's places, and a lock that lets one request at a time compute."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places: dict[Upload, None] = {}  # in order of arrival
        self._turn = asyncio.Lock()  # first come, first served

    def check(self) -> None:
        """Raise a 503 if there is no place for a request that arrives now."""
        if len(self._places) >= self._limits.places and self._slow() is None:
            retry = {"Retry-After": str(self._limits.retry_after_s)}
            raise HTTPException(503, "too many requests are waiting: try again soon", headers=retry)

    @contextmanager
    def place(self, upload: "Upload") -> Iterator[Callable[[], None]]:
        """Hold a place.

        The context's value is a function that releases the place early. Raise a 503 if there is no place.
        """
        self.check()
        if len(self._places) >= self._limits.places and (slow := self._slow()):
            slow.interrupt()
            del self._places[slow]
        self._places[upload] = None
        try:
            yield lambda: self._places.pop(upload, None)
        finally:
            self._places.pop(upload, None)

    def _slow(self) -> "Upload | None":
        return next((upload for upload in self._places if upload.is_slow()), None)

    async def compute(self, receive: Receive, work: Callable[[], T]) -> T:
        """Run `work` in a thread when it is this request's turn.

        A request whose client disconnects while waiting is dropped.
        """
        await self._wait(receive)
        try:
            return await run_in_threadpool(work)
        finally:
            self._turn.release()

    async def _wait(self, receive: Receive) -> None:
        ours = False
        async with anyio.create_task_group() as group:

            async def leave_with_client() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(leave_with_client)
            await self._turn.acquire()
            ours = True
            group.cancel_scope.cancel()
        if not ours:
            raise HTTPException(_CLIENT_CLOSED, "the client is gone")


class Upload:
    """A request's body. Its size and duration are tracked, and its first part is read ahead."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._ahead: deque[Message] = deque()
        self._clock = asyncio.get_running_loop().time
        self._start, self._bytes, self._complete, self._interrupted = self._clock(), 0, False, False
        self._timeout: asyncio.Timeout | None = None

    async def read_ahead(self) -> None:
        """Read until the body ends or is long enough (`ahead_bytes`) to get a place."""
        while not self._complete and self._bytes < self._limits.ahead_bytes:
            self._ahead.append(await self._next())

    async def receive(self) -> Message:
        """Return the next message of the application's ASGI channel.

        Raise a 408 for a body that takes too long, and a 413 for one that is too large.
        """
        if self._ahead:
            return self._ahead.popleft()
        return await (self._receive() if self._complete else self._next())

    def is_slow(self) -> bool:
        """Return whether the upload may lose its place to another request."""
        seconds = self._clock() - self._start
        steady = seconds <= self._limits.steady_s or self._bytes >= self._limits.steady_bytes_per_s * seconds
        return not (self._complete or steady)

    def interrupt(self) -> None:
        """End the upload. A pending read of its next bytes raises a 408."""
        self._interrupted = True
        if self._timeout is not None:
            self._timeout.reschedule(self._clock())

    async def _next(self) -> Message:
        try:
            end = self._clock() if self._interrupted else self._start + self._limits.body_s
            async with asyncio.timeout_at(end) as self._timeout:
                message = await self._receive()
        except TimeoutError:
            why = "others are waiting" if self._interrupted else f"{self._limits.body_s:g} s are allowed"
            raise HTTPException(408, f"the upload is too slow: {why}") from None
        finally:
            self._timeout = None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.upload_bytes:
            raise HTTPException(413, _too_large(self._bytes, self._limits))
        self._complete = not message.get("more_body", False)
        return message


class Admission:
    """ASGI middleware that checks a body's declared size and admits requests to `paths` as the queue has places.

    The place is released as soon as the response begins, so that a client that reads slowly does not hold one.
    """

    def __init__(self, app: ASGIApp, queue: Queue, limits: Limits, paths: Collection[str]) -> None:
        self._app, self._queue, self._limits, self._paths = app, queue, limits, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            _check_size(scope["method"], headers, self._limits)
            if scope["method"] != "POST" or scope["path"] not in self._paths:
                return await self._app(scope, receive, send)
            _check_type(headers)
            await self._admit(scope, receive, send)
        except HTTPException as error:
            await JSONResponse({"detail": error.detail}, error.status_code, error.headers)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._queue.check()
        upload = Upload(receive, self._limits)
        await upload.read_ahead()
        with self._queue.place(upload) as give_back:

            async def send_without_place(message: Message) -> None:
                give_back()
                await send(message)

            await self._app(scope, upload.receive, send_without_place)


def _check_size(method: str, headers: Headers, limits: Limits) -> None:
    # The size of a chunked body is unknown before its end, even if there is a Content-Length too.
    sizes, chunked = headers.getlist("content-length"), "transfer-encoding" in headers
    if chunked or (not sizes and method == "POST"):
        raise HTTPException(411, "the upload has no size: send Content-Length, and no chunks")
    for size in sizes:
        if not (size.isascii() and size.isdigit()):
            raise HTTPException(400, "Content-Length is not a number")
        if len(size) > 20 or int(size) > limits.upload_bytes:
            raise HTTPException(413, _too_large(int(size[:20]), limits))


def _check_type(headers: Headers) -> None:
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in _FORMS and (kind or headers.get("content-length") != "0"):
        raise HTTPException(415, f"Content-Type must be {' or '.join(_FORMS)}")


def _too_large(size: int, limits: Limits) -> str:
    return f"the upload is {size / MIB:.0f} MiB, {limits.upload_bytes / MIB:.0f} are allowed"
