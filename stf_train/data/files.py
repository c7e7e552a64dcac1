"""The files of a data set, in a folder, a zip or a tar archive, under one interface."""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol


class Files(Protocol):
    """Read access to files by name; nothing is ever unpacked to the disk."""

    path: Path
    names: list[str]  # relative, forward slashes, sorted; hidden ones left out

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises:
            ValueError: the archive is damaged there.
        """


class Folder:
    """Files of a folder and of the folders in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = (
            (Path(root) / file).relative_to(path).as_posix()
            for root, _, files in os.walk(path)
            for file in files
        )
        self.names = sorted(name for name in found if not hidden(name))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip:
    """Files of a zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} must be a whole zip archive: {error}") from error
        names = (entry.filename for entry in self._zip.infolist() if not entry.is_dir())
        self.names = sorted(name for name in names if not hidden(name))

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        # RuntimeError: encrypted, or compressed in a way that Python does not know.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{self.path}/{name} cannot be read: {error}") from error


class Tar:
    """Files of a tar archive, compressed or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tar = tarfile.open(path)  # noqa: SIM115
            members = self._tar.getmembers()
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} must be a whole tar archive: {error}") from error
        names = (member.name for member in members if member.isfile())
        self.names = sorted(name for name in names if not hidden(name))

    def read(self, name: str) -> bytes:
        try:
            file = self._tar.extractfile(name)
            assert file is not None  # only regular files are among the names
            return file.read()
        except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path}/{name} cannot be read: {error}") from error


def hidden(name: str) -> bool:
    """Whether a file is an operating system's own, such as .DS_Store or __MACOSX/..."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def base(name: str) -> str:
    """The last part of a name."""
    return PurePosixPath(name).name
