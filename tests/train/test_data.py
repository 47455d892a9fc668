"""Training data: file formats, damaged files, augmentation, and streams that resume exactly."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import (
    CIFAR_NAMES,
    cifar_arrays,
    cifar_files,
    image_bytes,
    old_pickle,
    write_cifar_archive,
    write_cifar_folder,
    write_image_folder,
    write_shards,
    write_tar,
)

from train.data import cifar, shards
from train.data.augment import (
    Augment,
    OfficialTransform,
    modern_transform,
    resize_corner,
)
from train.data.cifar import load_cifar
from train.data.images import ImageBatches, ImageStream, find_splits
from train.data.shards import (
    ShardBatches,
    ShardStream,
    count_samples,
    find_shards,
    shuffle_buffer,
    write_sizes,
)
from train.data.stream import TensorBatches, TensorStream

VERSIONS = list(CIFAR_NAMES)


def as_cifar(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels)


def replace_file(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


# CIFAR


@pytest.mark.parametrize(("classes", "version"), VERSIONS)
@pytest.mark.parametrize("write", [write_cifar_folder, write_cifar_archive])
def test_cifar_reads_every_official_form(tmp_path, classes, version, write):
    source = write(tmp_path, classes, version)
    data = load_cifar(tmp_path, classes, verify=False)
    images, labels = as_cifar(*cifar_arrays(classes, 60, 0))
    assert torch.equal(data.train_images, images[:40]) and data.train_images.dtype == torch.uint8
    assert torch.equal(data.train_labels, labels[:40]) and data.train_labels.dtype == torch.int64
    assert torch.equal(data.test_images, images[40:])
    assert torch.equal(data.test_labels, labels[40:])
    assert (data.classes, data.source) == (classes, source)


def test_cifar_takes_the_extracted_folder_itself(tmp_path):
    folder = write_cifar_folder(tmp_path, 100, "binary")
    assert load_cifar(folder, 100, verify=False).source == folder


def test_cifar_prefers_a_folder_and_the_python_version(tmp_path):
    write_cifar_archive(tmp_path, 10, "python")
    binary = write_cifar_folder(tmp_path, 10, "binary")
    assert load_cifar(tmp_path, 10, verify=False).source == binary
    python = write_cifar_folder(tmp_path, 10, "python")
    assert load_cifar(tmp_path, 10, verify=False).source == python


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_reads_pickles_of_python_3_and_either_order(tmp_path, protocol, order):
    folder = write_cifar_folder(tmp_path, 100, "python")
    images, labels = cifar_arrays(100, 8, 3)
    content = {"data": np.array(images, order=order), "fine_labels": [int(one) for one in labels]}
    (folder / "train").write_bytes(pickle.dumps(content, protocol=protocol))
    data = load_cifar(tmp_path, 100, verify=False)
    images, labels = as_cifar(images, labels)
    assert torch.equal(data.train_images, images) and torch.equal(data.train_labels, labels)


def test_cifar_verifies_by_default(tmp_path, monkeypatch):
    for classes, version in VERSIONS:
        write_cifar_folder(tmp_path / "folder", classes, version)
        write_cifar_archive(tmp_path / "archive", classes, version)
        with pytest.raises(ValueError, match="must be the official one with MD5 checksum"):
            load_cifar(tmp_path / "archive", classes)
        problem = "MD5 checksum" if version == "python" else r"must have \d+ records of 307\d bytes"
        with pytest.raises(ValueError, match=problem):
            load_cifar(tmp_path / "folder", classes)
        # The same files pass where the table names their checksums and sizes.
        table = {record.folder: record for record in cifar._VERSIONS[classes]}
        record = table[CIFAR_NAMES[classes, version][0]]
        content = cifar_files(classes, version)
        sums = {name: hashlib.md5(one).hexdigest() for name, one in content.items()}
        python = version == "python"
        known = dataclasses.replace(
            record,
            md5=hashlib.md5((tmp_path / "archive" / record.archive).read_bytes()).hexdigest(),
            train={name: sums[name] if python else None for name in record.train},
            test={name: sums[name] if python else None for name in record.test},
            records={name: len(content[name]) // (record.labels + 3072) for name in record.records},
        )
        monkeypatch.setitem(cifar._VERSIONS, classes, (known,))
        assert len(load_cifar(tmp_path / "archive", classes).train_images) == 40
        assert len(load_cifar(tmp_path / "folder", classes).test_images) == 20
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "folder")
        shutil.rmtree(tmp_path / "archive")


def test_cifar_table_has_the_official_numbers():
    sizes = {}
    for versions in cifar._VERSIONS.values():
        for version in versions:
            assert len(version.md5) == 32
            for name, records in version.records.items():
                sizes[version.folder, name] = records * (version.labels + 3072)
    assert sizes["cifar-10-batches-bin", "test_batch.bin"] == 30_730_000
    assert sizes["cifar-100-binary", "train.bin"] == 153_700_000
    assert sizes["cifar-100-binary", "test.bin"] == 30_740_000


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_cifar_missing_says_which_file_to_put_there(tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nothing is downloaded") as raised:
        load_cifar(tmp_path / place, 100)
    text = str(raised.value)
    assert text.startswith("dcconv: data must hold cifar-100-python.tar.gz or cifar-100-binary")
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in text and str(tmp_path / place) in text
    assert len(text.splitlines()) == 1


def test_cifar_other_class_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="classes must be 10 or 100, got 20"):
        load_cifar(tmp_path, 20)


def test_cifar_names_the_files_that_lack(tmp_path):
    (write_cifar_folder(tmp_path, 10, "binary") / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"must hold .*, got none named data_batch_3.bin"):
        load_cifar(tmp_path, 10, verify=False)
    folder, name = CIFAR_NAMES[100, "binary"]
    write_tar(tmp_path / name, {f"{folder}/train.bin": cifar_files(100, "binary")["train.bin"]})
    with pytest.raises(ValueError, match=rf"{name}' must hold .*, got none named test.bin"):
        load_cifar(tmp_path, 100, verify=False)


class Malicious:
    def __init__(self, function, *arguments):
        self.recipe = (function, arguments)

    def __reduce__(self):
        return self.recipe


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "eval"), (np.load, "numpy.load"), (getattr, "getattr")],
)
def test_malicious_pickle_is_refused_and_does_nothing(tmp_path, function, name, protocol):
    folder = write_cifar_folder(tmp_path, 100, "python")
    mark = tmp_path / "mark"
    argument = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    content = pickle.dumps({b"data": Malicious(function, argument)}, protocol=protocol)
    (folder / "test").write_bytes(content)
    with pytest.raises(ValueError, match="pickle of arrays and plain containers alone") as raised:
        load_cifar(tmp_path, 100, verify=False)
    assert "data file '" in str(raised.value) and f"{folder / 'test'}'" in str(raised.value)
    assert str(raised.value).endswith(name) and len(str(raised.value).splitlines()) == 1
    assert not mark.exists()
    # The same bytes do act when an unguarded reader loads them.
    if function is os.system:
        pickle.loads(content)  # noqa: S301
        assert mark.exists()


@pytest.mark.parametrize("name", [b"numpy\nndarray", b"numpy\ndtype", b"_codecs\nencode"])
def test_pickle_cannot_change_the_reader(tmp_path, name):
    folder = write_cifar_folder(tmp_path, 100, "python")
    # Push the name itself and set attributes on it.
    (folder / "train").write_bytes(b"\x80\x02c" + name + b"\n}U\x05tableK\x01sb.")
    before = [dict(vars(kind)) for kind in cifar._ADMITTED.values()]
    with pytest.raises(ValueError, match="must be a whole pickle"):
        load_cifar(tmp_path, 100, verify=False)
    assert [dict(vars(kind)) for kind in cifar._ADMITTED.values()] == before


ABSENT = object()


def entry(**changes) -> bytes:
    images, labels = cifar_arrays(100, 4, 0)
    content = {b"data": images, b"fine_labels": [int(label) for label in labels]}
    content |= {key.encode(): value for key, value in changes.items()}
    return old_pickle({key: value for key, value in content.items() if value is not ABSENT})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "must be a whole pickle"),
        (lambda: b"not a pickle", "must be a whole pickle"),
        (lambda: entry()[:-200], "must be a whole pickle"),
        (lambda: entry()[:20], "must be a whole pickle"),
        (lambda: old_pickle([1, 2]), "must be a pickled dictionary, got list"),
        (lambda: entry(data=ABSENT), r"'data' of shape \[n, 3072\] and dtype uint8, got None"),
        (lambda: entry(data=np.zeros((4, 9), np.uint8)), r"got \(4, 9\)"),
        (lambda: entry(data=[1]), "got list"),
        (lambda: entry().replace(b"U\x02u1", b"U\x02f8"), r"dtype uint8, got \(4, 3072\)"),
        (lambda: entry(fine_labels=ABSENT), "4 whole numbers as 'fine_labels', got NoneType"),
        (lambda: entry(fine_labels=[1, 2, 3]), "4 whole numbers as 'fine_labels', got 3 of them"),
        (lambda: entry(fine_labels=[1, 2, 3, b"4"]), "whole numbers as 'fine_labels', got bytes"),
        (lambda: entry(fine_labels=[1, 2, 3, 100]), "have labels from 0 to 99, got 100"),
        (lambda: entry(fine_labels=[1, -2, 3, 9]), "have labels from 0 to 99, got -2"),
    ],
)
def test_damaged_pickle_ends_in_one_sentence_with_its_name(tmp_path, content, message):
    folder = write_cifar_folder(tmp_path, 100, "python")
    (folder / "train").write_bytes(content())
    with pytest.raises(ValueError, match=message) as raised:
        load_cifar(tmp_path, 100, verify=False)
    assert str(raised.value).startswith(f"dcconv: data file '{folder / 'train'}' must ")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "one or more whole records of 3074 bytes, got 122959 bytes"),
        (lambda content: b"", "one or more whole records of 3074 bytes, got 0 bytes"),
        (lambda content: b"\x00\x64" + content[2:], "have labels from 0 to 99, got 100"),
    ],
)
def test_damaged_binary_ends_in_one_sentence_with_its_name(tmp_path, change, message):
    folder = write_cifar_folder(tmp_path, 100, "binary")
    replace_file(folder / "train.bin", change)
    with pytest.raises(ValueError, match=message) as raised:
        load_cifar(tmp_path, 100, verify=False)
    assert str(raised.value).startswith(f"dcconv: data file '{folder / 'train.bin'}' must ")


def flip_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-4],
        lambda content: content[:1],
        lambda content: b"",
        lambda content: b"no archive at all",
        flip_middle,
        lambda content: gzip.compress(gzip.decompress(content)[:70_000]),
        lambda content: gzip.compress(b"no tar archive" * 100),
    ],
)
def test_damaged_archive_ends_in_one_sentence_with_its_name(tmp_path, change):
    archive = write_cifar_archive(tmp_path, 10, "binary")
    replace_file(archive, change)
    with pytest.raises(ValueError, match="whole gzip-compressed tar archive") as raised:
        load_cifar(tmp_path, 10, verify=False)
    assert str(raised.value).startswith(f"dcconv: data file '{archive}' must ")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "cifar-100-binary/../../evil"])
def test_archive_with_a_path_that_leads_out_is_refused(tmp_path, name):
    _, archive = CIFAR_NAMES[100, "binary"]
    write_tar(tmp_path / archive, {name: b"x"})
    with pytest.raises(ValueError, match="no path that leads out of the archive"):
        load_cifar(tmp_path, 100, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == [archive]


def test_archive_with_a_link_or_a_file_twice_is_refused(tmp_path):
    folder, name = CIFAR_NAMES[100, "binary"]
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        link = tarfile.TarInfo(f"{folder}/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"hold cifar-100-binary/train.bin as a regular file"):
        load_cifar(tmp_path, 100, verify=False)
    content = cifar_files(100, "binary")["train.bin"]
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        for _ in range(2):
            member = tarfile.TarInfo(f"{folder}/train.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="must hold every file once"):
        load_cifar(tmp_path, 100, verify=False)


def test_folder_in_the_place_of_a_file_is_refused(tmp_path):
    folder = write_cifar_folder(tmp_path, 100, "binary")
    (folder / "train.bin").unlink()
    (folder / "train.bin").mkdir()
    with pytest.raises(ValueError, match=r"train.bin' must be a regular file of at most"):
        load_cifar(tmp_path, 100, verify=False)


# Augmentation

NUMPY_MODES = {"symmetric": "symmetric", "reflect": "reflect", "zeros": "constant"}


def augment_one(image: np.ndarray, augment: Augment, draw: list[int]) -> np.ndarray:
    """Augment one image [c, h, w] step by step."""
    _, h, w = image.shape
    top, left, flip, row, column = draw
    edges = ((0, 0), (augment.padding,) * 2, (augment.padding,) * 2)
    padded = np.pad(image, edges, mode=NUMPY_MODES[augment.mode])
    cropped = padded[:, top : top + h, left : left + w].astype(np.float32)
    if flip and augment.flip:
        cropped = cropped[:, :, ::-1]
    mean, std = (np.array(one, np.float32).reshape(-1, 1, 1) for one in (augment.mean, augment.std))
    output = (cropped - mean) / std
    if augment.cutout:
        first_row = row * h // 2**31 - augment.cutout // 2
        first_column = column * w // 2**31 - augment.cutout // 2
        for i in range(max(first_row, 0), min(first_row + augment.cutout, h)):
            for j in range(max(first_column, 0), min(first_column + augment.cutout, w)):
                output[:, i, j] = 0.0
    return output


@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(padding=3, mode="reflect", mean=(120.0, 110.0, 100.0), std=(60.0, 61.0, 62.0)),
        Augment(padding=2, mode="zeros", flip=False, cutout=3),
        Augment(padding=0, cutout=4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augment_equals_the_steps_one_by_one(augment, dtype):
    images = torch.randint(256, (40, 3, 9, 7)).to(dtype)
    draws = augment.draw(40, torch.Generator().manual_seed(5))
    output = augment(images, torch.Generator().manual_seed(5))
    expected = [
        augment_one(image, augment, draw)
        for image, draw in zip(images.numpy(), draws.tolist(), strict=True)
    ]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, torch.from_numpy(np.stack(expected)))


def test_official_augment_is_that_of_the_specification():
    augment = Augment()
    images = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    normal = augment.normalise(images).flatten().tolist()
    assert normal == [-127.5 / 128, -0.5 / 128, 0.5 / 128, 127.5 / 128]
    draws = augment.draw(4000, torch.Generator().manual_seed(0))
    assert sorted(set(draws[:, 0].tolist())) == sorted(set(draws[:, 1].tolist())) == list(range(9))
    assert 0.45 < float(draws[:, 2].double().mean()) < 0.55
    # Top, left and flip are drawn apart: all 9 * 9 * 2 combinations turn up.
    assert len({tuple(draw) for draw in draws[:, :3].tolist()}) == 162


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding": -1}, ValueError, "padding must be an integer of at least 0, got -1"),
        ({"mode": "edge"}, ValueError, "mode must be one of symmetric, reflect, zeros, got 'edge'"),
        ({"std": (0.0,)}, ValueError, "std must be a finite number above 0, got 0.0"),
        ({"cutout": 1.5}, TypeError, "cutout must be an integer"),
    ],
)
def test_augment_refuses_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Augment(**arguments)


def resize_one(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w = plane.shape
    output = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * h / height, j * w / width
            up, left = int(y), int(x)
            down, right = min(up + 1, h - 1), min(left + 1, w - 1)
            top = plane[up, left] + (plane[up, right] - plane[up, left]) * (x - left)
            bottom = plane[down, left] + (plane[down, right] - plane[down, left]) * (x - left)
            output[i, j] = top + (bottom - top) * (y - up)
    return output


@pytest.mark.parametrize("size", [(5, 9), (8, 3), (12, 20)])
def test_resize_corner_equals_loops(size):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    expected = np.stack([resize_one(plane.astype(float), 8, 10) for plane in image.numpy()])
    expected = torch.from_numpy(expected).float()
    torch.testing.assert_close(resize_corner(image, 8, 10), expected)


def test_official_transform_crops_the_resized_image():
    image = torch.randint(256, (3, 11, 17), dtype=torch.uint8)
    mean = torch.tensor([121.6, 116.6, 102.7]).reshape(3, 1, 1)
    whole = resize_corner(image, 16, 16) - mean
    centre = OfficialTransform(train=False, size=14, resize=16)(image)
    assert torch.equal(centre, whole[:, 1:15, 1:15])
    crops = [whole[:, i : i + 14, j : j + 14] for i in range(3) for j in range(3)]
    crops += [crop.flip(2) for crop in crops]
    transform = OfficialTransform(train=True, size=14, resize=16)
    found = Counter()
    for _ in range(300):
        output = transform(image)
        matches = [number for number, crop in enumerate(crops) if torch.equal(output, crop)]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) == 18


def test_modern_transform_gives_normalised_squares():
    image = torch.randint(256, (3, 40, 30), dtype=torch.uint8)
    train = modern_transform(True, size=16, resize=18, trivial=True, erase=1.0)
    assert train(image).shape == (3, 16, 16) and train(image).dtype == torch.float32
    torch.manual_seed(1)
    first = train(image)
    torch.manual_seed(1)
    assert torch.equal(train(image), first) and not torch.equal(train(image), first)
    white = modern_transform(False, size=16, resize=18)(torch.full((3, 40, 30), 255).byte())
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white, expected[:, None, None].expand(3, 16, 16))
    with pytest.raises(ValueError, match="erase must be from 0 to 1, got 2"):
        modern_transform(True, erase=2)
    with pytest.raises(ValueError, match="resize must be an integer of at least 224, got 100"):
        modern_transform(True, resize=100)


# Streams of tensors


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that are distinct, labelled by their number."""
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8)
    return images, torch.arange(count)


