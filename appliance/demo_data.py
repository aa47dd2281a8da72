"""The data of the tour: a real ext4 file system with files where its tools are installed, else plain random data."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

IMAGE_BYTES = 64 << 20
FILES = 24
FILE_BYTES = 512 << 10
# e2fsck's exit codes: 0 is clean; with -n anything else means that something is wrong.
CLEAN = 0
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where Debian keeps them


def tool(name: str) -> str | None:
    """The path of a program of e2fsprogs, None if it is not installed."""
    return shutil.which(name, path=_PATH)


class Data:
    """An image of IMAGE_BYTES and what can be said about copies of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.has_file_system = all(tool(name) for name in ("mke2fs", "debugfs", "e2fsck"))
        self.files: dict[str, str] = {}  # name → SHA-256 of its content
        self.image = self._file_system() if self.has_file_system else os.urandom(IMAGE_BYTES)

    def _file_system(self) -> bytes:
        tree, image = self._folder / "tree", self._folder / "image.ext4"
        tree.mkdir()
        for number in range(FILES):
            content = f"invoice {number}\n".encode() * 1000 + os.urandom(FILE_BYTES)
            (tree / f"invoice-{number:02}.pdf").write_bytes(content)
            self.files[f"invoice-{number:02}.pdf"] = hashlib.sha256(content).hexdigest()
        made = subprocess.run(
            [tool("mke2fs") or "", "-q", "-F", "-t", "ext4", "-d", str(tree), str(image), str(IMAGE_BYTES >> 10)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode != 0:
            self.has_file_system = False
            self.files.clear()
            return os.urandom(IMAGE_BYTES)
        content = image.read_bytes()
        image.unlink()
        return content

    def what(self) -> str:
        if self.has_file_system:
            return f"an ext4 file system with {len(self.files)} files"
        return "random data (mke2fs, debugfs or e2fsck is not installed: no file system this time)"

    def is_clean(self, content: bytes) -> bool:
        """Whether e2fsck finds nothing wrong; without it, whether the bytes are the original ones."""
        if not self.has_file_system:
            return content == self.image
        path = self._save(content)
        return subprocess.run([tool("e2fsck") or "", "-fn", path], capture_output=True, check=False).returncode == CLEAN

    def whole_files(self, content: bytes) -> int:
        """How many of the files are in there with their content unchanged."""
        if not self.has_file_system:
            return 0
        path, dump = self._save(content), str(self._folder / "dumped")
        whole = 0
        for name, digest in self.files.items():
            request = f"dump /{name} {dump}"
            subprocess.run([tool("debugfs") or "", "-R", request, path], capture_output=True, check=False)
            if os.path.exists(dump):
                whole += hashlib.sha256(Path(dump).read_bytes()).hexdigest() == digest
                os.unlink(dump)
        return whole

    def _save(self, content: bytes) -> str:
        path = self._folder / "looked-at.img"
        path.write_bytes(content)
        return str(path)
