"""CIFAR-10 and CIFAR-100 from their official archives or extracted folders, checked.

Archives are read in place, nothing is extracted. The python version is a pickle; what reads it
here knows plain containers and the three names that a stored array needs, and builds no object of
any other kind.
"""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcconv.operator.checks import value_error
from train.engine.files import (
    MIB,
    TAR_ERRORS,
    Bounded,
    IrregularFileError,
    member_content,
    most_unpacked,
    open_tar,
    read_file,
    reason_of,
)

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SIZE = 32
PIXELS = 3 * SIZE * SIZE
# Ten times the largest official file: a limit on what a damaged header can ask for.
MOST_BYTES = 2_000_000_000


class Cifar(NamedTuple):
    """Images [n, 3, 32, 32] uint8 and labels [n] int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    # The folder or archive that was read.
    source: Path


@dataclass(frozen=True)
class _Version:
    """One of the four official downloads.

    ``train`` and ``test`` map file names to MD5 checksums, None where only the size is known.
    ``records`` is the number of images in an official file.
    """

    archive: str
    md5: str
    folder: str
    train: dict[str, str | None]
    test: dict[str, str | None]
    # Python version: the key of the labels. Binary version: the label bytes before each image, of
    # which the last one counts.
    labels: str | int
    records: dict[str, int]

    @property
    def files(self) -> dict[str, str | None]:
        return self.train | self.test


_VERSIONS: dict[int, tuple[_Version, ...]] = {
    10: (
        _Version(
            archive="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            test={"test_batch": "40351d587109b95175f43aff81a1287e"},
            labels="labels",
            records={},
        ),
        _Version(
            archive="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train={f"data_batch_{number}.bin": None for number in range(1, 6)},
            test={"test_batch.bin": None},
            labels=1,
            records={f"data_batch_{number}.bin": 10_000 for number in range(1, 6)}
            | {"test_batch.bin": 10_000},
        ),
    ),
    100: (
        _Version(
            archive="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train={"train": "16019d7e3df5f24257cddd939b257f8d"},
            test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            labels="fine_labels",
            records={},
        ),
        _Version(
            archive="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train={"train.bin": None},
            test={"test.bin": None},
            labels=2,
            records={"train.bin": 50_000, "test.bin": 10_000},
        ),
    ),
}


def load_cifar(data: str | Path, classes: int, *, verify: bool = True) -> Cifar:
    """Read CIFAR-10 or CIFAR-100 from a folder.

    The folder holds an extracted download or its archive, or is the extracted download itself.
    Where there are several, a folder comes before an archive, and python before binary.

    Args:
        data: the folder.
        classes: 10 or 100; the labels of CIFAR-100 are the fine ones.
        verify: require the official files, by MD5 checksums, and by sizes for extracted binary
            files. Otherwise other images in the same format will do, any number of them.

    Raises:
        ValueError: nothing is there, or a file is not what it must be; the message names it.
    """
    if classes not in _VERSIONS:
        raise value_error("classes", "be 10 or 100", classes)
    folder = Path(data)
    for version in _VERSIONS[classes]:
        for extracted in (folder / version.folder, folder):
            if extracted.name == version.folder and extracted.is_dir():
                return _assemble(version, classes, _folder_files(version, extracted, verify))
    for version in _VERSIONS[classes]:
        archive = folder / version.archive
        if archive.is_file():
            return _assemble(version, classes, _archive_files(version, archive, verify))
    names = " or ".join(version.archive for version in _VERSIONS[classes])
    rule = f"hold {names} from {PAGE}, or the folder extracted from it; nothing is downloaded"
    raise value_error("data", rule, f"'{data}' ({_what_is(folder)})")


def _what_is(folder: Path) -> str:
    if not folder.exists():
        return "which does not exist"
    return "a folder without them" if folder.is_dir() else "which is no folder"


class _Files(NamedTuple):
    source: Path
    # Yields each file's name for messages and its content, by file name.
    read: Callable[[], Iterator[tuple[str, str, bytes]]]
    exact: bool


def _assemble(version: _Version, classes: int, files: _Files) -> Cifar:
    parsed: dict[str, tuple[Tensor, Tensor]] = {}
    for name, title, content in files.read():
        if isinstance(version.labels, int):
            records = version.records[name] if files.exact else None
            parsed[name] = _parse_binary(title, content, version.labels, classes, records)
        else:
            parsed[name] = _parse_python(title, content, version.labels, classes)
    missing = [name for name in version.files if name not in parsed]
    if missing:
        raise _missing(version, files.source, missing)

    def join(names: dict[str, str | None]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(parsed.pop(name) for name in names), strict=True)
        return torch.cat(images), torch.cat(labels)

    return Cifar(*join(version.train), *join(version.test), classes, files.source)


def _missing(version: _Version, source: Path, missing: list[str]) -> ValueError:
    wanted = ", ".join(version.files)
    return value_error(f"data '{source}'", f"hold {wanted}", f"none named {', '.join(missing)}")


def _md5(title: str, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise value_error(
            f"data file '{title}'",
            f"be the official one with MD5 checksum {expected} (verification can be switched off)",
            found,
        )


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MOST_BYTES)
    except IrregularFileError as error:
        rule = f"be a regular file of at most {MOST_BYTES} bytes"
        raise value_error(f"data file '{path}'", rule, error.strerror) from error
    except OSError as error:
        raise value_error(f"data file '{path}'", "be readable", error.strerror) from error


def _folder_files(version: _Version, folder: Path, verify: bool) -> _Files:
    def read() -> Iterator[tuple[str, str, bytes]]:
        missing = [name for name in version.files if not (folder / name).exists()]
        if missing:
            raise _missing(version, folder, missing)
        for name, md5 in version.files.items():
            path = folder / name
            content = _read(path)
            if verify and md5 is not None:
                _md5(str(path), content, md5)
            yield name, str(path), content

    return _Files(folder, read, exact=verify)


def _archive_files(version: _Version, archive: Path, verify: bool) -> _Files:
    def read() -> Iterator[tuple[str, str, bytes]]:
        content = _read(archive)
        if verify:
            _md5(str(archive), content, version.md5)
        try:
            yield from unpack(content)
        except TAR_ERRORS as error:
            if str(error).startswith("dcconv: "):
                raise
            rule = "be a whole gzip-compressed tar archive"
            raise value_error(f"data file '{archive}'", rule, reason_of(error)) from error

    def unpack(content: bytes) -> Iterator[tuple[str, str, bytes]]:
        seen = set()
        most = min(most_unpacked(len(content)), MOST_BYTES)
        with gzip.open(BytesIO(content)) as unpacked:
            stream = Bounded(unpacked, most)
            # One file after the other: what is not wanted is passed over in small pieces.
            with open_tar(stream, stream=True) as tar:
                for member in tar:
                    name = _member_name(archive, version, member)
                    if name is None:
                        continue
                    if name in seen:
                        rule = "hold every file once"
                        raise value_error(f"data file '{archive}'", rule, f"{member.name} twice")
                    seen.add(name)
                    yield name, f"{archive}/{member.name}", member_content(tar, member, most)
            # To its end, where the checksum is that tells a damaged archive.
            while stream.read(MIB):
                pass

    return _Files(archive, read, exact=verify)


def _member_name(archive: Path, version: _Version, member: tarfile.TarInfo) -> str | None:
    """Return the wanted file that a member is, None if it is another one."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        rule = "hold no path that leads out of the archive"
        raise value_error(f"data file '{archive}'", rule, repr(member.name))
    if path.parts[:-1] != (version.folder,) or path.name not in version.files:
        return None
    if not member.isreg() or member.size > MOST_BYTES:
        rule = f"hold {member.name} as a regular file of at most {MOST_BYTES} bytes"
        got = f"type {member.type!r} of {member.size} bytes"
        raise value_error(f"data file '{archive}'", rule, got)
    return path.name


