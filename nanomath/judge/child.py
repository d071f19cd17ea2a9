"""A child process that answers lines, with a deadline and a kill that reaches what it started.

A request and its reply are one line each, on a socket that is the child's standard input and
output; nothing is unpickled. The child leads a session of its own, so that no Ctrl-C of a terminal
reaches it and one signal reaches all that it has started. What it prints on stderr is passed on as
it comes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

MAX_REPLY_BYTES = 1 << 20  # a reply is a number and a message; more is a flood


class Child:
    """A running child. Raises OSError where it cannot be started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        on_stderr: Callable[[bytes], None],
    ):
        self._socket, its_end = socket.socketpair()
        with its_end:
            self._process = subprocess.Popen(
                command,
                stdin=its_end,
                stdout=its_end,
                stderr=subprocess.PIPE,
                bufsize=0,  # what it prints is read as it comes
                env=environment,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._forwarding = threading.Thread(target=self._forward, args=(on_stderr,), daemon=True)
        self._forwarding.start()

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Send a line (none if empty) and return the reply's.

        Raises TimeoutError where the child does not read or answer in time, which ends the
        conversation, and ConnectionError where it has ended.
        """
        give_up, reply = time.monotonic() + seconds, b""
        self._socket.settimeout(seconds)
        self._socket.sendall(request)
        while not reply.endswith(b"\n"):
            # One deadline for the whole reply: a child that drips must not begin it anew each time.
            self._socket.settimeout(max(give_up - time.monotonic(), 1e-3))
            chunk = self._socket.recv(1 << 16)
            reply += chunk
            if not chunk or len(reply) > MAX_REPLY_BYTES:
                raise ConnectionError("the child has ended without an answer")
            if time.monotonic() > give_up:
                raise TimeoutError("the child has not answered in time")
        return reply

    def end(self, wait: float = 0.0) -> int | None:
        """Kill the child if it has not ended after `wait` seconds, and all that it has started.

        Return its exit status, -n where signal n ended it; None where it cannot be reaped.
        """
        self._wait(wait)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._wait(5.0)
        self._forwarding.join(0.5)  # its last words; whoever else holds the pipe is not waited for
        self._socket.close()
        return self._process.returncode

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _forward(self, on_stderr: Callable[[bytes], None]) -> None:
        with self._process.stderr as pipe:
            while chunk := pipe.read(1 << 16):
                on_stderr(chunk)
