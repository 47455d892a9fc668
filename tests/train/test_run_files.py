"""Tampered and half-written files of runs: one sentence, in bounded time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import CIFAR_NAMES, cifar_files, image_bytes, write_tar
from rich.console import Console
from tiny_task import TinyTask

from train.data.cifar import load_cifar
from train.data.images import ImageStream, find_images
from train.data.shards import ShardStream, count_samples, find_shards
from train.engine import files
from train.engine.checkpoint import Checkpoints
from train.engine.config import EngineOptions, read_yaml, to_yaml
from train.engine.files import ContentError, load_tensors, parse_json, parse_yaml, read_file
from train.engine.folder import RunFolder
from train.engine.logs import read_metrics
from train.engine.loop import Trainer, launch
from train.engine.state import check_state
from train.networks.pretrained import load_plain

OPTIONS: dict[str, Any] = {
    **{"steps": 4, "evaluate_every": 0, "save_every": 2, "log_every": 2, "device": "cpu"},
    **{"threads": 1},
}


def run(folder: Path, **more: Any) -> int:
    options = EngineOptions(**OPTIONS | {"folder": str(folder)} | more)
    return launch(options, lambda device: TinyTask(), program="prog", name="tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(folder) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, folder: Path, **more: Any) -> str:
    """Resume a run that is refused by one sentence and changes nothing; return the sentence."""
    before = content_of(folder)
    capsys.readouterr()
    assert run(folder, **{"steps": 6} | more) == 2
    assert content_of(folder) == before
    error = capsys.readouterr().err
    assert error.startswith("dcconv: ") and len(error.splitlines()) == 1 and len(error) < 700
    return error


# Kinds and sizes.


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


KINDS = {"a named pipe": pipe, "a device": device, "a folder": folder}


@pytest.mark.parametrize("kind", KINDS)
def test_reader_takes_regular_files_alone(tmp_path, kind):
    KINDS[kind](tmp_path / "x")
    with pytest.raises(OSError, match=f"{kind}, no regular file"):
        read_file(tmp_path / "x", 10)


def test_reader_takes_no_more_than_it_is_told(tmp_path):
    (tmp_path / "x").write_bytes(bytes(11))
    with pytest.raises(OSError, match="11 bytes, more than 10"):
        read_file(tmp_path / "x", 10)
    assert read_file(tmp_path / "x", 11) == bytes(11)
    # A file that says it is empty and is not.
    if Path("/proc/self/status").exists():
        assert read_file(Path("/proc/self/status"), 10**5).startswith(b"Name:")
        with pytest.raises(OSError, match="more than 5 bytes"):
            read_file(Path("/proc/self/status"), 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["checkpoints/manifest.json", "config.yaml", "resumes.jsonl", "metrics.jsonl"],
)
def test_other_kind_of_file_in_a_run_is_refused(copied, capsys, name, kind):
    KINDS[kind](copied / name)
    assert f"{kind}, no regular file" in refused(capsys, copied)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kind_of_checkpoint_is_damaged(copied, capsys, kind):
    KINDS[kind](copied / "checkpoints" / "step-00000004.pt")
    assert run(copied, steps=6) == 0
    output = capsys.readouterr().out
    assert f"{kind}, no regular file" in output and "Resumed at step 2" in output


def test_checkpoint_larger_than_listed_is_not_read(copied, capsys):
    path = copied / "checkpoints" / "step-00000004.pt"
    size = path.stat().st_size
    # A file of a terabyte without a byte on the disk.
    os.truncate(path, 2**40)
    assert run(copied, steps=6) == 0
    assert f"got {2**40} bytes, more than {size}" in capsys.readouterr().out


# What a checkpoint holds.


def rewritten(folder: Path, change: Callable[[Any], Any]) -> None:
    """Let the only checkpoint hold something else, with the right digest."""
    checkpoints = Checkpoints(folder / "checkpoints")
    _, state = checkpoints.load_latest()
    checkpoints.entries, checkpoints.best = [], None
    checkpoints.save(change(state), 4)


def without(*keys: Any) -> Callable[[Any], Any]:
    def change(state: Any) -> Any:
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return state

    return change


def with_(value: Any, *keys: Any) -> Callable[[Any], Any]:
    def change(state: Any) -> Any:
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return state

    return change


RNG = ("ranks", 0, "rng")
STATES = {
    "empty": (lambda state: {}, "a state without"),
    "list": (lambda state: [state], "a state of type list, not dict"),
    "none": (lambda state: None, "a state of type NoneType"),
    "step-missing": (without("step"), "a state without 'step'"),
    "step-negative": (with_(-1, "step"), "a step -1"),
    "step-fraction": (with_(4.0, "step"), "a state's 'step' of type float, not int"),
    "step-bool": (with_(True, "step"), "a state's 'step' of type bool"),
    "step-other": (with_(3, "step"), "step 3, listed as 4"),
    "ranks-missing": (without("ranks"), "a state without 'ranks'"),
    "ranks-none": (with_([], "ranks"), "no process"),
    "ranks-text": (with_(["x"], "ranks"), "a process of type str, not dict"),
    "stream-missing": (without("ranks", 0, "stream"), "a process without 'stream'"),
    "rng-missing": (without(*RNG), "a process without 'rng'"),
    "torch-missing": (without(*RNG, "torch"), "no state of torch's generator"),
    "torch-short": (
        with_(torch.zeros(7, dtype=torch.uint8), *RNG, "torch"),
        "a state of PyTorch's generator of 7 bytes, not",
    ),
    "torch-floats": (with_(torch.zeros(5056), *RNG, "torch"), "generator that is no bytes"),
    "python-short": (with_([3, [1, 2], None], *RNG, "python"), "that is not 624 words"),
    "python-words": (with_([3, [-1] * 624 + [5], None], *RNG, "python"), "that is not 624 words"),
    "python-text": (with_("x", *RNG, "python"), "that is no list of three"),
    "numpy-short": (
        with_(["MT19937", torch.zeros(3, dtype=torch.int64), 0, 0, 0.0], *RNG, "numpy"),
        "that is not 624 words",
    ),
    "numpy-beyond": (
        with_(["MT19937", torch.zeros(624, dtype=torch.int64), 9999, 0, 0.0], *RNG, "numpy"),
        "a state of NumPy's generator at 9999",
    ),
    "network-missing": (without("network"), "a state without 'network'"),
    "network-numbers": (with_({1: torch.zeros(1)}, "network"), "a name in the network of type"),
    "optimizer-missing": (without("optimizer"), "a state without 'optimizer'"),
    "optimizer-state": (without("optimizer", "state"), "the optimiser without 'state'"),
    "optimizer-groups": (without("optimizer", "param_groups"), "without 'param_groups'"),
    "optimizer-entry": (without("optimizer", "state", 0), "an optimiser with 5 of 6 entries"),
    "optimizer-text": (with_("x", "optimizer", "state", 0), "a parameter's entry of type str"),
    "scaler": (with_([], "scaler"), "a state's 'scaler' of type list, not dict"),
    "pending": (with_(2, "pending"), "a state's 'pending' of type int, not bool"),
    "evaluation": (with_({"accuracy": "x"}, "evaluation"), "the evaluation's 'accuracy' of type"),
    "interval": (with_({}, "ranks", 0, "interval"), "the log's sums without 'names'"),
    "interval-sums": (
        with_({"names": ["loss"], "sums": [torch.zeros(3)], "batches": 1}, "ranks", 0, "interval"),
        "a sum of shape [3]",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_checkpoint_that_no_run_saves_is_damaged_in_a_sentence(copied, capsys, name):
    change, reason = STATES[name]
    rewritten(copied, change)
    error = refused(capsys, copied)
    assert "dcconv: resume must have an intact checkpoint in" in error
    said: list[str] = []
    with pytest.raises(ValueError, match="resume must have an intact checkpoint"):
        Checkpoints(copied / "checkpoints", warn=said.append, check=check_state).load_latest()
    assert said[0].startswith("dcconv: checkpoint must be the intact file '") and reason in said[0]


FITS = {
    "moments": (without("optimizer", "state", 0, "exp_avg"), "without 'exp_avg' of parameter 0"),
    "moments-shape": (
        with_(torch.zeros(2), "optimizer", "state", 0, "exp_avg"),
        "the optimiser's 'exp_avg' of shape [2], not",
    ),
    "moments-step": (with_("x", "optimizer", "state", 0, "step"), "'step' of type str"),
    "group": (with_([], "optimizer", "param_groups"), "0 groups of parameters, not 1"),
    "group-lr": (with_("x", "optimizer", "param_groups", 0, "lr"), "'lr' of type str"),
    "group-params": (with_([0], "optimizer", "param_groups", 0, "params"), "a group of 1, not"),
    "weight": (without("network", "0.weight"), "Missing key"),
    "weight-text": (with_("x", "network", "0.weight"), "0.weight"),
    "task": (with_({}, "task"), "average"),
    "stream": (with_({}, "ranks", 0, "stream"), "generator"),
}


@pytest.mark.parametrize("name", FITS)
def test_checkpoint_that_does_not_fit_is_refused_in_a_sentence(copied, capsys, name):
    change, reason = FITS[name]
    rewritten(copied, change)
    error = refused(capsys, copied)
    assert error.startswith("dcconv: resume must be a run of the same ") and reason in error


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def repacked(content: bytes, compression: int, replaced: bytes | None = None) -> bytes:
    """Return a saved file with its parts compressed, or with other instructions."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            part = old.read(member)
            if replaced is not None and member.filename.endswith("data.pkl"):
                part = replaced
            new.writestr(member.filename, part, compression)
    return file.getvalue()


