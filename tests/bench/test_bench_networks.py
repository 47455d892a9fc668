"""python -m bench networks: rows, the gate, refusals and interruption, on a tiny network."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import dcconv
from bench import networks
from bench.cases import find_operator
from bench.networks import NETWORKS, PLAIN, REFERENCE, Case, Network, Networks
from bench.records import Record, read
from dcconv import DecoupledConv2d
from dcconv.optim import decoupled_layers

OWN = "dcconv-cpu"


def tiny_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 100),
    )


TINY = Network("tiny", tiny_network, "torch", 32, 32, {"cpu": 3, "cuda": 3}, 3)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add a network that one thread runs in no time."""
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    networks.add_arguments(parser)
    output = io.StringIO()
    usual = ("--device", "cpu", "--rounds", "1", "--min-time", "0")
    options = parser.parse_args([*usual, *arguments])
    status = networks.run(options, Console(file=output, width=200, markup=False))
    return status, output.getvalue()


def rows(folder: Path) -> list[Record]:
    return read(folder / "networks.jsonl")


def tiny_case(dtype: str = "float32") -> Case:
    return Case("tiny", find_operator("tanh-cosine"), dtype, "channels_last", "cpu", 3, 32)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_rows_have_every_provider_with_time_memory_and_errors(dtype: str, tmp_path: Path) -> None:
    status, text = run("--networks", "tiny", "--dtype", dtype, "--results", str(tmp_path))
    assert status == 0
    found = rows(tmp_path)
    assert [record.row for record in found] == [
        {
            "network": "tiny",
            "operator": "tanh-cosine",
            "dtype": dtype,
            "layout": "channels_last",
            "batch": 3,
            "image_size": 32,
            "pass": which,
            "threads": torch.get_num_threads(),
        }
        for which in ("train", "inference")
    ]
    for record in found:
        assert list(record.results) == [PLAIN, REFERENCE, OWN]
        for name, result in record.results.items():
            median = record.median(name)
            assert median is not None
            assert result["images_per_s"] == pytest.approx(3000 / median)
            assert result["peak"] > 0
            assert ("kept" in result) == (record.row["pass"] == "train")
        assert set(record.results[OWN]["errors"]) == set(record.facts["allowed"])
    train = found[0].results
    assert train[OWN]["kept"]["total"] < train[REFERENCE]["kept"]["total"]
    for name in (PLAIN, REFERENCE, OWN):
        assert len(re.findall(rf"(?:train|inference) +{name} ", text)) == 2


@pytest.mark.backend("cpu")
def test_fused_norms_are_a_provider_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network() -> nn.Module:
        layers = list(tiny_network())
        return nn.Sequential(*layers[:3], *layers[4:])

    monkeypatch.setitem(NETWORKS, "tiny", TINY._replace(build=network))
    status, _ = run("--networks", "tiny", "--fuse-norms", "--results", str(tmp_path))
    assert status == 0
    fused = OWN + networks.FUSED
    for record in rows(tmp_path):
        assert list(record.results) == [PLAIN, REFERENCE, OWN, fused]
        assert record.median(fused) is not None
        assert set(record.results[fused]["errors"]) == {"logits"}
    made = networks.make_networks(case := tiny_case(), case.data()[0])
    norms = [
        sum(isinstance(part, dcconv.BatchNormAct2d) for part in made.of(name, case).modules())
        for name in (OWN, fused)
    ]
    assert norms == [0, 1]


