"""Makers of tiny data sets in the real file formats, for the tests of training."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

# Extracted folder and archive, by classes and version.
CIFAR_NAMES = {
    (10, "python"): ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    (10, "binary"): ("cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
    (100, "python"): ("cifar-100-python", "cifar-100-python.tar.gz"),
    (100, "binary"): ("cifar-100-binary", "cifar-100-binary.tar.gz"),
}


def cifar_arrays(classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images [n, 3072] uint8 and labels [n]; the label shows in the brightness."""
    random = np.random.default_rng(seed)
    labels = random.permutation(count) % classes
    images = random.integers(0, 56, (count, 3072)) + (labels * 199 // (classes - 1))[:, None]
    return images.astype(np.uint8), labels


def _old_string(value: bytes) -> bytes:
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<i", len(value)) + value


def _old_pickle(value: object) -> bytes:
    """Return the instructions by which Python 2 pickled a value with protocol 2."""
    if isinstance(value, bytes):
        return _old_string(value)
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_old_pickle, value)) + b"e"
    if isinstance(value, dict):
        pairs = (_old_pickle(key) + _old_pickle(item) for key, item in value.items())
        return b"}(" + b"".join(pairs) + b"u"
    if isinstance(value, np.ndarray):
        rows, columns = map(_old_pickle, value.shape)
        dtype = (
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        )
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        state = (
            b"(K\x01" + rows + columns + b"\x86" + dtype + b"\x89" + _old_string(value.tobytes())
        )
        return empty + state + b"tb"
    raise TypeError(type(value).__name__)


def old_pickle(value: object) -> bytes:
    """Return a value pickled as the official files are, by Python 2 and protocol 2."""
    return b"\x80\x02" + _old_pickle(value) + b"."


def cifar_files(
    classes: int, version: str, train: int = 40, test: int = 20, seed: int = 0
) -> dict[str, bytes]:
    """Return the data files of a download by name.

    Args:
        classes: 10 or 100.
        version: ``python`` or ``binary``.
        train: number of training images, a multiple of 5 for 10 classes.
        test: number of test images.
        seed: decides the images; the version does not.
    """
    images, labels = cifar_arrays(classes, train + test, seed)
    if classes == 10:
        names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
        stops = [train // 5 * number for number in range(6)] + [train + test]
    else:
        names, stops = ["train", "test"], [0, train, train + test]
    files = {}
    for name, start, stop in zip(names, stops, stops[1:], strict=False):
        part, own = images[start:stop], labels[start:stop]
        coarse = own // 5
        if version == "binary":
            columns = [own] if classes == 10 else [coarse, own]
            records = np.concatenate((np.stack(columns, 1).astype(np.uint8), part), 1)
            files[f"{name}.bin"] = records.tobytes()
            continue
        listed = [int(label) for label in own]
        if classes == 10:
            content = {b"batch_label": name.encode(), b"labels": listed}
        else:
            content = {b"fine_labels": listed, b"coarse_labels": [int(label) for label in coarse]}
        content |= {b"data": part, b"filenames": [b"%d.png" % number for number in range(len(own))]}
        files[name] = old_pickle(content)
    return files


def write_cifar_folder(
    folder: Path, classes: int, version: str, train: int = 40, test: int = 20, seed: int = 0
) -> Path:
    """Write an extracted download into a folder and return the folder made in it."""
    made = folder / CIFAR_NAMES[classes, version][0]
    made.mkdir(parents=True)
    for name, content in cifar_files(classes, version, train, test, seed).items():
        (made / name).write_bytes(content)
    return made


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    """Write files of the given names and contents into a tar archive."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_cifar_archive(
    folder: Path, classes: int, version: str, train: int = 40, test: int = 20, seed: int = 0
) -> Path:
    """Write a download's archive into a folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    inside, name = CIFAR_NAMES[classes, version]
    files = cifar_files(classes, version, train, test, seed)
    members = {f"{inside}/{name}": content for name, content in files.items()}
    return write_tar(folder / name, {f"{inside}/readme.html": b"<html>"} | members)


def image_bytes(label: int, number: int, size: tuple[int, int], form: str = "PNG") -> bytes:
    """Return an encoded image of (height, width) pixels; its label shows in its colours."""
    random = np.random.default_rng([label, number])
    pixels = random.integers(0, 64, (*size, 3)) + np.array([label * 61 % 192, 40, number % 128])
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def write_image_folder(
    folder: Path,
    classes: int = 3,
    train: int = 4,
    val: int = 2,
    size: tuple[int, int] = (20, 24),
) -> Path:
    """Write ``train/`` and ``val/`` with so many images per class, JPEG and PNG by turns."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            own = folder / split / f"class{label:03}"
            own.mkdir(parents=True)
            for number in range(count):
                form, suffix = (("PNG", "png"), ("JPEG", "JPEG"))[number % 2]
                first = 0 if split == "train" else train
                content = image_bytes(label, first + number, size, form)
                (own / f"{number:04}.{suffix}").write_bytes(content)
    return folder


def write_shards(
    folder: Path,
    classes: int = 3,
    train: tuple[int, ...] = (5, 4, 6, 3),
    val: tuple[int, ...] = (4, 3),
    size: tuple[int, int] = (20, 24),
) -> Path:
    """Write ``train/*.tar`` and ``val/*.tar`` with so many samples each, by WebDataset's writer."""
    number = 0
    for split, counts in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True)
        for shard, count in enumerate(counts):
            path = folder / split / f"{shard:06}.tar"
            with webdataset.TarWriter(str(path)) as writer:
                for _ in range(count):
                    label = number % classes
                    form, key = (("PNG", "png"), ("JPEG", "jpg"))[number % 2]
                    content = image_bytes(label, number, size, form)
                    writer.write({"__key__": f"{number:06}", key: content, "cls": label})
                    number += 1
    return folder