def deep_pickle(levels: int) -> bytes:
    """Return the instructions of lists in each other; what reads them does not recurse."""
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def doubling_pickle(levels: int) -> bytes:
    """Return the instructions of a list that holds another twice, which holds another twice ..."""
    text = b"\x80\x02(]q\x00"
    for level in range(1, levels):
        text += b"]q" + bytes([level]) + 2 * (b"h" + bytes([level - 1]) + b"a")
    return text + b"t."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (repacked(saved(torch.zeros(10**6)), zipfile.ZIP_DEFLATED), "a compressed part"),
        (repacked(saved({}), zipfile.ZIP_STORED, deep_pickle(10**5)), "more than 64 levels"),
        (repacked(saved({}), zipfile.ZIP_STORED, doubling_pickle(40)), "more than 2000000 values"),
        (repacked(saved({}), zipfile.ZIP_STORED, b"no pickle"), ""),
        (saved(torch.zeros(1).expand(10**9)), "a tensor [1000000000] that repeats its values"),
        (saved(bytearray(5)), "more than tensors and plain Python, '__builtin__.bytearray'"),
        (saved(torch.eye(2).to_sparse()), "more than tensors and plain Python, 'torch._utils"),
        (pickle.dumps(os.getcwd), "more than tensors and plain Python"),
        (b"", ""),
        (b"PK\x03\x04", ""),
    ],
)
def test_tensors_are_read_within_bounds(content, reason):
    with pytest.raises(ContentError) as raised:
        load_tensors(content)
    assert reason in str(raised.value) and len(str(raised.value)) < 300


