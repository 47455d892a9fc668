"""Reading what a runner did not just write itself: bounded in kind, size, unpacking and nesting.

A file that a run is given may be damaged or made by someone else: a named pipe that never answers,
a device without end, an archive of a kilobyte that unpacks to a terabyte, brackets nested deeper
than any parser recurses. Every file of every runner is opened here. Three kinds of error come out:
``OSError`` with a reason in ``strerror`` for what cannot be opened or is no bounded regular file,
``ContentError`` with a reason for what is in it; callers say of which file, in the house's words.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import pickletools
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

MIB = 2**20

# Configurations, manifests, lists of sizes: the largest that a run writes has some kilobytes.
MOST_TEXT = MIB
# Results and environments hold one entry per network; a log one line per interval.
MOST_JSON = 64 * MIB
MOST_LOG = 1024 * MIB
MOST_LINE = MIB
# One encoded image, or another file of a sample.
MOST_IMAGE = 256 * MIB
# Checkpoints and trained networks; the largest network here has 0.2 GB with its optimiser.
MOST_TENSORS = 16 * 1024 * MIB
# Levels of lists and mappings in each other; what runs write has six.
MOST_NESTING = 64
# Values in a checkpoint; the largest network here has some thousands.
MOST_VALUES = 2_000_000
# What a compressed file may grow to: images shrink by a tenth, noise by nothing. The constant lets
# small files of repeated pixels through.
UNPACKED_CONSTANT, UNPACKED_RATIO = 64 * MIB, 32


class ContentError(ValueError):
    """What a file holds is not what it must hold; the message is only the reason."""


class IrregularFileError(OSError):
    """It is no regular file, or a larger one than is read; ``strerror`` says so."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, os.fspath(path))


_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def _require_regular(path: Path, status: os.stat_result, most: int) -> None:
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise IrregularFileError(path, f"{name}, no regular file")
    if status.st_size > most:
        raise IrregularFileError(path, f"{status.st_size} bytes, more than {most}")


def open_file(path: Path, most: int) -> BinaryIO:
    """Open a regular file of at most so many bytes for reading, without waiting for anything.

    Raises:
        OSError: it cannot be opened, or is another kind of file or a larger one.
    """
    # Before opening: to open a device can have effects.
    _require_regular(path, path.stat(), most)
    # And without waiting, should it have become a pipe since.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(path, os.fstat(handle), most)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most so many bytes.

    Raises:
        OSError: see :func:`open_file`; also where it grows beyond that while it is read.
    """
    with open_file(path, most) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
        if len(content) > size:
            # It grows, as the log of a run that goes on does.
            content += file.read(most - size)
    if len(content) > most:
        raise IrregularFileError(path, f"more than {most} bytes")
    return content


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Return the content of a text file in UTF-8, whatever the terminal speaks.

    Raises:
        OSError: see :func:`read_file`.
        ContentError: it is no UTF-8.
    """
    try:
        return read_file(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ContentError("no text in UTF-8") from error


class Bounded:
    """What is unpacked from a stream: no more than so many bytes of it can be read.

    Args:
        file: what is read.
        most: bytes in all; the next one raises ContentError.
    """

    def __init__(self, file: Any, most: int) -> None:
        self.file = file
        self.left = most
        self.most = most

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most ``size``."""
        content: bytes = self.file.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise ContentError(f"more than {self.most} bytes when unpacked")
        return content


def most_unpacked(packed: int) -> int:
    """Return how many bytes may come out of a compressed file of so many."""
    return UNPACKED_CONSTANT + UNPACKED_RATIO * packed


class _Member(tarfile.TarInfo):
    """A member of an archive whose name and attributes are of bounded length."""

    _EXTENDED = (
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    )

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        found = super().frombuf(buf, encoding, errors)
        if found.type in cls._EXTENDED and found.size > MOST_TEXT:
            raise ContentError(f"a header of {found.size} bytes")
        return found


# What reading a damaged archive can raise; headers in each other are read by recursion.
TAR_ERRORS = (
    *(ContentError, EOFError, OSError, OverflowError, RecursionError, ValueError),
    *(tarfile.TarError, zlib.error),
)


def open_tar(file: Any, *, stream: bool = False) -> tarfile.TarFile:
    """Open a tar archive that is not compressed, its headers bounded.

    Reading raises one of ``TAR_ERRORS``, besides what callers raise themselves.

    Args:
        file: opened for reading.
        stream: read it from beginning to end; ``file`` then needs nothing but ``read``.
    """
    if stream:
        return tarfile.open(fileobj=file, mode="r|", tarinfo=_Member)
    return tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive in order, and keep none: a shard may have millions."""
    for member in tar:
        yield member
        tar.members = []  # type: ignore[attr-defined]


def member_content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """Return the content of a regular member of at most so many bytes.

    Raises:
        ContentError: it is sparse, of few bytes that stand for many, or larger.
    """
    if member.issparse() or member.size > most:
        kind = "sparse, " if member.issparse() else ""
        raise ContentError(f"'{member.name:.80}' of {kind}{member.size} bytes, more than {most}")
    file = tar.extractfile(member)
    assert file is not None, "a regular member has content"
    return file.read()


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, without number and path."""
    text = getattr(error, "strerror", None) or str(error)
    lines = text.splitlines()
    return lines[0][:200] if lines else type(error).__name__


# JSON and YAML.

_BRACKETS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def _nesting(text: str) -> int:
    """Return how deep the brackets of a JSON text are nested, without any recursion."""
    if text.count("[") + text.count("{") <= MOST_NESTING:
        return 0
    depth = deepest = 0
    in_string = False
    for token in _BRACKETS.finditer(text):
        symbol = token.group()
        if symbol == '"':
            in_string = not in_string
        elif not in_string and symbol in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif not in_string and symbol in "]}":
            depth -= 1
    return deepest


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ContentError: it is none, or is nested more than ``MOST_NESTING`` levels.

    Example:
        >>> parse_json(b'{"a": [1]}')
        {'a': [1]}
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        if _nesting(text) > MOST_NESTING:
            raise ContentError(f"nested more than {MOST_NESTING} levels")
        return json.loads(text)
    except ContentError:
        raise
    # A number of too many digits is a ValueError, like all the rest.
    except ValueError as error:
        raise ContentError(f"{type(error).__name__}: {error}"[:200]) from error


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: see :func:`read_file`.
        ContentError: see :func:`parse_json`.
    """
    return parse_json(read_file(path, most))


def _check_events(text: str) -> None:
    depth = 0
    collections = set()
    # The parser keeps its own stack; what builds the value recurses.
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if event.anchor is not None:
                collections.add(event.anchor)
            if depth > MOST_NESTING:
                raise ContentError(f"nested more than {MOST_NESTING} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent) and event.anchor in collections:
            # A list of ten lists of ten lists ... has few letters and many values.
            line = event.start_mark.line + 1
            raise ContentError(f"line {line}: an alias of a list or mapping")


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text: plain values, no alias of a list or a mapping.

    Raises:
        ContentError: it is none, or is nested more than ``MOST_NESTING`` levels.

    Example:
        >>> parse_yaml("a: [1]")
        {'a': [1]}
    """
    try:
        _check_events(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ContentError(f"{place}{reason}") from error
    except ContentError:
        raise
    # A day 2001-02-30, or a number of too many digits.
    except ValueError as error:
        raise ContentError(str(error)[:200]) from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a log with their numbers from 1; of one too long, the beginning.

    Raises:
        OSError: see :func:`open_file`.
    """
    with open_file(path, MOST_LOG) as file:
        number = 0
        while line := file.readline(MOST_LINE):
            number += 1
            yield number, line.rstrip(b"\r\n")
            while line and not line.endswith(b"\n"):
                line = file.readline(MOST_LINE)


# Tensors.

# What torch.save writes for tensors, parameters and plain Python, and nothing that allocates
# anything by a number in the file.
_GLOBALS = re.compile(
    r"collections (OrderedDict|defaultdict|Counter)"
    r"|torch(\.storage)? (\w+Storage|Size|device|[a-z]+\d*)"
    r"|torch\._utils (_rebuild_tensor|_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|_codecs encode"
    r"|builtins (set|complex)|__builtin__ (set|complex)"
)


def _check_pickle(file: BinaryIO) -> None:
    """Require the instructions of a pickle to name nothing but what tensors need."""
    for code, argument, _ in pickletools.genops(file):
        # torch.save writes protocol 2, in which a name is in one piece.
        if code.name == "STACK_GLOBAL" or (
            code.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))
        ):
            name = str(argument or "a name in pieces").replace(" ", ".")
            raise ContentError(f"more than tensors and plain Python, '{name}'")