@pytest.mark.backend("cpu")
@pytest.mark.parametrize(("magnitude", "angular"), [("tanh", "linear"), ("ball", "cosine")])
def test_network_that_computes_something_else_has_no_time(
    magnitude: str, angular: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(self: Networks, provider: str, case: Case) -> nn.Module:
        network = original(self, provider, case)
        if provider == OWN:
            for layer in decoupled_layers(network):
                layer.magnitude, layer.angular = magnitude, angular
        return network

    original = Networks.of
    monkeypatch.setattr(Networks, "of", altered)
    status, text = run("--networks", "tiny", "--results", str(tmp_path))
    assert status == 1
    for record in rows(tmp_path):
        assert record.wrong == [OWN]
        assert record.median(OWN) is None
        assert record.median(REFERENCE) is not None
        assert record.results[OWN]["note"].startswith("wrong: logits off by ")
    assert "wrong: logits off by" in text


@pytest.mark.backend("cpu")
def test_wrong_gradient_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(
        self: Case, network: nn.Module, backend: str, fuse_norms: bool = False
    ) -> nn.Module:
        converted = convert(self, network, backend, fuse_norms)
        if backend == "cpu":
            for layer in decoupled_layers(converted):
                layer.norm_mean_grad = False
        return converted

    convert = Case.convert
    monkeypatch.setattr(Case, "convert", altered)
    status, _ = run("--networks", "tiny", "--results", str(tmp_path))
    assert status == 1
    train, inference = rows(tmp_path)
    assert re.match("wrong: grad_first off by [^;]*(; grad_last .*)?$", train.results[OWN]["note"])
    assert inference.wrong == []


def test_refusing_backend_has_its_sentence_in_the_row(tmp_path: Path) -> None:
    arguments = ("--networks", "tiny", "--passes", "inference", "--backends", "triton,reference")
    status, text = run(*arguments, "--results", str(tmp_path))
    assert status == 0
    (record,) = rows(tmp_path)
    assert list(record.results) == [PLAIN, REFERENCE, "dcconv-triton"]
    note = "missing: it runs on CUDA tensors, got a cpu tensor"
    assert record.results["dcconv-triton"] == {"timing": None, "note": note}
    assert note in text


def test_networks_of_a_missing_package_are_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    arguments = ("--passes", "inference", "--backends", "reference", "--no-save")
    status, text = run("--networks", "resnet18,tiny,convnext", *arguments)
    assert status == 0
    assert "Left out: resnet18, convnext: it needs torchvision, which cannot be imported" in text
    assert re.search("tiny +3 x 32 px", text)
    message = r"^dcconv: --networks must name a network that can be built here, got resnet50$"
    with pytest.raises(ValueError, match=message):
        run("--networks", "resnet50", *arguments)


def test_interrupted_run_keeps_the_finished_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Iterator[Record]:
        yield next(measure(*arguments))
        raise KeyboardInterrupt

    measure = networks.measure
    monkeypatch.setattr(networks, "measure", interrupted)
    arguments = ("--networks", "tiny", "--backends", "reference", "--results", str(tmp_path))
    status, text = run(*arguments)
    assert status == 130
    assert [record.row["pass"] for record in rows(tmp_path)] == ["train"]
    assert "Interrupted: 1 rows are finished." in text
    assert re.search("train +reference", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--networks", "vgg"), "--networks must be one of resnet18, resnet50, resnet32, convnext"),
        (("--networks", ""), "--networks must name one or more of resnet18"),
        (("--operators", "tanh"), "must be <magnitude>-<angular>"),
        (("--operators", ""), "--operators must name one or more of tanh-cosine"),
        (("--passes", "fwd"), "--passes must be one of train, inference, got 'fwd'"),
        (("--layout", "nchw"), "--layout must be one of channels_last, contiguous, got 'nchw'"),
        (("--batch", "0"), "--batch must be an integer of at least 1, got 0"),
        (("--image-size", "31"), "--image-size must be an integer of at least 32, got 31"),
        (
            ("--image-size", "32", "--batch", "1"),
            "--image-size must be an integer of at least 64, got 32",
        ),
    ],
)
def test_wrong_options_raise(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run("--no-save", *arguments)


def test_resnet32_pads_by_itself_and_is_the_training_network() -> None:
    from train.networks import ResNet32
    from train.networks import find_operator as find_training_operator

    torch.manual_seed(3)
    official = ResNet32(find_training_operator("conv"), 100)
    torch.manual_seed(3)
    network = networks.resnet32()
    kinds = {type(m) for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {nn.Conv2d}
    for got, want in zip(network.parameters(), official.parameters(), strict=True):
        assert torch.equal(got, want)
    x = torch.randn(1, 3, 8, 8)
    stride_1 = official.blocks[0](official.root(x))  # type: ignore[index]
    assert torch.allclose(network.blocks[0](network.root(x)), stride_1)  # type: ignore
    assert network(x).shape == official(x).shape
    case = dataclasses.replace(tiny_case(), name="resnet32")
    assert len(list(decoupled_layers(case.convert(network, "reference")))) == 31


@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("resnet50", 53), ("convnext", 14)])
def test_torchvision_networks_are_converted_whole(name: str, count: int) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with torch.device("meta"):
        network = dcconv.convert(NETWORKS[name].build())
    layers = [part for part in network.modules() if isinstance(part, DecoupledConv2d)]
    assert len(layers) == count
    assert not any(isinstance(part, nn.Conv2d) for part in network.modules())