def test_tensors_of_old_and_new_files_are_read(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.Adam(network.parameters())
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "weight": None}
    state["weight"] = network[0].weight
    for new in (True, False):
        path = tmp_path / f"{new}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=new)
        found = load_tensors(path.read_bytes())
        assert torch.equal(found["network"]["0.weight"], network[0].weight)
        assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_file_of_another_kind_is_refused(tmp_path, kind):
    KINDS[kind](tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"pretrained must be a file .*{kind}, no regular file"):
        load_plain(tmp_path / "x.pt")


def test_pretrained_file_that_unpacks_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(repacked(saved(torch.zeros(10**6)), zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="pretrained must be a file of a network's tensors, got"):
        load_plain(tmp_path / "x.pt")


# Text.


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":', '["\\"", '])
def test_json_nested_without_end_is_refused(opening):
    with pytest.raises(ContentError, match="nested more than 64 levels"):
        parse_json(opening * 200_000)


def test_json_brackets_in_text_are_no_levels():
    text = json.dumps({"[" * 500: ['"[' * 200, "\\"]})
    assert parse_json(text) == json.loads(text)
    deep: list = []
    for _ in range(63):
        deep = [deep]
    assert parse_json(json.dumps(deep)) == deep


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "nested more than 64 levels"),
        ("{a: " * 200_000, "nested more than 64 levels"),
        ("- " * 100_000 + "a", "nested more than 64 levels"),
        ("a: &x [1, 2]\nb: [*x, *x]", "line 2: an alias of a list or mapping"),
        ("a: 2001-02-30", "day"),
        ("a: " + "9" * 9000, "digits"),
        ("a: \x01", "special characters"),
    ],
)
def test_yaml_beyond_bounds_is_refused(tmp_path, text, reason):
    with pytest.raises(ContentError, match=reason):
        parse_yaml(text)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="dcconv: config must be valid YAML, got") as raised:
        read_yaml(tmp_path / "x.yaml")
    assert len(str(raised.value)) < 500


