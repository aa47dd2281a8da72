"""The console script. `cdp ready` is answered before the libraries of the other commands are loaded."""

from __future__ import annotations

import sys

from appliance import ready


def main() -> None:
    what = ready.asked(sys.argv[1:])
    if what is not None:
        sys.exit(ready.main(what))
    from appliance.cli import main as commands

    commands.main()


if __name__ == "__main__":
    main()