def tensor_stream(count: int = 23, batch_size: int = 6, **options) -> TensorStream:
    torch.manual_seed(0)
    return TensorStream(
        *numbered(count),
        **{"batch_size": batch_size, "seed": 3, "augment": Augment(padding=2)} | options,
    )


def same(batches, others) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(one, other)
        for pair in zip(batches, others, strict=True)
        for one, other in zip(*pair, strict=True)
    )


def test_wrapped_epochs_contain_every_image_once():
    stream = tensor_stream()
    labels = torch.cat([stream.next()[1] for _ in range(23)]).reshape(6, 23)
    assert all(sorted(epoch.tolist()) == list(range(23)) for epoch in labels)
    assert not torch.equal(labels[0], labels[1])
    assert stream.images_per_epoch == 23 and labels.dtype == torch.int64


def test_unwrapped_epochs_drop_what_fills_no_batch():
    stream = tensor_stream(wrap=False)
    for _ in range(3):
        epoch = torch.cat([stream.next()[1] for _ in range(3)]).tolist()
        assert len(set(epoch)) == 18
    whole = tensor_stream(count=12, wrap=False)
    for _ in range(3):
        assert sorted(torch.cat([whole.next()[1] for _ in range(2)]).tolist()) == list(range(12))


def test_batch_may_be_larger_than_an_epoch():
    labels = tensor_stream(count=5, batch_size=12).next()[1]
    assert sorted(labels[:5].tolist()) == sorted(labels[5:10].tolist()) == list(range(5))