def test_configuration_is_utf_8_wherever_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    options = EngineOptions(out="Läufe ±")
    for ascii_only in (False, True):
        (tmp_path / "x.yaml").write_bytes(to_yaml(options, ascii_only=ascii_only).encode())
        assert read_yaml(tmp_path / "x.yaml")["out"] == "Läufe ±"
    assert to_yaml(options, ascii_only=True).isascii()


NESTED = b"[" * 200_000
RUN_FILES = {
    "manifest-nested": ("checkpoints/manifest.json", NESTED, "nested more than 64 levels"),
    "manifest-types": (
        "checkpoints/manifest.json",
        b'{"format": 1, "best": null, "checkpoints": [{"file": "step-00000004.pt", "step": -4, '
        b'"bytes": 1, "sha256": ""}]}',
        "an entry whose step is no whole number",
    ),
    "manifest-list": (
        "checkpoints/manifest.json",
        b'{"format": 1, "best": null, "checkpoints": 5}',
        "no list of checkpoints",
    ),
    "config-nested": ("config.yaml", NESTED, "resume must be valid YAML"),
    "config-no-text": ("config.yaml", b"\xff\xfe", "resume must be a readable file"),
    "history-no-text": ("resumes.jsonl", b"\xff\xfe\n", "resume must have a readable resumes"),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_damaged_text_of_a_run_is_refused_in_a_sentence(copied, capsys, name):
    file, content, reason = RUN_FILES[name]
    (copied / file).write_bytes(content)
    assert reason in refused(capsys, copied)


def test_log_beyond_bounds_loses_the_lines_concerned_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1, "loss": 0.5}'
    bad = [NESTED, b"x" * (2 * files.MOST_LINE), b'{"kind": "train", "step": -1}']
    bad += [b'{"kind": "train", "step": 1, "loss": 1' + b"0" * 400 + b"}"]
    path.write_bytes(b"\n".join([good, *bad, good]))
    said: list[str] = []
    assert read_metrics(path, said.append) == [json.loads(good)] * 2
    assert [text.partition(" must ")[0] for text in said] == [
        f"dcconv: {path}:{number}" for number in range(2, 6)
    ]


# Data.