def _check_archive(content: bytes) -> None:
    """Require a zip archive as torch.save writes it: nothing compressed, nothing twice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        total = 0
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(content):
                raise ContentError(f"a compressed part '{member.filename}'")
            total += member.file_size
            if total > len(content):
                raise ContentError("parts that are larger than the file")
            if member.filename.rpartition("/")[2] == "data.pkl":
                _check_pickle(io.BytesIO(archive.read(member)))


def require_bounded(value: Any) -> None:
    """Require a loaded value of bounded depth and number, its tensors no larger than their memory.

    What walks through it next, copies it or compares it, recurses.

    Raises:
        ContentError: it is not.
    """
    level, depth, count = [value], 0, 0
    while level:
        depth += 1
        count += len(level)
        if depth > MOST_NESTING or count > MOST_VALUES:
            raise ContentError(
                f"more than {MOST_NESTING} levels"
                if depth > MOST_NESTING
                else f"more than {MOST_VALUES} values"
            )
        inner: list[Any] = []
        for item in level:
            if isinstance(item, Tensor):
                _require_plain(item)
            elif isinstance(item, Mapping):
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                inner += item
            if len(inner) > MOST_VALUES:
                raise ContentError(f"more than {MOST_VALUES} values")
        level = inner


def _require_plain(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ContentError(f"a {tensor.layout} tensor on {tensor.device}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ContentError(f"a tensor {list(tensor.shape)} that repeats its values")


def load_tensors(content: bytes) -> Any:
    """Return what ``torch.save`` wrote: tensors and plain Python, on the CPU; no code is run.

    Raises:
        ContentError: it holds anything else, or is damaged, or would unpack to more than it is.
    """
    try:
        if content.startswith(b"PK\x03\x04"):
            _check_archive(content)
        else:
            # The old form: magic number, version, machine, value, names of storages.
            file = io.BytesIO(content)
            for _ in range(5):
                _check_pickle(file)
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except ContentError:
        raise
    except pickle.UnpicklingError as error:
        raise ContentError("more than tensors and plain Python") from error
    # A damaged file can fail in any way.
    except Exception as error:
        raise ContentError(reason_of(error)) from error
    require_bounded(value)
    return value
