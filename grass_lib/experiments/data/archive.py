"""Reads the members of a zip archive that may come from anywhere, in memory: nothing is ever written to the disk."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from zlib import error as ZlibError

from grass_lib.errors import DataError

MOST_MEMBERS = 20_000
LARGEST_MEMBER = 16 * 2**20
LARGEST_TOTAL = 2 * 2**30
"""Bytes, of one member and of all together, once they are unpacked."""


class SafeArchive:
    """A checked zip archive, open for reading.

    Attributes:
        names: Its files, as they are named inside.
    """

    def __init__(self, archive: zipfile.ZipFile, label: str) -> None:
        """Checks every entry of the table of contents.

        Args:
            archive: An open archive.
            label: Its name in messages.

        Raises:
            DataError: An entry would leave the archive's own folder, is a link, a device or encrypted, or is too large.
        """
        self._archive, self._label = archive, label
        entries = archive.infolist()
        self._check(len(entries) <= MOST_MEMBERS, f"{len(entries):,} members", f"at most {MOST_MEMBERS:,}")
        total = sum(entry.file_size for entry in entries)
        self._check(total <= LARGEST_TOTAL, f"{total:,} bytes unpacked", f"at most {LARGEST_TOTAL:,}")
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            self._check_entry(entry)
            if not entry.is_dir():
                self._check(entry.filename not in self._entries, f"{entry.filename!r} twice", "each member once")
                self._entries[entry.filename] = entry
        self.names = tuple(self._entries)

    def read(self, name: str) -> bytes:
        """Content of one file.

        Args:
            name: One of `names`.

        Raises:
            DataError: There is no such file, or it is damaged or larger than its entry says.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise DataError(f"{self._label} has no member {name!r}; expected it. Fetch the archive again")
        try:
            with self._archive.open(entry) as member:
                content = member.read(entry.file_size + 1)
        except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, ZlibError) as error:
            raise DataError(f"{self._label}: {name!r} cannot be unpacked ({error}); fetch the archive again") from error
        except zipfile.BadZipFile as error:
            raise DataError(f"{self._label}: {name!r} is damaged ({error}); fetch the archive again") from error
        self._check(len(content) == entry.file_size, f"{name!r} of another size than it says", f"{entry.file_size:,}")
        return content

    def _check_entry(self, entry: zipfile.ZipInfo) -> None:
        # What was stored, before zipfile made it fit for this system.
        for text in (entry.orig_filename, entry.filename):
            path = PurePosixPath(text)
            safe = not path.is_absolute() and ".." not in path.parts and not set(text) & set("\\:\0") and bool(text)
            self._check(safe, f"the path {text!r}", "names inside the archive's own folder")
        mode = entry.external_attr >> 16
        plain = not stat.S_IFMT(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        self._check(plain, f"{entry.filename!r}, a link or a device", "plain files and folders only")
        self._check(not entry.flag_bits & 0x1, f"{entry.filename!r}, which is encrypted", "files without a password")
        self._check(
            entry.file_size <= LARGEST_MEMBER,
            f"{entry.filename!r} of {entry.file_size:,} bytes unpacked",
            f"at most {LARGEST_MEMBER:,}",
        )

    def _check(self, holds: bool, seen: str, expected: str) -> None:
        if not holds:
            raise DataError(
                f"{self._label} has {seen}; expected {expected}. Nothing was read from it; fetch the archive again"
            )


@contextmanager
def open_archive(path: Path, label: str) -> Iterator[SafeArchive]:
    """Opens and checks a zip archive.

    Args:
        path: Of the file.
        label: Its name in messages.

    Raises:
        DataError: It cannot be read, is no zip archive, or is refused by `SafeArchive`.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{label} cannot be read ({reason}); expected a zip archive. Fetch it again, or make it readable"
        ) from error
    with archive:
        yield SafeArchive(archive, label)