def endless_tar(megabytes: int) -> bytes:
    """Return a compressed archive with a file that is not wanted, of zeros."""
    file = io.BytesIO()
    with gzip.open(file, "wb", compresslevel=1) as packed:
        member = tarfile.TarInfo("other")
        member.size = megabytes * files.MIB
        packed.write(member.tobuf())
        for _ in range(megabytes):
            packed.write(bytes(files.MIB))
        packed.write(bytes(1024))
    return file.getvalue()


def test_archive_that_unpacks_without_end_is_refused_in_little_memory(tmp_path):
    _, name = CIFAR_NAMES[10, "binary"]
    content = endless_tar(200)
    assert len(content) < 2 * files.MIB
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="gzip-compressed tar archive, got more than") as raised:
        load_cifar(tmp_path, 10, verify=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "when unpacked" in str(raised.value)
    assert peak < 10 * files.MIB


def header_of(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse_tar(name: str) -> bytes:
    """Return an archive with a file of no bytes that stands for a terabyte."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.pax_headers = {
            "GNU.sparse.size": str(2**40),
            "GNU.sparse.numblocks": "1",
            "GNU.sparse.map": "0,0",
        }
        tar.addfile(member, io.BytesIO())
    return file.getvalue()


ARCHIVES = {
    "long-name": header_of("x", 2**33, tarfile.GNUTYPE_LONGNAME),
    "long-attributes": header_of("x", 2**33, tarfile.XHDTYPE),
    "endless-headers": header_of("x", 0, tarfile.GNUTYPE_LONGNAME) * 5000,
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archive_of_endless_headers_is_refused(tmp_path, kind):
    _, name = CIFAR_NAMES[10, "binary"]
    (tmp_path / name).write_bytes(gzip.compress(ARCHIVES[kind]))
    with pytest.raises(ValueError, match="must be a whole gzip-compressed tar archive, got"):
        load_cifar(tmp_path, 10, verify=False)
    (tmp_path / "x.tar").write_bytes(ARCHIVES[kind])
    count, failure = count_samples(tmp_path / "x.tar")
    assert count == 0 and "must be a whole tar archive, got" in failure.sentence


def test_sparse_file_in_an_archive_is_refused(tmp_path):
    folder_name, name = CIFAR_NAMES[10, "binary"]
    (tmp_path / name).write_bytes(gzip.compress(sparse_tar(f"{folder_name}/data_batch_1.bin")))
    with pytest.raises(ValueError, match=r"as a regular file .* of 1099511627776 bytes"):
        load_cifar(tmp_path, 10, verify=False)


def shard_stream(data: Path, **more: Any) -> ShardStream:
    given = {"classes": 3, "batch_size": 2, "seed": 0, "buffer": 4} | more
    return ShardStream(find_shards(data, "train"), torch.Tensor.float, **given)


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder with a shard of two samples, their number listed."""
    (tmp_path / "train").mkdir()
    members = {f"{n}.{key}": value for n in range(2) for key, value in sample(n).items()}
    write_tar(tmp_path / "train" / "000.tar", members, "w")
    (tmp_path / "train" / "sizes.json").write_text('{"000.tar": 2}')
    return tmp_path


def sample(number: int) -> dict[str, bytes]:
    return {"png": image_bytes(0, number, (4, 4)), "cls": b"0"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", [True, False])
def test_other_kind_of_shard_is_refused(shards, kind, listed):
    if not listed:
        (shards / "train" / "sizes.json").unlink()
    KINDS[kind](shards / "train" / "000.tar")
    with pytest.raises(ValueError, match=f"must be a whole tar archive, got {kind}, no regular"):
        shard_stream(shards).next()


@pytest.mark.parametrize("listed", [True, False])
def test_compressed_shard_is_refused(shards, listed):
    if not listed:
        (shards / "train" / "sizes.json").unlink()
    path = shards / "train" / "000.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"000.tar' must be a whole tar archive, got"):
        shard_stream(shards).next()


def test_sparse_or_large_file_in_a_shard_is_refused(shards, monkeypatch):
    (shards / "train" / "000.tar").write_bytes(sparse_tar("0.png"))
    with pytest.raises(ValueError, match="of sparse, 1099511627776 bytes, more than"):
        shard_stream(shards).next()
    monkeypatch.setattr("train.data.shards.MOST_IMAGE", 10)
    write_tar(shards / "train" / "000.tar", {"0.png": bytes(11), "0.cls": b"0"}, "w")
    with pytest.raises(ValueError, match=r"'0.png' of 11 bytes, more than 10"):
        shard_stream(shards).next()


def test_numbers_of_samples_beyond_bounds_are_refused(shards):
    (shards / "train" / "sizes.json").write_text('{"000.tar": 1000000000000}')
    with pytest.raises(ValueError, match=r"000.tar must be at most 10000000, got 1000000000000"):
        find_shards(shards, "train")
    (shards / "train" / "sizes.json").write_bytes(NESTED)
    with pytest.raises(ValueError, match=r"must be JSON and give the number of samples .* nested"):
        find_shards(shards, "train")


def test_saved_position_without_end_is_refused(shards):
    stream = shard_stream(shards)
    state = stream.state_dict() | {"position": 10**15}
    with pytest.raises(ValueError, match="saved stream's position must be at most"):
        stream.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_other_kind_of_image_is_refused(tmp_path, kind):
    path = tmp_path / "train" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(image_bytes(0, 0, (4, 4)))
    images = find_images(tmp_path, "train")
    KINDS[kind](path)
    stream = ImageStream(images, torch.Tensor.float, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=f"0.png' must be a readable file, got {kind}, no"):
        stream.next()


@pytest.mark.parametrize("kind", KINDS)
def test_other_kind_of_cifar_file_is_refused(tmp_path, kind):
    made = tmp_path / CIFAR_NAMES[100, "binary"][0]
    made.mkdir()
    for name, content in cifar_files(100, "binary").items():
        (made / name).write_bytes(content)
    KINDS[kind](made / "train.bin")
    with pytest.raises(ValueError, match=f"train.bin' must be a regular file .* {kind}, no reg"):
        load_cifar(tmp_path, 100, verify=False)


# What a killed process leaves.


def test_resuming_removes_what_a_killed_process_left(copied, capsys):
    left = [
        copied / ".config.yaml.123.tmp",
        copied / "source" / "train" / ".task.py.123.tmp",
        copied / "checkpoints" / ".step-00000006.pt.123.tmp",
        copied / "checkpoints" / "step-00000006.pt",
        copied / "trainings" / "a" / "checkpoints" / "step-00000001.pt",
    ]
    inner = copied / "trainings" / "a" / "checkpoints"
    inner.mkdir(parents=True)
    (inner / "manifest.json").write_text('{"format": 1, "best": null, "checkpoints": []}')
    mine = [copied / "notes.tmp", copied / ".hidden", copied / "checkpoints" / "my.pt"]
    for path in [*left, *mine]:
        path.write_bytes(b"half")
    # Not where the run is refused.
    refused(capsys, copied, seed=5)
    assert all(path.exists() for path in left)
    assert run(copied) == 0
    assert not [path for path in left if path.exists()]
    assert all(path.read_bytes() == b"half" for path in mine)
    assert Checkpoints(copied / "checkpoints").last_step == 4


def test_damaged_checkpoint_is_kept_until_the_next_one_is_saved(copied):
    newest = copied / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(b"damaged")
    checkpoints = Checkpoints(copied / "checkpoints")
    assert checkpoints.load_latest()[0].step == 2
    checkpoints.tidy()
    assert newest.exists()
    random.seed(0)
    options = EngineOptions(**OPTIONS)
    trainer = Trainer(TinyTask(), options, RunFolder(copied), Console(quiet=True))
    assert trainer.run() == 0
    assert Checkpoints(copied / "checkpoints").load_latest()[0].step == 4