def _check_labels(title: str, labels: np.ndarray[Any, Any], classes: int) -> Tensor:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        rule = f"have labels from 0 to {classes - 1}"
        raise value_error(f"data file '{title}'", rule, int(wrong[0]))
    return torch.from_numpy(labels.astype(np.int64))


def _parse_binary(
    title: str, content: bytes, label_bytes: int, classes: int, records: int | None
) -> tuple[Tensor, Tensor]:
    record = label_bytes + PIXELS
    if records is not None and len(content) != records * record:
        rule = f"have {records} records of {record} bytes, {records * record} bytes"
        raise value_error(f"data file '{title}'", rule, f"{len(content)} bytes")
    if len(content) == 0 or len(content) % record:
        rule = f"have one or more whole records of {record} bytes"
        raise value_error(f"data file '{title}'", rule, f"{len(content)} bytes")
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = _check_labels(title, table[:, label_bytes - 1], classes)
    images = torch.from_numpy(table[:, label_bytes:].reshape(-1, 3, SIZE, SIZE).copy())
    return images, labels


class _StoredDtype:
    """Stands for ``numpy.dtype``: remembers its code."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = _text(code)

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like, which single bytes do not have."""


class _StoredArray:
    """Stands for ``numpy.ndarray`` and for what rebuilds one: keeps its shape and its bytes."""

    def __init__(self, *_: Any) -> None:
        self.shape: Any = None
        self.code: Any = None
        self.columns_first = False
        self.content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, self.columns_first, self.content = state
        self.code = dtype.code

    def table(self) -> np.ndarray[Any, Any] | None:
        """Return the array if it is what an image file holds, [n, 3072] bytes."""
        shape = self.shape
        if (
            not isinstance(shape, tuple)
            or len(shape) != 2
            or not isinstance(shape[0], int)
            or shape[0] < 1
            or shape[1] != PIXELS
            or self.code not in ("u1", "|u1")
            or not isinstance(self.content, bytes)
            or len(self.content) != shape[0] * PIXELS
        ):
            return None
        order: Any = "F" if self.columns_first else "C"
        return np.frombuffer(self.content, np.uint8).reshape(shape, order=order)


