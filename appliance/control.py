"""The child's end of the control channel: JSON lines over the socketpair that its parent made.

Down come `{"settings": {…}}` once, then `{"id", "command", "arguments"}`; up go `{"ready": {…}}`, `{"figures": {…}}`,
`{"id", "result"}`, `{"id", "error", "exit_code"}` and, before a child gives up, `{"fatal", "exit_code"}`. The server
loop only reads what is there; a thread that sits in `sendall` writes, so that a parent that is slow to read never
holds up production.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from queue import Full, Queue
from typing import Any

from cdp.errors import CdpError, StorageError

FD_VARIABLE = "CDP_CONTROL_FD"
PARENT_VARIABLE = "CDP_PARENT_PID"
# A command's arguments are names and numbers; the largest is a list of ranges to verify.
MAX_COMMAND_BYTES = 4 << 20
# Answers that wait for the parent to read them: it never has more commands under way than this.
MAX_COMMANDS = 128
RECEIVE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1

Done = Callable[[dict[str, Any] | None, CdpError | None], None]
Handle = Callable[[str, dict[str, Any], Done], None]


def die_with_parent() -> None:
    """From here on the kernel kills this process when the one that started it ends, also if that was just now.

    Only for who was started by the appliance itself; a command typed by a person outlives its shell.
    """
    expected = os.environ.pop(PARENT_VARIABLE, None)
    if expected is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(expected):
            os._exit(1)


class Channel:
    """One child's end. `receive` and the `done` it hands out belong to the thread of the loop."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._received = bytearray()
        self._out: Queue[bytes | None] = Queue(maxsize=2 * MAX_COMMANDS)
        self._writer = threading.Thread(target=self._write, name="control-writer", daemon=True)
        self._writer.start()

    @classmethod
    def from_environment(cls) -> Channel:
        """The end that the parent passed. Ends the process with a sentence if there is none."""
        number = os.environ.pop(FD_VARIABLE, "")
        if not number.isdigit():
            sys.exit("This is a part of `cdp collector` and `cdp replayer`; start one of those.")
        die_with_parent()
        end = socket.socket(fileno=int(number))
        end.set_inheritable(False)
        return cls(end)

    def fileno(self) -> int:
        return self._end.fileno()

    def settings(self) -> dict[str, Any]:
        """Waits for the first line and returns the settings in it. Raises StorageError when the parent is gone."""
        while b"\n" not in self._received:
            if not self._receive(0):
                raise StorageError("The parent process ended before it sent the settings.")
        message = self._lines()[0]
        return dict(message["settings"])

    def receive(self, handle: Handle, gone: Callable[[], None]) -> None:
        """Runs `handle` for every command that has come whole; `gone` when the parent's end is closed."""
        if not self._receive(socket.MSG_DONTWAIT):
            gone()
            return
        for message in self._lines():
            handle(message["command"], message.get("arguments") or {}, self._answer(message["id"]))

    def _receive(self, flags: int) -> bool:
        try:
            got = self._end.recv(RECEIVE_BYTES, flags)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        self._received += got
        return bool(got) and len(self._received) <= MAX_COMMAND_BYTES

    def _lines(self) -> list[dict[str, Any]]:
        *lines, rest = bytes(self._received).split(b"\n")
        self._received = bytearray(rest)
        return [json.loads(line) for line in lines]

    def _answer(self, number: int) -> Done:
        def done(result: dict[str, Any] | None, error: CdpError | None) -> None:
            if error is None:
                self.send({"id": number, "result": result or {}})
            else:
                self.send({"id": number, "error": error.to_dict(), "exit_code": error.exit_code})

        return done

    def send(self, message: dict[str, Any]) -> None:
        """Queues one message. One that finds the queue full is dropped: then the parent has long stopped reading."""
        try:
            self._out.put_nowait(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except Full:
            pass

    def fatal(self, error: CdpError) -> None:
        """Tells the parent why this child ends."""
        self.send({"fatal": error.to_dict(), "exit_code": error.exit_code})

    def _write(self) -> None:
        while (message := self._out.get()) is not None:
            try:
                self._end.sendall(message)
            except OSError:
                return  # the parent is gone: the loop sees it at its end of reading

    def close(self) -> None:
        """Sends what is queued, for at most 5 s."""
        self._out.put(None)
        self._writer.join(5)
        self._end.close()