@pytest.mark.parametrize("wrap", [True, False])
def test_ranks_share_the_batches_of_one(wrap):
    one = tensor_stream(wrap=wrap)
    ranks = [tensor_stream(batch_size=2, rank=rank, world_size=3, wrap=wrap) for rank in range(3)]
    for _ in range(10):
        parts = [rank.next() for rank in ranks]
        together = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        assert same([together], [one.next()])


@pytest.mark.parametrize("wrap", [True, False])
def test_stream_resumes_bit_for_bit_from_every_step(wrap):
    stream, states, batches = tensor_stream(wrap=wrap), [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(stream.next())
    for step, state in enumerate(states):
        resumed = tensor_stream(wrap=wrap)
        # Also over what it did before.
        resumed.next()
        resumed.load_state_dict(state)
        assert same([resumed.next() for _ in range(12 - step)], batches[step:])


def test_stream_resumes_with_another_number_of_ranks():
    one = tensor_stream()
    for _ in range(5):
        one.next()
    ranks = [tensor_stream(batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    parts = []
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
        parts.append(rank.next())
    assert same([tuple(torch.cat(part) for part in zip(*parts, strict=True))], [one.next()])


def test_stream_leaves_the_global_generator_alone_and_depends_on_its_seed():
    stream, other = tensor_stream(), tensor_stream(seed=4)
    before = torch.get_rng_state()
    batch = stream.next()
    assert torch.equal(torch.get_rng_state(), before)
    assert not same([batch], [other.next()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "saved stream's seed must be 3 to resume this stream, got 4"),
        ({"images": 7}, "saved stream's images must be 23 to resume this stream, got 7"),
        ({"kind": "shards"}, "saved stream's kind must be 'tensor'"),
        ({"position": 23}, "position must be below the number of images, 23, got 23"),
        ({"epoch": -1}, "saved stream's epoch must be an integer of at least 0, got -1"),
    ],
)
def test_state_of_another_stream_is_refused(change, message):
    stream = tensor_stream()
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(stream.state_dict() | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"rank": 1}, "rank must be below world_size = 1, got 1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        (
            {"batch_size": 24, "wrap": False},
            "batch_size must be at most the number of training images per rank, 23, got 24",
        ),
        ({"count": 0}, "labels must have one entry for each of at least one image, 0, got 0"),
    ],
)
def test_stream_refuses_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        tensor_stream(**options)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_shows_each_image_to_one_rank(world_size):
    images, labels = numbered(23)
    augment = Augment()
    seen = []
    for rank in range(world_size):
        batches = TensorBatches(
            images, labels, batch_size=4, augment=augment, rank=rank, world_size=world_size
        )
        first = list(batches)
        assert same(first, list(batches)) and len(first) == len(batches)
        for shown, own in first:
            assert torch.equal(shown, augment.normalise(images[own]))
            seen += own.tolist()
    assert sorted(seen) == list(range(23))


