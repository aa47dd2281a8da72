"""Stands where the process of a rollback job does: notes the direction that it was given, and ends."""

from __future__ import annotations

import json
import os
import socket

from appliance.control import FD_VARIABLE

if __name__ == "__main__":
    with socket.socket(fileno=int(os.environ[FD_VARIABLE])) as end, end.makefile() as lines:
        settings = json.loads(lines.readline())["settings"]
    with open(settings["path"] + ".directions", "a") as file:
        file.write(f"{settings['direction']}\n")
