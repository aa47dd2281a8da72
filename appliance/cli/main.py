"""`cdp`: the global options, all commands, and the one place where a failure becomes a sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

from appliance.cli import (
    bookmark,
    check,
    collector_side,
    config,
    demo,
    diff,
    export,
    init,
    points,
    processes,
    ready,
    rollback,
    status,
    verify,
)  # fmt: skip
from appliance.cli.context import Options, show_error
from cdp.errors import CdpError, RefusedError, StorageError, UsageError

_HINTS = {
    errno.EACCES: "Run it as the owner of that file, or change its permissions.",
    errno.EPERM: "Run it as the owner of that file, or change its permissions.",
    errno.ENOENT: "Is the folder there? Create it first.",
    errno.ENOTDIR: "A part of that path is no folder.",
    errno.EROFS: "That file system is mounted read-only.",
    errno.ENOSPC: "Free some space there.",
}
INTERRUPTED = 130  # what shells expect after Ctrl-C

app = typer.Typer(
    name="cdp", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Continuous data protection: go back to any write of a volume.\n\nBegin with: cdp init && cdp up",
)  # fmt: skip

for topic in (
    init, processes, status, points, bookmark, rollback, export, diff, verify, collector_side, check, ready, config,
    demo,
):  # fmt: skip
    topic.add_to(app)

# typer brings click along under different names in different versions; its own exceptions know their family.
_ClickError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


@app.callback()
def options(
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="The configuration; else $CDP_CONFIG, "
                                 "./cdp.toml or /etc/cdp/cdp.toml.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:  # fmt: skip
    """Continuous data protection: go back to any write of a volume."""
    Options.reset(config, debug)


def run(arguments: list[str]) -> int:
    """One command; its exit code. Prints every failure."""
    as_json = "--json" in arguments
    Options.reset(None, "--debug" in arguments)
    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="cdp", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as e:
        return e.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read stdout has seen enough
        return 0
    except Exception as e:
        if Options.debug:
            traceback.print_exc()
        error = _explain(e)
        show_error(error, as_json)
        return error.exit_code


def _explain(e: Exception) -> CdpError:
    if isinstance(e, CdpError):
        return e
    if isinstance(e, typer.Abort):
        return RefusedError("Declined; nothing was changed.", code="declined")
    if isinstance(e, _ClickError):
        text = e.format_message().rstrip(".")  # type: ignore[attr-defined]
        text = text.replace("Value error, ", "")  # pydantic's, not a person's
        return UsageError(f"{text}." if text else "No command was given.", "See `cdp --help` or `cdp COMMAND --help`.")
    if isinstance(e, OSError):
        where = f"{e.filename}: " if e.filename else ""
        return StorageError(f"{where}{e.strerror or e}.", _HINTS.get(e.errno or 0, "Run it with --debug to see where."))
    return StorageError(f"An unexpected error: {e!r}.", "This is a bug; `cdp --debug …` shows where.")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