# Folders of images


def plain(image: torch.Tensor) -> torch.Tensor:
    return image.float()


def noisy(image: torch.Tensor) -> torch.Tensor:
    return image.float() + torch.rand(3, 1, 1)


def names(batches) -> Counter:
    """Count the images of batches; the makers give every image its own pixels."""
    return Counter(image.numpy().tobytes() for images, _ in batches for image in images)


def together(parts) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return write_image_folder(tmp_path / "images", classes=3, train=5, val=3)


def image_stream(folder: Path, transform=noisy, **options) -> ImageStream:
    train, _ = find_splits(folder)
    return ImageStream(train, transform, **{"batch_size": 4, "seed": 1} | options)


def test_image_epochs_contain_every_file_once(image_folder):
    stream = image_stream(image_folder, plain, batch_size=5)
    epochs = [[stream.next() for _ in range(3)] for _ in range(2)]
    assert stream.images_per_epoch == 15 and len(names(epochs[0])) == 15
    assert names(epochs[0]) == names(epochs[1])
    assert not same(epochs[0], epochs[1])
    # Red grows with the label by more than the noise.
    for images, labels in epochs[0]:
        assert torch.equal((images[:, 0].mean(dim=(1, 2)) / 61 - 0.5).round().long(), labels)


@pytest.mark.parametrize("workers", [1, 2])
def test_image_batches_do_not_depend_on_workers(image_folder, workers):
    alone, helped = image_stream(image_folder), image_stream(image_folder, workers=workers)
    before = torch.get_rng_state()
    assert same([alone.next() for _ in range(8)], [helped.next() for _ in range(8)])
    assert torch.equal(torch.get_rng_state(), before)
    helped.close()