def test_providers_start_from_the_same_state() -> None:
    case = tiny_case()
    images, _ = case.data()
    state = torch.get_rng_state()
    made = networks.make_networks(case, images)
    assert torch.equal(torch.get_rng_state(), state)
    reference, own = (made.of(name, case).state_dict() for name in (REFERENCE, OWN))
    assert reference.keys() == own.keys()
    assert all(torch.equal(reference[name], own[name]) for name in own)
    assert int(own["0.norm_mean_steps"]) == 1
    plain = made.of(PLAIN, case).state_dict()
    assert torch.equal(plain["0.weight"], own["0.weight"])
    assert not torch.equal(plain["1.running_var"], torch.ones(8))


def record(network: str, times: dict[str, float], operator: str = "tanh-cosine") -> Record:
    row = {"network": network, "operator": operator, "dtype": "float32", "layout": "contiguous"}
    row |= {"batch": 2, "image_size": 32, "pass": "train", "threads": 1}  # type: ignore[dict-item]
    results = {
        name: {
            "timing": {"median": ms, "low": ms, "high": ms * (1.2 if ms == 8 else 1), "rounds": 7}
        }
        for name, ms in times.items()
    }
    return Record("networks", row, results)


def test_table_shows_ratios_noise_and_worst_first() -> None:
    records = [
        record("good", {PLAIN: 4.0, REFERENCE: 8.0, OWN: 2.0}),
        record("bad", {PLAIN: 4.0, REFERENCE: 16.0, OWN: 6.0}),
    ]
    grid = networks.grid(records)
    at = {title: index for index, title in enumerate(grid.header)}
    assert grid.title == "Networks, tanh-cosine, float32, contiguous"
    assert [cells[at["network"]] for cells in grid.cells] == ["good"] * 3 + ["bad"] * 3
    assert [cells[at["/plain"]] for cells in grid.cells[:3]] == ["1.00", "2.00", "0.50"]
    assert [cells[at["/reference"]] for cells in grid.cells[3:]] == ["0.25", "1.00", "0.38"]
    assert [cells[at["ms"]].endswith("*") for cells in grid.cells[:3]] == [False, True, False]
    worst = networks.grid(records, worst=True)
    assert [cells[at["network"]] for cells in worst.cells] == ["bad"] * 3 + ["good"] * 3
    # What computes something else is worse than what is slow.
    records[0].results[OWN] = {"timing": None, "note": "wrong: logits off by 1.0e+00"}
    worst = networks.grid(records, worst=True)
    assert [cells[at["network"]] for cells in worst.cells] == ["good"] * 3 + ["bad"] * 3
    records.append(record("other", {PLAIN: 1.0}, "ball-cosine"))
    assert networks.grid(records).header[1] == "operator"
