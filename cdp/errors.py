"""The one tree of errors, with the exit code of each.

Every error a person can meet says what was attempted, on what, over which seqs, and what to do about it.
`code` is the stable word for scripts; `exit_code` is what the CLI ends with; `before` and `after` are the
nearest points on both sides where a point was refused (promise 8).
"""

from __future__ import annotations

from typing import Any


class CdpError(Exception):
    """Root. `message` is one sentence; `hint` says what to do; `retriable` whether the same call may work later."""

    code = "error"
    exit_code = 6
    retriable = False

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        code: str | None = None,
        before: dict[str, Any] | None = None,
        after: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.before = before
        self.after = after
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The body of `{"error": …}`; `from_dict` is its inverse, so an error crosses processes whole."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "before": self.before,
            "after": self.after,
        }


class UsageError(CdpError):
    """Wrong usage, configuration or a malformed point."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """The configuration file is missing, malformed or contradicts itself."""

    code = "config"


class PointSyntaxError(UsageError):
    """A point expression that cannot be read."""

    code = "point_syntax"


class NotFoundError(CdpError):
    """What is named never existed."""

    code = "not_found"
    exit_code = 3


class RefusedError(CdpError):
    """Understood, and refused: `code` says why (busy, outside_window, future, beyond_newest, ambiguous, expired,
    in_gap, in_rollback, locked, name_taken, exists, declined, no_space, unsupported, stopped, unauthorized)."""

    code = "refused"
    exit_code = 4


class UnreachableError(CdpError):
    """A process of the appliance cannot be reached."""

    code = "unreachable"
    exit_code = 5
    retriable = True


class StorageError(CdpError):
    """An I/O error, a full disk, or files that are not what they must be."""

    code = "storage"
    exit_code = 6


class CorruptionError(StorageError):
    """Bytes that were durable are not what was written. Never served, never repaired silently."""

    code = "corrupt"


class JournalFullError(StorageError):
    """The journal reached `max_size` or its disk is full; goes on by itself once there is space."""

    code = "journal_full"
    retriable = True


class HoleError(StorageError):
    """A journal jumps over seqs: the group stops (promise 4)."""

    code = "hole"


class ForkedError(StorageError):
    """A journal continues another history than the one applied (promise 4)."""

    code = "forked"


class FencedError(StorageError):
    """A batch of an older incarnation than one already seen (promise 4)."""

    code = "fenced"


_BY_EXIT = {2: UsageError, 3: NotFoundError, 4: RefusedError, 5: UnreachableError, 6: StorageError}


def from_dict(error: dict[str, Any], exit_code: int) -> CdpError:
    """The error that `to_dict` described in another process, with the same code and exit code."""
    kind = _BY_EXIT.get(exit_code, CdpError)
    return kind(
        str(error.get("message", "")),
        str(error.get("hint") or ""),
        code=str(error.get("code", kind.code)),
        before=error.get("before"),
        after=error.get("after"),
    )