def test_image_ranks_share_the_batches_of_one(image_folder):
    one = image_stream(image_folder)
    ranks = [image_stream(image_folder, batch_size=2, rank=r, world_size=2) for r in range(2)]
    for _ in range(6):
        assert same([together([rank.next() for rank in ranks])], [one.next()])


@pytest.mark.parametrize(("workers", "wrap"), [(0, True), (0, False), (2, True)])
def test_image_stream_resumes_bit_for_bit(image_folder, workers, wrap):
    stream, states, batches = image_stream(image_folder, workers=workers, wrap=wrap), [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(stream.next())
    for step in (0, 3, 4, 8):
        # Workers had prepared more than was taken.
        stream.load_state_dict(states[step])
        assert same([stream.next() for _ in range(9 - step)], batches[step:])
    stream.close()


def test_augmentation_changes_from_epoch_to_epoch(image_folder):
    stream = image_stream(image_folder, batch_size=15)
    assert not names([stream.next()]) & names([stream.next()])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_image_evaluation_shows_each_file_to_one_rank(image_folder, world_size, workers):
    _, val = find_splits(image_folder)
    seen = []
    for rank in range(world_size):
        batches = ImageBatches(
            val, plain, batch_size=2, rank=rank, world_size=world_size, workers=workers
        )
        shown = list(batches)
        assert len(shown) == len(batches)
        seen += shown
    assert sorted(names(seen).values()) == [1] * 9


def damage(file: Path, kind: str) -> None:
    changes = {
        "cut": lambda content: content[: len(content) // 2],
        "empty": lambda content: b"",
        "text": lambda content: b"no image",
        "gif": lambda content: image_bytes(0, 0, (4, 4), "GIF"),
    }
    replace_file(file, changes[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "text", "gif"])
@pytest.mark.parametrize("name", ["0002.png", "0003.JPEG"])
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_stops_with_its_name(image_folder, kind, name, workers):
    file = image_folder / "train/class001" / name
    damage(file, kind)
    stream = image_stream(image_folder, batch_size=15, workers=workers)
    with pytest.raises(ValueError, match="be a whole JPEG or PNG file, got ") as raised:
        stream.next()
    assert str(raised.value).startswith(f"dcconv: image '{file}' must be a whole")
    assert len(str(raised.value).splitlines()) == 1
    stream.close()


def interrupting(image: torch.Tensor) -> torch.Tensor:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return image.float()


def test_signals_of_others_do_not_end_workers(image_folder):
    stream = image_stream(image_folder, interrupting, batch_size=15, workers=1)
    assert len(stream.next()[1]) == 15
    # But they end when the process says so that they work for.
    (worker,) = stream._batches._workers
    deadline = time.monotonic() + 60
    while worker.is_alive() and time.monotonic() < deadline:
        # Again, as two signals at once are one.
        worker.terminate()
        worker.join(timeout=0.1)
    assert worker.exitcode == 0
    stream.close()


def test_vanished_image_stops_with_its_name(image_folder):
    stream = image_stream(image_folder, batch_size=15)
    file = image_folder / "train/class001/0002.png"
    file.unlink()
    with pytest.raises(ValueError, match=f"image '{file}' must be a readable file, got No such"):
        stream.next()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_image_is_counted_logged_and_replaced(image_folder, caplog, workers):
    files = [image_folder / "train/class001" / name for name in ("0002.png", "0003.JPEG")]
    for file in files:
        damage(file, "cut")
    stream = image_stream(image_folder, plain, batch_size=15, workers=workers, skip_corrupt=True)
    with caplog.at_level(logging.WARNING, "train.data.images"):
        first, state = stream.next(), stream.state_dict()
        second = stream.next()
    counts = sorted(names([first]).values())
    # The file after the two stands in for both.
    assert counts == [1] * 12 + [3] and len(first[1]) == 15
    assert sorted(stream.skipped) == sorted(map(str, files))
    assert len(caplog.records) == 2 and "whole JPEG or PNG" in caplog.text
    stream.load_state_dict(state)
    assert same([stream.next()], [second])
    stream.close()


def test_skipping_everything_ends(image_folder):
    for file in image_folder.glob("train/*/*"):
        damage(file, "empty")
    with pytest.raises(ValueError, match="data must hold an image that can be decoded, got none"):
        image_stream(image_folder, skip_corrupt=True).next()


def test_skipped_image_is_not_evaluated(image_folder):
    damage(image_folder / "val/class000/0000.png", "cut")
    _, val = find_splits(image_folder)
    with pytest.raises(ValueError, match=r"0000\.png' must be a whole JPEG or PNG file"):
        list(ImageBatches(val, plain, batch_size=1))
    batches = ImageBatches(val, plain, batch_size=1, skip_corrupt=True)
    assert sum(len(labels) for _, labels in batches) == 8 and len(batches.skipped) == 1


def test_grey_and_transparent_images_become_rgb(tmp_path):
    from PIL import Image

    from train.data.images import decode

    for mode in ("L", "LA", "P", "RGBA", "1", "CMYK"):
        file = io.BytesIO()
        Image.new(mode, (4, 3)).save(file, "JPEG" if mode == "CMYK" else "PNG")
        assert decode(file.getvalue()).shape == (3, 3, 4)


def test_missing_image_folders_say_what_belongs_there(tmp_path, image_folder):
    rule = "data must hold train/<class>/<image>.jpg .*nothing is downloaded"
    with pytest.raises(ValueError, match=f"{rule}, got '.*' without a folder train"):
        find_splits(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=f"{rule}, got .*any class folder"):
        find_splits(tmp_path)
    (tmp_path / "train/dog").mkdir()
    with pytest.raises(ValueError, match=f"{rule}, got .*no valid file for the classes dog"):
        find_splits(tmp_path)
    (image_folder / "val/zebra").mkdir()
    (image_folder / "val/zebra/0.png").write_bytes(image_bytes(0, 0, (4, 4)))
    with pytest.raises(ValueError, match=r"same class folders in train and val, got .*'zebra'"):
        find_splits(image_folder)


# Shards


@pytest.fixture
def shard_folder(tmp_path) -> Path:
    return write_shards(tmp_path / "shards")


def shard_stream(folder: Path, transform=noisy, **options) -> ShardStream:
    found = find_shards(folder, "train", skip_corrupt=options.get("skip_corrupt", False))
    defaults = {"classes": 3, "batch_size": 4, "seed": 1, "buffer": 4}
    return ShardStream(found, transform, **defaults | options)


def test_shards_are_counted_or_taken_from_the_sizes_file(shard_folder, monkeypatch):
    found = find_shards(shard_folder, "train")
    assert found.sizes == (5, 4, 6, 3) and found.images == 18
    assert write_sizes(shard_folder / "train") == dict(
        zip((path.name for path in found.paths), found.sizes, strict=True)
    )

    def never(path):
        raise AssertionError("the sizes are known")

    monkeypatch.setattr(shards, "count_samples", never)
    assert find_shards(shard_folder, "train") == found


def test_shard_epoch_contains_every_sample_once(shard_folder):
    stream = shard_stream(shard_folder, plain, batch_size=6)
    epochs = [[stream.next() for _ in range(3)] for _ in range(2)]
    assert len(names(epochs[0])) == 18 and names(epochs[0]) == names(epochs[1])
    assert not same(epochs[0], epochs[1])
    for images, labels in epochs[0]:
        assert torch.equal((images[:, 0].mean(dim=(1, 2)) / 61 - 0.5).round().long(), labels)


def test_lanes_share_an_epochs_shards(shard_folder):
    stream = shard_stream(shard_folder, plain, lanes=2, batch_size=2)
    lanes = shards._Lanes(stream, plain)
    for epoch in range(3):
        dealt = [lanes._shards(lane, epoch) for lane in range(2)]
        assert sorted(dealt[0] + dealt[1]) == [0, 1, 2, 3] and len(dealt[0]) == 2


@pytest.mark.parametrize("buffer", [1, 3, 50])
def test_shuffle_buffer_gives_each_number_once_and_holds_no_more(buffer):
    order = shuffle_buffer(20, buffer, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(20)) and (buffer == 1) == (order == list(range(20)))
    assert all(number <= place + buffer for place, number in enumerate(order))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0)])
