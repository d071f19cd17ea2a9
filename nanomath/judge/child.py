"""A child process that answers lines, with a deadline and a kill that reaches what it started.

A request and its reply are one line each; nothing is unpickled. The child leads a session of its
own, so that no Ctrl-C of a terminal reaches it and one signal reaches all that it has started. What
it prints on stderr is passed on as it comes.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress


class Late(Exception):
    """The child has not answered in time."""


class Ended(Exception):
    """The child has ended, or closed its pipes, without an answer."""


class Child:
    """A running child. Raises OSError where it cannot be started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        pass_fds: Sequence[int] = (),
        on_stderr: Callable[[bytes], None],
    ):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._received = b""
        os.set_blocking(self._process.stdin.fileno(), False)
        self._forwarding = threading.Thread(target=self._forward, args=(on_stderr,), daemon=True)
        self._forwarding.start()

    def ask(self, request: bytes, seconds: float) -> bytes:
        """Send a line (none if empty) and return the reply's. Raises Late or Ended.

        Writing and reading wait for each other's pipe: a child that does not read must not hold up
        whoever asks.
        """
        give_up = time.monotonic() + seconds
        unsent = memoryview(request)
        with selectors.DefaultSelector() as pipes:
            pipes.register(self._process.stdout, selectors.EVENT_READ)
            if unsent:
                pipes.register(self._process.stdin, selectors.EVENT_WRITE)
            while b"\n" not in self._received:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise Late
                for key, _ in pipes.select(left):
                    try:
                        if key.fileobj is self._process.stdin:
                            unsent = unsent[os.write(key.fd, unsent) :]
                            if not unsent:
                                pipes.unregister(self._process.stdin)
                        elif chunk := os.read(key.fd, 1 << 16):
                            self._received += chunk
                        else:
                            raise Ended
                    except BlockingIOError:
                        pass
                    except OSError:  # a broken pipe
                        raise Ended from None
        reply, _, self._received = self._received.partition(b"\n")
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
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
        return self._process.returncode

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _forward(self, on_stderr: Callable[[bytes], None]) -> None:
        with self._process.stderr as pipe:
            while chunk := pipe.read(1 << 16):
                on_stderr(chunk)
