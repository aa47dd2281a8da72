"""A folder whose power can be cut: it knows what of it was synced, and may lose everything else, page by page.

It stands in at the door (`cdp/storage.py`) for syncs and renames. Names are all-or-nothing since the last sync of the
folder, as a journaling file system keeps them; contents are whatever mixture of old and new pages one likes.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cdp import storage

PAGE = storage.PAGE_BYTES


class PowerCut(BaseException):
    """Raised inside the code under test where the power goes."""


class Disk:
    """`countdown`: how many more calls through the door until the power goes; None: it stays."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.countdown: int | None = None
        self._rename = storage.rename
        self._synced_names: dict[str, int] = {}  # name -> inode
        self._synced_content: dict[int, bytes] = {}
        self._held: dict[int, int] = {}  # inode -> a descriptor, so that no inode is used twice in one life
        patch.setattr(storage, "fdatasync", self._fdatasync)
        patch.setattr(storage, "sync_folder", self._sync_folder)
        patch.setattr(storage, "rename", self._renamed)

    def _tick(self) -> None:
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown < 0:
                raise PowerCut

    def _fdatasync(self, fd: int) -> None:
        self._tick()
        size = os.fstat(fd).st_size
        self._synced_content[os.fstat(fd).st_ino] = os.pread(fd, size, 0)
        self._hold()

    def _sync_folder(self, path: str) -> None:
        self._tick()
        if os.path.abspath(path) == str(self._folder):
            self._synced_names = self._names()
            self._hold()

    def _renamed(self, old: str, new: str) -> None:
        self._tick()
        self._hold()
        self._rename(old, new)

    def _names(self) -> dict[str, int]:
        return {p.name: p.stat().st_ino for p in self._folder.iterdir() if p.is_file() and p.name != "lock"}

    def _hold(self) -> None:
        for name, inode in self._names().items():
            if inode not in self._held:
                self._held[inode] = os.open(self._folder / name, os.O_RDWR)

    def cut(self, choice: random.Random) -> None:
        """The power goes and comes back; the code under test has closed its files."""
        self.countdown = None
        self._hold()
        now = self._names()
        names = now if choice.random() < 0.5 else self._synced_names
        contents = {}
        for name, inode in names.items():
            contents[name] = self._mixed(inode, choice)
        for name in now:
            (self._folder / name).unlink()
        for name, content in contents.items():
            (self._folder / name).write_bytes(content)
        self.close()
        self._held, self._synced_content = {}, {}
        self._synced_names = self._names()
        self._hold()
        for inode, fd in self._held.items():
            self._synced_content[inode] = os.pread(fd, os.fstat(fd).st_size, 0)

    def _mixed(self, inode: int, choice: random.Random) -> bytes:
        fd = self._held[inode]
        new = os.pread(fd, os.fstat(fd).st_size, 0)
        old = self._synced_content.get(inode, b"").ljust(len(new), b"\0")
        keep = choice.choice((0.0, 0.5, 0.9, 1.0))
        pages = range(0, len(new), PAGE)
        return b"".join((new if choice.random() < keep else old)[at : at + PAGE] for at in pages)

    def close(self) -> None:
        for fd in self._held.values():
            os.close(fd)