def test_shard_batches_do_not_depend_on_ranks_and_workers(shard_folder, world_size, workers):
    one = shard_stream(shard_folder, lanes=4)
    ranks = [
        shard_stream(
            shard_folder,
            lanes=4,
            batch_size=4 // world_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
        for rank in range(world_size)
    ]
    for _ in range(7):
        assert same([together([rank.next() for rank in ranks])], [one.next()])
    # Resume with these ranks and workers what one process had done.
    state = json.loads(json.dumps(one.state_dict()))
    one.load_state_dict(state)
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(4):
        assert same([together([rank.next() for rank in ranks])], [one.next()])
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("lanes", [1, 2])
def test_shard_stream_resumes_bit_for_bit(shard_folder, lanes):
    stream, states, batches = shard_stream(shard_folder, lanes=lanes), [], []
    for _ in range(12):
        states.append(stream.state_dict())
        batches.append(stream.next())
    for step, state in enumerate(states):
        resumed = shard_stream(shard_folder, lanes=lanes)
        resumed.load_state_dict(state)
        assert same([resumed.next() for _ in range(12 - step)], batches[step:])


def test_shard_stream_resumes_with_another_batch(shard_folder):
    stream = shard_stream(shard_folder, lanes=2)
    other = shard_stream(shard_folder, lanes=2, batch_size=8)
    stream.next()
    other.load_state_dict(stream.state_dict())
    first, second = stream.next(), stream.next()
    images, labels = other.next()
    # Each batch has the samples of one lane before those of the other.
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    assert same([(images, labels)], [tuple(part[order] for part in together([first, second]))])


def test_resuming_opens_no_shard_that_is_done(shard_folder, monkeypatch):
    opened = []
    read = shards.read_shard

    def record(path, size):
        opened.append(path)
        return read(path, size)

    stream = shard_stream(shard_folder, buffer=1, batch_size=1)
    for _ in range(17):
        stream.next()
    monkeypatch.setattr(shards, "read_shard", record)
    stream.load_state_dict(stream.state_dict())
    stream.next()
    assert len(opened) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_shard_evaluation_shows_each_sample_to_one_rank(shard_folder, world_size, workers):
    found = find_shards(shard_folder, "val")
    seen = []
    for rank in range(world_size):
        batches = ShardBatches(
            found,
            plain,
            classes=3,
            batch_size=3,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
        shown = list(batches)
        assert same(shown, list(batches))
        seen += shown
    assert sorted(names(seen).values()) == [1] * 7


def take_batches(stream: ShardStream, count: int) -> None:
    for _ in range(count):
        stream.next()


def cut_between_files(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return content[: tar.getmembers()[4].offset]


def overwrite_a_header(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        offset = tar.getmembers()[4].offset
    return content[:offset] + b"x" * 512 + content[offset + 512 :]


SHARD_DAMAGES = {
    "in-a-file": lambda content: content[: len(content) // 2],
    "between-files": cut_between_files,
    "header": overwrite_a_header,
    "empty": lambda content: b"",
    "text": lambda content: b"no archive at all" * 100,
    "no-samples": lambda content: bytes(10240),
}


@pytest.mark.parametrize("kind", SHARD_DAMAGES)
def test_damaged_shard_is_found_at_the_start(shard_folder, kind):
    file = shard_folder / "train/000002.tar"
    replace_file(file, SHARD_DAMAGES[kind])
    with pytest.raises(ValueError, match="must be a whole tar archive, got ") as raised:
        find_shards(shard_folder, "train")
    assert str(raised.value).startswith(f"dcconv: shard '{file}' must ")
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match="must be a whole tar archive"):
        write_sizes(shard_folder / "train")
    assert not (shard_folder / "train/sizes.json").exists()


@pytest.mark.parametrize("kind", SHARD_DAMAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_shard_damaged_after_counting_stops_when_it_is_read(shard_folder, kind, workers):
    write_sizes(shard_folder / "train")
    file = shard_folder / "train/000002.tar"
    replace_file(file, SHARD_DAMAGES[kind])
    stream = shard_stream(shard_folder, workers=workers)
    with pytest.raises(ValueError, match="must be a whole tar archive, got ") as raised:
        take_batches(stream, 6)
    assert str(raised.value).startswith(f"dcconv: shard '{file}' must ")
    assert len(str(raised.value).splitlines()) == 1
    stream.close()


def test_skipped_part_of_a_shard_is_reported_and_replaced(shard_folder):
    write_sizes(shard_folder / "train")
    file = shard_folder / "train/000002.tar"
    replace_file(file, SHARD_DAMAGES["in-a-file"])
    stream = shard_stream(shard_folder, plain, batch_size=6, skip_corrupt=True)
    states, batches = [], []
    for _ in range(6):
        states.append(stream.state_dict())
        batches.append(stream.next())
    assert list(stream.skipped) == [str(file)]
    assert 12 < len(names(batches)) < 18
    assert all(len(labels) == 6 for _, labels in batches)
    for step, state in enumerate(states):
        stream.load_state_dict(state)
        assert same([stream.next() for _ in range(6 - step)], batches[step:])
    (shard_folder / "train/sizes.json").unlink()
    found = find_shards(shard_folder, "train", skip_corrupt=True)
    assert 0 < found.sizes[2] < 6 and len(found.failures) == 1
    shown = ShardBatches(found, plain, classes=3, batch_size=2, skip_corrupt=True)
    assert names(shown) <= names(batches) and list(shown.skipped) == [str(file)]


def test_stand_in_is_augmented_for_its_own_place(shard_folder):
    write_sizes(shard_folder / "train")
    replace_file(shard_folder / "train/000002.tar", SHARD_DAMAGES["in-a-file"])
    stream = shard_stream(shard_folder, noisy, batch_size=18, skip_corrupt=True)
    assert sorted(names([stream.next()]).values()) == [1] * 18


def write_samples(path: Path, *samples: dict[str, bytes]) -> None:
    members = {f"{n:03}.{key}": one[key] for n, one in enumerate(samples) for key in one}
    write_tar(path, members, "w")


GOOD = {"png": image_bytes(1, 1, (20, 24)), "cls": b"1\n"}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"png": GOOD["png"]},
            r"have an image .jpg, .jpeg, .png and a class number .cls, got .png",
        ),
        ({"txt": b"a", "cls": b"1"}, r"and a class number .cls, got .txt, .cls"),
        (GOOD | {"cls": b"3"}, "have a .cls from 0 to 2, got '3'"),
        (GOOD | {"cls": b"-1"}, "have a .cls from 0 to 2, got '-1'"),
        (GOOD | {"cls": b""}, "have a .cls from 0 to 2, got ''"),
        (GOOD | {"cls": b"9" * 5000}, "have a .cls from 0 to 2, got '9999"),
        (GOOD | {"png": GOOD["png"][:500]}, "be a whole JPEG or PNG file"),
        (GOOD | {"png": b"\x80\x04."}, "be a whole JPEG or PNG file, got something else"),
    ],
)
def test_wrong_sample_stops_with_its_name_or_is_skipped(tmp_path, sample, message):
    (tmp_path / "train").mkdir()
    file = tmp_path / "train/000.tar"
    write_samples(file, GOOD, sample, GOOD)
    with pytest.raises(ValueError, match=message) as raised:
        shard_stream(tmp_path, batch_size=3).next()
    assert f"'{file}/001" in str(raised.value) and len(str(raised.value).splitlines()) == 1
    stream = shard_stream(tmp_path, plain, batch_size=3, skip_corrupt=True)
    assert stream.next()[1].tolist() == [1, 1, 1] and len(stream.skipped) == 1
    found = find_shards(tmp_path, "train")
    shown = ShardBatches(found, plain, classes=3, batch_size=3, skip_corrupt=True)
    assert [labels.tolist() for _, labels in shown] == [[1, 1]] and len(shown.skipped) == 1


def test_shards_without_a_single_good_sample_end(tmp_path):
    (tmp_path / "train").mkdir()
    write_samples(tmp_path / "train/000.tar", {"cls": b"0"}, {"cls": b"1"})
    with pytest.raises(ValueError, match="data must hold a sample that can be read, got none"):
        shard_stream(tmp_path, batch_size=2, skip_corrupt=True).next()


def test_counting_groups_as_webdataset_does(tmp_path):
    members = {
        "a.cls": b"0",
        "a.png": b"",
        "__meta__/x.json": b"{}",
        "dir/b.seg.png": b"",
        "dir/b.cls": b"0",
        "noextension": b"",
        "dir.d/c.png": b"",
    }
    path = write_tar(tmp_path / "a.tar", members, "w")
    assert count_samples(path) == (3, None)
    assert [sample["__key__"] for sample in shards.read_shard(path, 3)] == ["a", "dir/b", "dir.d/c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON and give the number of samples of each shard"),
        ("[]", "give the number of samples of each shard and of no other file"),
        ('{"000.tar": 1, "b.tar": 1}', "got a difference in b.tar"),
        ('{"000.tar": 0}', "000.tar must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_sizes_file_is_refused(tmp_path, content, message):
    (tmp_path / "train").mkdir()
    write_samples(tmp_path / "train/000.tar", GOOD)
    (tmp_path / "train/sizes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("claimed", [1, 2, 4, 5])
def test_sizes_that_do_not_fit_stop_when_the_shard_is_read(tmp_path, claimed):
    (tmp_path / "train").mkdir()
    write_samples(tmp_path / "train/000.tar", GOOD, GOOD, GOOD)
    (tmp_path / "train/sizes.json").write_text(json.dumps({"000.tar": claimed}))
    relation = "more than" if claimed < 3 else "fewer than"
    with pytest.raises(ValueError, match=f"whole tar archive, got {relation} {claimed} samples"):
        shard_stream(tmp_path, batch_size=claimed).next()


def test_missing_shards_say_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r"must hold shards train/\*.tar; nothing is downloaded"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 5, "batch_size": 5}, "lanes must be at most the number of shards, 4, got 5"),
        ({"lanes": 3, "workers": 2}, "lanes must be a multiple of ranks times workers, 2, got 3"),
        ({"lanes": 2, "batch_size": 3}, "be, over 1 ranks, a multiple of lanes = 2, got 3"),
        ({"buffer": 0}, "buffer must be an integer of at least 1, got 0"),
        ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
    ],
)
def test_shard_stream_refuses_wrong_arguments(shard_folder, options, message):
    with pytest.raises(ValueError, match=message):
        shard_stream(shard_folder, **options)


@pytest.mark.parametrize("readers", [{"world_size": 2}, {"workers": 4}, {"lanes": 4}])
def test_lanes_of_the_resumed_run_are_needed(shard_folder, readers):
    state = shard_stream(shard_folder).state_dict() | {"lanes": 1}
    stream = shard_stream(shard_folder, **readers)
    sentence = (
        "dcconv: lanes must be 1 as in the resumed run (not given: ranks times workers), "
        f"got {stream.lanes}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        stream.load_state_dict(state)
    assert stream.position == 0


def test_state_of_other_shards_is_refused(shard_folder):
    stream = shard_stream(shard_folder, lanes=2)
    for change, message in (
        ({"lanes": 0}, "saved stream's lanes must be an integer of at least 1, got 0"),
        ({"buffer": 9}, "saved stream's buffer must be 4 to resume this stream, got 9"),
        ({"position": -1}, "saved stream's position must be an integer of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict(stream.state_dict() | change)
