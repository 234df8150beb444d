"""HTTP server of the application: uvicorn, with limits on connections and on the duration of each stage of a request.

uvicorn limits idle connections (`timeout_keep_alive`) and the size of a header. It does not limit how long a header, a
body or the reading of a response takes, and its `limit_concurrency` rejects every client while slow ones hold all
places. This module adds both: each connection is checked twice per second and closed if its current stage lasts too
long.
"""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from http import HTTPStatus
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from opt_ds import interrupts
from opt_ds.serving.guard import SECURITY_HEADERS
from opt_ds.serving.limits import Limits

_BACKLOG = 1024
_TICKS_BETWEEN_LOOKS = 5  # ticks of uvicorn's main loop, which has ten per second
_KEEP_ALIVE_S = 5
_SHUTDOWN_S = 10


class Stage(Enum):
    """What a connection is currently doing."""

    HEADER = "waiting for a request, or the rest of its header"
    BODY = "receiving a body"
    COMPUTING = "waiting for the answer"
    DRAINING = "receiving a body that was already answered"
    SENDING = "sending an answer that the client does not take in"
    CLOSING = "sending the last bytes"


class Connection(H11Protocol):
    """A connection that tracks how long its current stage has lasted."""

    limits = Limits()
    _refused = False

    def connection_made(self, transport) -> None:  # type: ignore[no-untyped-def,override]
        """Accept the connection, or refuse one if there are too many."""
        super().connection_made(transport)
        self._request: object = None
        self._stage, self._since = Stage.HEADER, self.loop.time()
        if len(self.connections) > 2 * self.limits.connections:
            transport.abort()  # refused connections that linger are bounded too
        elif sum(not connection._refused for connection in self._all()) > self.limits.connections:
            self._close_oldest()

    def data_received(self, data: bytes) -> None:
        """Process received data. Data on a refused connection is discarded."""
        if not self._refused:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not valid HTTP."""
        self._refuse(400, "the request is not valid HTTP")

    def check_timeouts(self) -> None:
        """Close the connection if its current stage has lasted too long."""
        now, stage = self.loop.time(), self._present_stage()
        if stage is not self._stage or self.cycle is not self._request:
            self._stage, self._request, self._since = stage, self.cycle, now
        if now - self._since <= self._allowed(stage):
            return
        if stage is Stage.HEADER and self.conn.trailing_data[0]:
            self._refuse(408, f"the request's header took more than {self.limits.header_s:g} s")
        else:
            self.transport.abort()

    def leave(self) -> None:
        """Close the connection unless its request is being computed."""
        if self._present_stage() is not Stage.COMPUTING:
            self.transport.abort()

    def _all(self) -> "list[Connection]":
        return [connection for connection in self.connections if isinstance(connection, Connection)]

    def _present_stage(self) -> Stage:
        if self._refused or self.transport.is_closing():
            return Stage.CLOSING
        if self.flow.write_paused:
            return Stage.SENDING
        if self.conn.their_state is h11.SEND_BODY:
            return Stage.BODY if self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY) else Stage.DRAINING
        return Stage.HEADER if self.conn.their_state is h11.IDLE else Stage.COMPUTING

    def _allowed(self, stage: Stage) -> float:
        limits = self.limits
        return {
            Stage.HEADER: limits.header_s,
            Stage.BODY: limits.body_s + limits.closing_s,  # the application answers with 408 before this
            Stage.COMPUTING: float("inf"),
            Stage.DRAINING: limits.draining_s,
            Stage.SENDING: limits.answer_s,
            Stage.CLOSING: limits.closing_s,
        }[stage]

    def _close_oldest(self) -> None:
        """Refuse the oldest connection that has no request yet. That is this connection if all others have one."""
        waiting = [connection for connection in self._all() if connection._present_stage() is Stage.HEADER]
        oldest = min(waiting, key=lambda connection: connection._since)
        oldest._refuse(503, "too many connections: try again soon")

    def _refuse(self, status: int, reason: str) -> None:
        """Answer without the application.

        Data that still arrives is discarded, so that the client can read the answer.
        """
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer has already begun
            return self.transport.abort()
        if self.cycle is not None:  # tells the application that its client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = f'{{"detail": "{reason}"}}'.encode()
        headers = SECURITY_HEADERS | {"content-type": "application/json", "connection": "close"}
        headers["content-length"] = str(len(body))
        if status == 503:
            headers["retry-after"] = str(self.limits.retry_after_s)
        self._refused, self._since = True, self.loop.time()
        start = h11.Response(status_code=status, reason=HTTPStatus(status).phrase, headers=list(headers.items()))
        events = (start, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._unset_keepalive_if_required()
        try:
            self.transport.write_eof()
        except OSError:  # the client is already gone
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server with checks of its connections. SIGHUP ends it like SIGTERM."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGHUP in addition to uvicorn's signals, unless it is ignored."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        with super().capture_signals():
            if not in_main_thread or interrupts.is_ignored(signal.SIGHUP):
                yield
                return
            before = signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Request the shutdown. After SIGHUP, first detach from the lost terminal."""
        if sig == signal.SIGHUP:
            interrupts.leave_lost_terminal()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Check the connections at every fifth tick."""
        if counter % _TICKS_BETWEEN_LOOKS == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check_timeouts()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close at once every connection whose request is not being computed.

        Ctrl-C therefore does not wait for slow clients.
        """
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.leave()
        await super().shutdown(sockets)


def build_server(app: ASGIApp, limits: Limits | None = None) -> Server:
    """Return the server of an application (opt_ds.serving.app.build_app). `run(sockets=[listen(…)])` starts it.

    uvicorn does not log exceptions of the application, because the guard does.
    """
    protocol = type("Connection", (Connection,), {"limits": limits or Limits()})
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_level="critical", backlog=_BACKLOG, server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=_SHUTDOWN_S,
    )  # fmt: skip
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening IPv4 or IPv6 socket, depending on the address. Raise OSError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)