class _StoredBytes:
    """Stands for ``_codecs.encode``, by which Python 3 writes bytes in the old protocol."""

    def __new__(cls, text: str, encoding: Any = "latin1") -> Any:
        if _text(encoding) != "latin1":
            raise pickle.UnpicklingError(f"encoding {encoding!r}")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        """Never called: no object of this class exists."""


# Every class has a __setstate__, so that no instruction can change these classes themselves.
_ADMITTED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _StoredArray,
    ("numpy._core.multiarray", "_reconstruct"): _StoredArray,
    ("numpy", "ndarray"): _StoredArray,
    ("numpy", "dtype"): _StoredDtype,
    ("_codecs", "encode"): _StoredBytes,
}


class _RefusedError(Exception):
    """A pickle asks for a name that no image file needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[module, name]


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _parse_python(title: str, content: bytes, key: str, classes: int) -> tuple[Tensor, Tensor]:
    subject = f"data file '{title}'"
    try:
        loaded = _Unpickler(BytesIO(content), encoding="bytes").load()
    except _RefusedError as error:
        rule = "be a pickle of arrays and plain containers alone"
        raise value_error(subject, rule, f"one that asks for {error}") from None
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise value_error(subject, "be a whole pickle", reason_of(error)) from error
    if not isinstance(loaded, dict):
        raise value_error(subject, "be a pickled dictionary", type(loaded).__name__)
    entries = {_text(name): value for name, value in loaded.items()}
    array, labels = entries.get("data"), entries.get(key)
    table = array.table() if isinstance(array, _StoredArray) else None
    if table is None:
        rule = f"have 'data' of shape [n, {PIXELS}] and dtype uint8"
        shape = array.shape if isinstance(array, _StoredArray) else type(array).__name__
        raise value_error(subject, rule, shape)
    rule = f"have {len(table)} whole numbers as '{key}'"
    if not isinstance(labels, list):
        raise value_error(subject, rule, type(labels).__name__)
    wrong = [type(label).__name__ for label in labels if type(label) is not int]
    if wrong or len(labels) != len(table):
        raise value_error(subject, rule, wrong[0] if wrong else f"{len(labels)} of them")
    checked = _check_labels(title, np.array(labels, dtype=object), classes)
    return torch.from_numpy(table.reshape(-1, 3, SIZE, SIZE).copy()), checked
