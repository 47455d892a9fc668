"""The choice of a strategy: rule, measurement with a made-up clock, tables, and their wiring."""

from __future__ import annotations

import contextvars
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import check_call
from stand_ins import Recorder, cuda_backend_on_cpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from willing import records_with

import dcconv
from bench.layers import DEFAULT_BATCH, Layer, distinct_layers
from dcconv import backends, functional, native, warn
from dcconv.call import implementations, rule, strategy
from dcconv.call import key as key_module
from dcconv.call.key import (
    DIRECTIONS,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Key,
    key_of,
)
from dcconv.call.measure import stopwatch, tables
from dcconv.operator import numerics
from dcconv.operator.layout import memory_format
from dcconv.passes import backward, library
from dcconv.passes.records import COMPILED, OWN_RULE
from dcconv.triton import fused as triton_fused

GPU = "NVIDIA H100 80GB HBM3"
EVERY = ("library", "fused", "graph")
# The backends that choose by key.
BACKENDS = ("cuda", "triton")


def key_for(layer: Layer, direction: str = FORWARD, **changes: Any) -> Key:
    key = Key(
        "cuda",
        direction,
        GPU,
        "bfloat16",
        "channels_last",
        layer.n,
        layer.size,
        layer.size,
        layer.c,
        layer.o,
        layer.k,
        layer.k,
        (layer.stride,) * 2,
        (layer.padding,) * 4,
        (layer.dilation,) * 2,
        layer.groups,
        "zeros",
    )
    if direction == FORWARD:
        key = key._replace(operator="tanh cosine none", norm="batch", kept="output")
    return key._replace(**changes)


KEY = key_for(Layer(128, 64, 56, 256, 1))


# The rule


def test_rule_over_the_layer_lists() -> None:
    """By hand: the layers that graph gets where every strategy is willing; fused has the others."""
    layers = distinct_layers(DEFAULT_BATCH["cuda"])
    graph = {
        name
        for name, (layer, _) in layers.items()
        if strategy.by_rule(key_for(layer), EVERY) == "graph"
    }
    by_class = {}
    for name, (layer, classes) in layers.items():
        depth = layer.c // layer.groups * layer.k**2
        stem = layer.c <= 4 and layer.groups == 1
        one_pass = (depth <= 600 or layer.k == 1) and not stem
        assert (name in graph) == (not one_pass)
        for class_name in classes:
            by_class.setdefault(class_name, []).append(name in graph)
    # The first stage's 3x3 layers and every 1x1 layer are fused.
    assert [sum(by_class[name]) for name in ("resnet18", "resnet50", "cifar32")] == [6, 7, 6]
    for name in ("depthwise", "grouped"):
        assert not any(by_class[name]), name
    assert all(by_class["dilated"]) and all(by_class["stem"])


@pytest.mark.parametrize(
    ("layer", "forward", "input_gradient", "weight_gradient"),
    [
        (Layer(8, 64, 56, 64, 3), "fused", "fused", "graph"),
        (Layer(8, 64, 56, 128, 3), "fused", "graph", "graph"),
        (Layer(8, 128, 56, 64, 3), "graph", "fused", "graph"),
        (Layer(8, 2048, 7, 512, 1), "fused", "fused", "graph"),
        (Layer(8, 2044, 7, 508, 1), "graph", "fused", "graph"),
        (Layer(8, 3, 224, 64, 7, 2), "graph", "graph", "graph"),
        (Layer(8, 4, 224, 64, 3), "graph", "graph", "graph"),
        (Layer(8, 5, 224, 64, 3), "fused", "fused", "graph"),
        (Layer(8, 96, 56, 96, 7, groups=96), "fused", "fused", "fused"),
        (Layer(8, 256, 28, 256, 3, groups=32), "fused", "fused", "graph"),
        (Layer(8, 512, 7, 512, 3), "graph", "graph", "graph"),
    ],
    ids=str,
)
def test_rule(layer: Layer, forward: str, input_gradient: str, weight_gradient: str) -> None:
    found = [strategy.by_rule(key_for(layer, direction), EVERY) for direction in DIRECTIONS]
    assert found == [forward, input_gradient, weight_gradient]


@pytest.mark.parametrize(
    ("layer", "dtype", "forward"),
    [
        (Layer(8, 72, 56, 128, 3), "float16", "fused"),
        # 2,400 products, and 2,408; no multiples of 8 channels, or filters; groups.
        (Layer(8, 96, 56, 64, 5), "bfloat16", "fused"),
        (Layer(8, 2408, 7, 64, 1), "bfloat16", "fused"),
        (Layer(8, 8, 56, 64, 17), "bfloat16", "fused"),
        (Layer(8, 104, 56, 64, 5), "bfloat16", "library"),
        (Layer(8, 100, 56, 64, 3), "bfloat16", "library"),
        (Layer(8, 128, 56, 68, 3), "bfloat16", "library"),
        (Layer(8, 128, 56, 128, 3), "float32", "library"),
        (Layer(8, 256, 56, 256, 3, groups=2), "bfloat16", "fused"),
        (Layer(8, 28, 56, 28, 11, groups=4), "bfloat16", "library"),
        (Layer(8, 3, 224, 64, 7, 2), "bfloat16", "library"),
    ],
    ids=str,
)
def test_rule_without_a_graph(layer: Layer, dtype: str, forward: str) -> None:
    key = key_for(layer, FORWARD)._replace(dtype=dtype)
    assert strategy.by_rule(key, ("library", "fused")) == forward
    graph = strategy.by_rule(key, EVERY)
    assert graph == ("fused" if layer.k == 1 else "graph")


@pytest.mark.parametrize(
    ("layer", "dtype", "forward", "input_gradient", "weight_gradient"),
    [
        # Depthwise, whatever it multiplies in.
        (Layer(8, 96, 56, 96, 7, groups=96), "float32", "fused", "fused", "fused"),
        (Layer(8, 96, 56, 192, 7, 2, groups=96), "bfloat16", "fused", "fused", "fused"),
        (Layer(8, 1, 28, 32, 5), "float32", "library", "library", "library"),
        # 1x1, however long the sum; strided gradients of the input have no kernel.
        (Layer(8, 2048, 7, 512, 1), "float16", "fused", "fused", "library"),
        (Layer(8, 2044, 7, 509, 1), "bfloat16", "fused", "fused", "library"),
        (Layer(8, 512, 7, 1024, 1, 2), "float16", "fused", "library", "library"),
        (Layer(8, 64, 56, 256, 1), "tf32", "fused", "fused", "library"),
        (Layer(8, 64, 56, 256, 1), "float32", "library", "library", "library"),
        # 256 products and one more: 4 x 64, 1 x 257, 28 x 9, 29 x 9.
        (Layer(8, 64, 56, 64, 2), "bfloat16", "fused", "fused", "library"),
        (Layer(8, 28, 56, 29, 3), "float16", "fused", "library", "library"),
        (Layer(8, 29, 56, 28, 3), "float16", "library", "fused", "library"),
        (Layer(8, 29, 56, 28, 3, 2), "float16", "library", "library", "library"),
        (Layer(8, 28, 56, 28, 3), "tf32", "library", "library", "library"),
        (Layer(8, 3, 224, 64, 7, 2), "bfloat16", "fused", "library", "library"),
        (Layer(8, 3, 224, 64, 7, 2), "tf32", "library", "library", "library"),
        (Layer(8, 512, 7, 512, 3), "bfloat16", "library", "library", "library"),
        # Groups of 16, of 15 on either side, and long ones.
        (Layer(8, 512, 28, 512, 3, groups=32), "bfloat16", "fused", "fused", "library"),
        (Layer(8, 480, 28, 512, 3, groups=32), "bfloat16", "library", "library", "library"),
        (Layer(8, 512, 28, 480, 3, groups=32), "bfloat16", "library", "library", "library"),
        (Layer(8, 64, 56, 64, 1, groups=2), "float16", "fused", "fused", "library"),
        (Layer(8, 64, 56, 64, 1, groups=2), "tf32", "library", "library", "library"),
        (Layer(8, 514, 56, 512, 1, groups=2), "float16", "library", "fused", "library"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_rule_of_triton(
    layer: Layer, dtype: str, forward: str, input_gradient: str, weight_gradient: str, layout: str
) -> None:
    changes = {"backend": "triton", "dtype": dtype, "layout": layout}
    keys = [key_for(layer, direction, **changes) for direction in DIRECTIONS]
    found = [strategy.by_rule(key, ("library", "fused")) for key in keys]
    assert found == [forward, input_gradient, weight_gradient]
    assert [strategy.by_rule(key, ("library",)) for key in keys] == ["library"] * 3
    assert [strategy.by_rule(key, ("fused",)) for key in keys] == ["fused"] * 3


def test_rule_takes_willing_strategies_only_and_needs_no_sizes() -> None:
    large, small = Layer(8, 512, 7, 512, 3), Layer(8, 64, 7, 64, 1)
    assert strategy.by_rule(key_for(large), ("library", "fused")) == "library"
    assert strategy.by_rule(key_for(large), ("fused",)) == "fused"
    assert strategy.by_rule(key_for(small), ("library", "graph")) == "graph"
    assert strategy.by_rule(key_for(small), ("library",)) == "library"
    assert strategy.by_rule(key_for(small, n=None, h=None, w=None), EVERY) == "fused"


def test_library_wins_within_the_margin() -> None:
    assert rule.fastest({"library": 1.0, "fused": 0.981}, EVERY) == "library"
    assert rule.fastest({"library": 1.0, "fused": 0.979}, EVERY) == "fused"
    assert rule.fastest({"library": 1.0, "fused": 0.979, "graph": 0.978}, EVERY) == "graph"
    assert rule.fastest({"library": 1.0, "fused": 0.5}, ("library", "graph")) == "library"
    assert rule.fastest({"fused": 0.5, "graph": 0.5}, EVERY) == "fused"
    assert rule.fastest({"fused": 0.5}, ("library", "graph")) is None


# Keys


def test_text_of_a_key_stays_what_it_is() -> None:
    """Tables on disk have it; a change must change tables.FORMAT as well."""
    assert tables.FORMAT == 3
    layer = Layer(8, 64, 56, 128, 3, stride=2)
    assert [key_for(layer, direction, bias=True).text for direction in DIRECTIONS] == [
        "cuda forward bfloat16 channels_last c64 o128 k3x3 s2x2 p1,1,1,1 d1x1 g1 zeros "
        "tanh cosine none norm=batch kept=output bias",
        "cuda input_gradient bfloat16 channels_last c64 o128 k3x3 s2x2 p1,1,1,1 d1x1 g1 zeros "
        "norm=",
        "cuda weight_gradient bfloat16 channels_last c64 o128 k3x3 s2x2 p1,1,1,1 d1x1 g1 zeros",
    ]


def test_key_of_a_call() -> None:
    x = torch.zeros(2, 8, 9, 7, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.zeros(16, 4, 3, 2, dtype=torch.bfloat16)
    call = {"bias": torch.zeros(16).bfloat16(), "padding": "same", "groups": 2}
    operands, problem, _ = check_call(x, weight, **call, norm_mean="batch", backend="reference")
    forward, grad_x, grad_weight = (
        key_of("triton", operands, problem, "dot", d) for d in DIRECTIONS
    )
    assert forward == Key(
        "triton", "forward", "cpu", "bfloat16", "channels_last", 2, 9, 7, 8, 16, 3, 2, (1, 1),
        (1, 1, 0, 1), (1, 1), 2, "zeros", "tanh cosine none", "batch", "dot", True,
    )  # fmt: skip
    assert grad_x == forward._replace(
        direction=INPUT_GRADIENT, operator="", norm="batch", kept="", bias=False
    )
    assert grad_weight == grad_x._replace(direction=WEIGHT_GRADIENT, norm="")
    assert key_of("cuda", operands, problem, "dot", FORWARD) == forward._replace(backend="cuda")
    detached = key_of("cuda", operands, problem._replace(norm_grad=False), "dot", INPUT_GRADIENT)
    assert detached.norm == "none"


@pytest.mark.parametrize("tf32", [False, True])
def test_key_says_whether_float32_is_multiplied_in_tf32(tf32: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(numerics, "tf32_convolutions", lambda: tf32)
    monkeypatch.setattr(key_module, "_gpu_name", lambda index: GPU)
    with FakeTensorMode():
        for device, dtype, expected in (
            ("cuda:0", torch.float32, "tf32" if tf32 else "float32"),
            ("cuda:0", torch.float16, "float16"),
            ("cuda:0", torch.float64, "float64"),
            ("cpu", torch.float32, "float32"),
        ):
            x = torch.empty(2, 8, 9, 7, dtype=dtype, device=device)
            weight = torch.empty(16, 8, 3, 3, dtype=dtype, device=device)
            operands, problem, _ = check_call(x, weight, backend="reference")
            for backend in BACKENDS:
                key = key_of(backend, operands, problem, "nothing", FORWARD)
                assert key.dtype == expected
                assert key.text.startswith(f"{backend} forward {expected} contiguous c8 o16 ")


def test_times_of_one_backend_and_precision_are_not_those_of_another() -> None:
    keys = [
        KEY._replace(backend=backend, dtype=dtype)
        for backend in BACKENDS
        for dtype in ("float32", "tf32", "bfloat16")
    ]
    times = [{"library": 1.0 + i} for i in range(len(keys))]
    read, _ = tables.from_text(tables.to_text(table_of(*zip(keys, times, strict=True))))
    assert [read.find(key) for key in keys] == times
    assert read.find(KEY._replace(dtype="float16")) == {}


# The list


def test_tiles_of_tritons_fused_pass_are_its_own_or_tuned() -> None:
    for direction, function in (
        (FORWARD, triton_fused.forward),
        (INPUT_GRADIENT, triton_fused.input_gradient),
    ):
        row = implementations.rows["triton", direction]["fused"]
        for benchmark, tile in ((False, OWN_RULE), (True, triton_fused.AUTOTUNED)):
            run = row.run_as(benchmark)
            assert (run.func, run.args, run.keywords) == (function, (), {"tile": tile})
    assert OWN_RULE != triton_fused.AUTOTUNED


def test_passes_of_library_are_the_backends() -> None:
    for backend, namespace in (("cuda", "dcconv"), ("triton", "dcconv_triton")):
        for direction, function in (
            (FORWARD, library.forward),
            (INPUT_GRADIENT, backward.input_gradient),
        ):
            row = implementations.rows[backend, direction]["library"]
            for benchmark in (False, True):
                run = row.run_as(benchmark)
                want = (function, (), {"namespace": namespace})
                assert (run.func, run.args, run.keywords) == want
        assert implementations.backends[backend].namespace == namespace


def test_backends_have_the_strategies_that_the_rule_knows() -> None:
    assert tuple(implementations.backends) == backends.names
    found = {
        backend: [tuple(implementations.rows[backend, direction]) for direction in DIRECTIONS]
        for backend in ("cuda", "triton", "cpu")
    }
    assert found == {
        "cuda": [EVERY] * 3,
        "triton": [("library", "fused")] * 3,
        "cpu": [("library", "fused")] * 3,
    }
    assert EVERY == rule.STRATEGIES
    for row in implementations.IMPLEMENTATIONS:
        assert row.strategy in rule.STRATEGIES and row.direction in DIRECTIONS
        # Benchmark mode changes functions on Triton's fused passes alone.
        tuned = (row.backend.name, row.strategy) == ("triton", "fused")
        tuned = tuned and row.direction != WEIGHT_GRADIENT
        assert (row.run_as(True) != row.run_as(False)) == tuned


def test_every_row_is_found_once() -> None:
    rows = [row for found in implementations.rows.values() for row in found.values()]
    assert sorted(map(id, rows)) == sorted(map(id, implementations.IMPLEMENTATIONS))
    for row in rows:
        assert implementations.backends[row.backend.name] is row.backend
    assert backends.names[-1] == "reference" and not implementations.REFERENCE.devices


# Stopwatch


def test_times_are_medians_of_turns_after_warming_up() -> None:
    calls: list[str] = []
    samples = {"library": iter([9.0, 2.0, 1.0, 3.0, 2.0, 2.0, 50.0]), "fused": iter([1.0] * 7)}

    def watch(run: Callable[[], object]) -> float:
        run()
        return next(samples[calls[-1]])

    runs = {name: lambda name=name: calls.append(name) for name in ("library", "fused")}
    assert stopwatch.compare(runs, watch) == {"library": 2.0, "fused": 1.0}
    warm = stopwatch.WARM_UP
    assert calls == ["library"] * warm + ["fused"] * warm + ["library", "fused"] * stopwatch.ROUNDS


# Tables


def table_of(*entries: tuple[Key, dict[str, float]], device: str = GPU) -> tables.Table:
    table = tables.Table(device)
    for key, times in entries:
        table.add(key, times)
    return table


def test_tables_survive_being_written_and_read() -> None:
    table = table_of(
        (KEY, {"library": 0.5, "fused": 0.25}),
        (KEY._replace(n=8), {"library": 0.125}),
        (key_for(Layer(1, 8, 4, 8, 3)), {"graph": 3.0}),
    )
    text = tables.to_text(table)
    read, head = tables.from_text(text)
    assert (read.device, read.times) == (table.device, table.times)
    assert head == {
        "format": tables.FORMAT,
        "device": GPU,
        "dcconv": dcconv.__version__,
        "torch": torch.__version__,
    }
    assert tables.to_text(read) == text
    empty, _ = tables.from_text(tables.to_text(tables.Table(GPU)))
    assert empty.times == {}


def test_open_sizes_find_the_largest_that_fit() -> None:
    table = table_of(
        (KEY._replace(n=8), {"library": 1.0}),
        (KEY._replace(n=256), {"library": 2.0}),
        (KEY._replace(n=512, h=7, w=7), {"library": 3.0}),
    )
    assert table.find(KEY) == {}
    assert table.find(KEY._replace(n=8)) == {"library": 1.0}
    assert table.find(KEY._replace(n=None)) == {"library": 2.0}
    assert table.find(KEY._replace(n=None, h=7, w=7)) == {"library": 3.0}
    assert table.find(KEY._replace(n=None, h=None, w=None)) == {"library": 2.0}
    assert table.find(KEY._replace(n=None, c=32)) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: "{",
        lambda c: "[1]",
        lambda c: "[" * 10**5,
        lambda c: c | {"format": tables.FORMAT + 1},
        lambda c: c | {"device": 3},
        lambda c: c | {"times": []},
        lambda c: c | {"times": {"x": []}},
        lambda c: c | {"times": {"x": {"1x2": {"library": 1.0}}}},
        lambda c: c | {"times": {"x": {"1x2x3": {"library": "fast"}}}},
        lambda c: c | {"times": {"x": {"1x2x3": {"library": True}}}},
        lambda c: c | {"times": {"x": {"1x2x3": {"library": float("nan")}}}},
        lambda c: c | {"times": {"x": {"1x2x3": {"library": 0}}}},
        lambda c: c | {"times": {"x": {"1x2x3": {"library": 10**400}}}},
    ],
)
def test_damaged_files_are_left_alone_with_one_warning(
    change: Callable[[Any], Any], cache: Path
) -> None:
    content = change(json.loads(tables.to_text(table_of((KEY, {"library": 1.0})))))
    text = content if isinstance(content, str) else json.dumps(content)
    path = cache / tables.file_name(GPU)
    cache.mkdir()
    path.write_text(text)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            found = tables.Cache(GPU)
            found.add(KEY, {"library": 2.0})
            assert found.table.find(KEY) == {"library": 2.0}
    assert "dcconv: cannot read the measured times" in str(warned[0].message)
    assert len(warned) == 1 and str(path) in str(warned[0].message)
    assert warned[0].filename == __file__
    assert path.read_text() == text and os.listdir(cache) == [path.name]
    with pytest.raises(ValueError, match=r"^dcconv: path must be a file of measured times, got "):
        backends.pin_table(path)


def test_file_damaged_after_it_was_read_is_left_alone(cache: Path) -> None:
    found = tables.Cache(GPU)
    found.add(KEY, {"library": 2.0})
    path = cache / tables.file_name(GPU)
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="dcconv: cannot write the measured times"):
        found.add(KEY, {"fused": 1.0})
    assert path.read_text() == "{"
    assert found.table.find(KEY) == {"library": 2.0, "fused": 1.0}


def test_file_of_another_version_is_another_file(cache: Path, monkeypatch: Any) -> None:
    tables.Cache(GPU).add(KEY, {"library": 2.0})
    (first,) = cache.glob("*.json")
    assert first.name == (
        f"NVIDIA-H100-80GB-HBM3-dcconv-{dcconv.__version__}-torch-{torch.__version__}-format-3.json"
    )
    monkeypatch.setattr(tables, "__version__", "99.0")
    renewed = tables.Cache(GPU)
    assert renewed.table.times == {}
    renewed.add(KEY, {"library": 3.0})
    assert len(list(cache.glob("*.json"))) == 2
    # A file under another one's name.
    (cache / tables.file_name(GPU)).write_text(first.read_text())
    with pytest.warns(RuntimeWarning, match="it belongs to another device or version"):
        assert tables.Cache(GPU).table.times == {}


def test_unwritable_folder_warns_once(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("DCCONV_CACHE", str(folder))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = tables.Cache(f"{GPU} {folder.name}")
            for _ in range(2):
                found.add(KEY, {"library": 1.0})
        (warning,) = warned
        assert str(warning.message).startswith("dcconv: cannot ")
        assert found.table.find(KEY) == {"library": 1.0}


def test_folder_of_the_cache(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, shared, expected in (
        ("/own", "/shared", "/own"),
        ("~/own", None, str(tmp_path / "own")),
        (None, "/shared", "/shared/dcconv"),
        ("", "relative", str(tmp_path / ".cache/dcconv")),
        (None, None, str(tmp_path / ".cache/dcconv")),
    ):
        for name, value in (("DCCONV_CACHE", own), ("XDG_CACHE_HOME", shared)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert tables.cache_folder() == Path(expected)


def _add_many(start: int, barrier: Any) -> None:
    cache = tables.Cache(GPU)
    barrier.wait()
    for n in range(start, start + 20):
        cache.add(KEY._replace(n=n), {"library": float(n)})


def test_processes_that_write_at_once_keep_each_others_times(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_add_many, args=(n, barrier)) for n in (1, 101, 201)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    found = tables.Cache(GPU).table
    wanted = {n for start in (1, 101, 201) for n in range(start, start + 20)}
    assert {n for n, _, _ in found.times[KEY.text]} == wanted
    assert not list(cache.glob(".*"))


def test_tables_ship_with_the_package(tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "made_up"
    (package / "tables").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for name, table in (
        ("first", table_of((KEY, {"library": 2.0, "fused": 1.0}))),
        ("other", table_of((KEY, {"library": 9.0}), device="another GPU")),
    ):
        (package / "tables" / f"{name}.json").write_text(tables.to_text(table))
    (package / "tables" / "damaged.json").write_text("{")
    (package / "tables" / "notes.txt").write_text("no table")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="the table damaged.json of this installation"):
        assert tables.shipped(GPU, "made_up").find(KEY) == {"library": 2.0, "fused": 1.0}
    assert tables.shipped("no such GPU", "made_up").times == {}


def test_every_shipped_table_is_readable() -> None:
    folder = Path(dcconv.__file__).parent / "tables"
    for path in folder.glob("*.json"):
        tables.read(path)
    assert tables.shipped(GPU).device == GPU


# Choosing, with fake strategies


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No memory of other tests' choices and warnings."""
    monkeypatch.setattr(warn, "_said", set())
    monkeypatch.setattr(strategy, "_pinned", None)
    strategy.forget()
    yield
    strategy.forget()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCCONV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Clock:
    """A stopwatch that knows how long each strategy takes, and counts what it measured."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.measured: list[str] = []
        self.last = ""

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        self.measured.append(self.last)
        return self.milliseconds[self.last]


class World:
    """A backend's strategies, which compute by the model of library and tell the clock their name.

    A star marks those of the triton backend that stand in where benchmark mode counts.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str = "cuda") -> None:
        self.clock = Clock(library=3.0, fused=2.0, graph=1.0)
        self.refusals: dict[tuple[str, str], str] = {}
        self.ran: list[tuple[str, str]] = []
        self.operands: list[Any] = []
        monkeypatch.setattr(strategy, "stopwatch", self.clock)
        monkeypatch.setattr(strategy, "TIMED_DEVICES", ("cpu",))
        genuine = {
            direction: implementations.rows["cuda", direction]["library"].run
            for direction in DIRECTIONS
        }
        record = implementations.backends[backend]._replace(namespace=COMPILED)
        monkeypatch.setitem(implementations.backends, backend, record)
        for direction in DIRECTIONS:
            fakes = {
                name: row._replace(
                    backend=record,
                    why_not=self.refusing(name, direction),
                    run=self.computing(name, "", direction, genuine[direction]),
                    tuned=self.computing(name, "*", direction, genuine[direction])
                    if backend == "triton"
                    else None,
                )
                for name, row in implementations.rows[backend, direction].items()
            }
            monkeypatch.setitem(implementations.rows, (backend, direction), fakes)

    def computing(
        self, name: str, mark: str, direction: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.clock.last = name
            self.ran.append((name + mark, direction))
            self.operands.append(arguments)
            return function(*arguments)

        return run

    def refusing(self, name: str, direction: str) -> Callable[..., str | None]:
        return lambda operands, problem: self.refusals.get((name, direction))

    def refuse(self, name: str, *directions: str) -> None:
        for direction in directions or DIRECTIONS:
            self.refusals[name, direction] = f"{name} does not want to"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with cuda_backend_on_cpu():
        yield World(monkeypatch)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with cuda_backend_on_cpu():
        records = records_with("triton", lambda call: None)
        # Undone before what the context has changed.
        with pytest.MonkeyPatch.context() as patch, backends.use_backend("triton"):
            patch.setattr(backends, "_BACKENDS", records)
            yield World(monkeypatch, "triton")


def operands(n: int = 2, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(n, 8, 6, 5)
    return {"x": x, "weight": torch.randn(4, 8, 3, 3), "padding": 1} | options


def small_pointwise() -> dict[str, Any]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 4, 5), torch.randn(16, 16, 1, 1)
    return {"x": x.bfloat16(), "weight": weight.bfloat16()}


def run(**call: Any) -> Tensor:
    return functional.decoupled_conv2d(**call)


def test_fastest_strategy_runs_and_is_measured_once(world: World, cache: Path) -> None:
    call = operands()
    with backends.benchmarking():
        first = run(**call)
        assert world.ran[-1] == ("graph", FORWARD)
        assert sorted(world.clock.measured) == sorted(EVERY * stopwatch.ROUNDS)
        world.ran.clear()
        assert torch.equal(run(**call), first)
        assert world.ran == [("graph", FORWARD)]
        # Another process would find the times on disk.
        strategy.forget()
        world.ran.clear()
        run(**call)
        assert world.ran == [("graph", FORWARD)]
    assert len(world.clock.measured) == 3 * stopwatch.ROUNDS
    (path,) = cache.glob("*.json")
    table, _ = tables.read(path)
    ((sizes, times),) = next(iter(table.times.values())).items()
    assert (sizes, times) == ((2, 6, 5), {"library": 3.0, "fused": 2.0, "graph": 1.0})


def test_copies_that_are_measured_have_the_layout_of_the_call(world: World) -> None:
    image = torch.randn(1, 8, 6, 5).to(memory_format=torch.channels_last)
    for x in (image.expand(2, -1, -1, -1), image.contiguous()[:, :, ::2], image[:, :, 1:, ::2]):
        world.operands.clear()
        with backends.benchmarking():
            run(**(operands() | {"x": x}))
        assert len(world.operands) > 3
        for arguments in world.operands:
            measured = arguments[0].x
            assert memory_format(measured) == memory_format(x)
            assert torch.equal(measured, x)


def test_plain_attribute_turns_benchmark_mode_on(world: World) -> None:
    assert backends.benchmark is False
    run(**operands())
    assert not world.clock.measured
    backends.benchmark = True
    try:
        run(**operands())
        with backends.benchmarking(False):
            count = len(world.clock.measured)
            run(**operands(n=3))
            assert len(world.clock.measured) == count > 0
    finally:
        backends.benchmark = False
    assert world.clock.measured
    with pytest.raises(TypeError, match=r"^dcconv: enabled must be"), backends.benchmarking("yes"):
        pass


def test_each_direction_is_measured_for_itself(world: World) -> None:
    world.refuse("graph", INPUT_GRADIENT)
    world.refuse("graph", WEIGHT_GRADIENT)
    world.refuse("fused", WEIGHT_GRADIENT)
    call = operands(norm_mean="batch")
    call["x"].requires_grad_()
    call["weight"].requires_grad_()
    with backends.benchmarking():
        y = run(**call)
        world.ran.clear()
        y.sum().backward()
    # The gradient of the weight is library's own, not asked for by name.
    assert world.ran == [("fused", INPUT_GRADIENT)]
    assert len(world.clock.measured) == (3 + 2) * stopwatch.ROUNDS


def test_measuring_leaves_the_operands_and_the_generators_alone(world: World) -> None:
    call = operands(bias=torch.randn(4), radius=torch.rand(4) + 0.5, norm_mean="batch")
    tensors = {name: t for name, t in call.items() if isinstance(t, Tensor)}
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    for t in tensors.values():
        t.requires_grad_()
    state = torch.get_rng_state()
    with backends.benchmarking():
        run(**call)
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in tensors.items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1] and t.grad is None
    own = {t.untyped_storage().data_ptr() for t in tensors.values()}
    # The last forward is the call itself; those before it are measurements.
    for arguments, (_, direction) in list(zip(world.operands, world.ran, strict=True))[:-1]:
        flat = arguments[0] if direction == FORWARD else arguments
        for t in flat:
            if isinstance(t, Tensor):
                assert t.untyped_storage().data_ptr() not in own and not t.requires_grad


def test_threads_measure_a_key_once(world: World) -> None:
    call = operands()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        run(**call)

    with backends.benchmarking():
        contexts = [contextvars.copy_context() for _ in range(4)]
        threads = [threading.Thread(target=context.run, args=(work,)) for context in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(world.clock.measured) == 3 * stopwatch.ROUNDS


def test_strategy_that_becomes_willing_is_measured(world: World) -> None:
    world.refuse("graph")
    with backends.benchmarking():
        run(**operands())
        assert world.ran[-1] == ("fused", FORWARD)
        world.refusals.clear()
        strategy._choices.clear()
        run(**operands())
        assert world.ran[-1] == ("graph", FORWARD)


def test_only_one_willing_strategy_is_not_measured(world: World, cache: Path) -> None:
    world.refuse("fused")
    world.refuse("graph")
    with backends.benchmarking():
        run(**operands())
    assert world.ran == [("library", FORWARD)] and not world.clock.measured and not cache.exists()


def test_nothing_is_measured_while_a_graph_is_captured(world: World, monkeypatch: Any) -> None:
    capturing = True
    monkeypatch.setattr(strategy, "_may_measure", lambda x: not capturing)
    with backends.benchmarking():
        run(**operands())
        assert world.ran == [("fused", FORWARD)]  # the rule
        capturing = False
        run(**operands())
        assert world.ran[-1] == ("graph", FORWARD)
        capturing = True
        # Now it is known, also to calls that were not made before.
        run(**operands(bias=None))
        assert world.ran[-1] == ("graph", FORWARD)
    assert len(world.clock.measured) == 3 * stopwatch.ROUNDS


def test_may_measure(monkeypatch: Any) -> None:
    x = torch.zeros(1)
    assert strategy._may_measure(x)
    with Recorder():
        assert not strategy._may_measure(x)
    with FakeTensorMode():
        assert not strategy._may_measure(x)

    class OnGpu:
        is_cuda, device = True, "cuda:3"

    entered = []

    @contextmanager
    def on(device: str) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    for captured in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=captured: c)
        assert strategy._may_measure(OnGpu()) is not captured
    assert entered == ["cuda:3"] * 2


def test_nothing_is_measured_while_tracing(world: World) -> None:
    module = dcconv.DecoupledConv2d(8, 4, 3, padding=1).eval()

    def compiled(n: int, dynamic: bool | None) -> str:
        torch._dynamo.reset()
        world.ran.clear()
        with torch.no_grad():
            call = torch.compile(module, fullgraph=True, backend="eager", dynamic=dynamic)
            call(operands(n)["x"])
        return world.ran[0][0]

    with backends.benchmarking():
        assert compiled(2, None) == "fused"
        assert not world.clock.measured
        for n, fast in ((2, "graph"), (3, "library")):
            world.clock.milliseconds = dict.fromkeys(EVERY, 3.0) | {fast: 1.0}
            with torch.no_grad():
                module(operands(n)["x"])
        count = len(world.clock.measured)
        assert [compiled(2, None), compiled(3, None)] == ["graph", "library"]
        # A batch that is open: the largest one that was measured.
        assert compiled(2, True) == "library"
        assert len(world.clock.measured) == count
    assert compiled(2, None) == "fused"


def test_fake_tensors_follow_the_rule(world: World) -> None:
    with backends.benchmarking(), FakeTensorMode():
        y = run(**operands())
    assert y.shape == (2, 4, 6, 5) and world.ran == [("fused", FORWARD)]


def test_deterministic_mode_follows_the_rule_unless_a_table_is_pinned(
    world: World, cache: Path
) -> None:
    with backends.benchmarking():
        run(**operands())
        assert world.ran[-1] == ("graph", FORWARD)
        torch.use_deterministic_algorithms(True)
        try:
            run(**operands())
            assert world.ran[-1] == ("fused", FORWARD)
            backends.pin_table(next(cache.glob("*.json")))
            run(**operands())
            assert world.ran[-1] == ("graph", FORWARD)
        finally:
            torch.use_deterministic_algorithms(False)


def test_pinned_table_is_the_only_one(world: World, tmp_path: Path) -> None:
    x = operands()["x"]
    checked, problem, _ = check_call(**operands())
    key = key_of("cuda", checked, problem, "nothing", FORWARD)
    path = tmp_path / "pinned.json"
    path.write_text(
        tables.to_text(table_of((key, {"library": 1.0, "fused": 5.0, "graph": 5.0}), device="cpu"))
    )
    content = path.read_bytes()
    with backends.benchmarking():
        backends.pin_table(str(path))
        run(**operands())
        assert world.ran == [("library", FORWARD)]
        run(**operands(n=3))
        assert world.ran[-1] == ("fused", FORWARD)  # no entry: the rule
        assert not world.clock.measured
        backends.pin_table(None)
        run(**operands())
        assert world.ran[-1] == ("graph", FORWARD) and x.shape[0] == 2
    assert path.read_bytes() == content
    path.write_text(tables.to_text(table_of((key, {"library": 1.0, "fused": 5.0}), device=GPU)))
    backends.pin_table(path)
    world.ran.clear()
    run(**operands())
    assert world.ran == [("fused", FORWARD)]  # a table of another device


def test_choices_made_while_a_table_is_pinned_are_not_remembered(
    world: World, tmp_path: Path, monkeypatch: Any
) -> None:
    """As by another thread, between a choice and its entry in the memory."""
    checked, problem, _ = check_call(**operands())
    key = key_of("cuda", checked, problem, "nothing", FORWARD)
    path = tmp_path / "pinned.json"
    path.write_text(tables.to_text(table_of((key, {"library": 1.0, "fused": 5.0}), device="cpu")))
    genuine = strategy._choose

    def overtaken(*arguments: Any) -> Any:
        chosen = genuine(*arguments)
        backends.pin_table(path)
        return chosen

    monkeypatch.setattr(strategy, "_choose", overtaken)
    run(**operands())
    monkeypatch.setattr(strategy, "_choose", genuine)
    run(**operands())
    assert world.ran == [("fused", FORWARD), ("library", FORWARD)]


def test_table_that_is_unpinned_meanwhile_is_read_to_the_end(
    world: World, monkeypatch: Any
) -> None:
    """As by another thread, between two looks at it."""
    checked, problem, _ = check_call(**operands())
    key = key_of("cuda", checked, problem, "nothing", FORWARD)

    class Unpinned(tables.Table):
        def __getattribute__(self, name: str) -> Any:
            strategy._pinned = None
            return super().__getattribute__(name)

    table = Unpinned("cpu")
    table.add(key, {"library": 1.0, "fused": 5.0})
    monkeypatch.setattr(strategy, "_pinned", table)
    run(**operands())
    assert world.ran == [("library", FORWARD)]


def test_strategies_allowed_meanwhile_are_not_remembered_for_others(
    world: World, monkeypatch: Any
) -> None:
    """As by another thread that enters ``backends.strategies`` while this one chooses."""
    genuine = strategy._willing

    def overtaken(*arguments: Any) -> Any:
        with backends.strategies("library"):
            return genuine(*arguments)

    monkeypatch.setattr(strategy, "_willing", overtaken)
    run(**operands())
    monkeypatch.setattr(strategy, "_willing", genuine)
    run(**operands())
    assert world.ran == [("fused", FORWARD)] * 2


def test_shipped_times_come_before_the_rule_and_after_measurements(
    world: World, monkeypatch: Any
) -> None:
    checked, problem, _ = check_call(**operands())
    key = key_of("cuda", checked, problem, "nothing", FORWARD)
    table = table_of((key, {"library": 1.0, "fused": 5.0}), device="cpu")
    monkeypatch.setattr(strategy, "shipped", lambda device: table)
    run(**operands())
    assert world.ran == [("library", FORWARD)]
    with backends.benchmarking():
        run(**operands())
    assert world.ran[-1] == ("graph", FORWARD)
    world.refuse("library")
    world.refuse("fused")
    run(**operands())
    assert world.ran[-1] == ("library", FORWARD)  # remembered: predicates are static
    strategy._choices.clear()
    run(**operands())
    assert world.ran[-1] == ("graph", FORWARD)


def test_too_little_memory_leaves_the_choice_to_the_rule(world: World, monkeypatch: Any) -> None:
    def full(run: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(strategy, "stopwatch", full)
    with backends.benchmarking():
        with pytest.warns(RuntimeWarning, match=r"dcconv: too little memory to measure .*c8 o4 k3"):
            run(**operands())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(**operands())
    assert world.ran[-1] == ("fused", FORWARD)


def test_errors_of_a_measured_strategy_are_not_swallowed(world: World, monkeypatch: Any) -> None:
    def broken(run: Callable[[], object]) -> float:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(strategy, "stopwatch", broken)
    with backends.benchmarking(), pytest.raises(RuntimeError, match="a kernel failed"):
        run(**operands())


def test_allowed_strategies(world: World) -> None:
    for names, strategy_name in (
        ("library", "library"),
        ("library,fused", "fused"),
        (" graph , library ", "graph"),
        ("fused", "fused"),
    ):
        with backends.strategies(names):
            run(**operands())
        assert world.ran[-1] == (strategy_name, FORWARD), names
    world.refuse("graph")
    with backends.strategies("graph"), pytest.raises(NotImplementedError) as error:
        run(**operands(padding=0))
    assert str(error.value) == (
        "dcconv: no allowed strategy runs the forward of this call: graph: graph does not want to"
    )
    with backends.strategies("fused", input_gradient="graph"):
        run(**operands())  # no gradient is wanted
        call = operands()
        call["x"].requires_grad_()
        with pytest.raises(
            NotImplementedError, match="runs the input_gradient of this call: graph: "
        ):
            run(**call)


def test_gradients_fall_to_library_unless_they_are_named(world: World) -> None:
    world.refuse("fused", INPUT_GRADIENT, WEIGHT_GRADIENT)
    call = operands()
    call["x"].requires_grad_()
    with backends.strategies("fused"):
        run(**call).sum().backward()
    assert world.ran == [("fused", FORWARD)]


@pytest.mark.parametrize("names", ["", "C", "library,", "library fused", None, ("library",)])
def test_unknown_strategies_are_refused(names: Any) -> None:
    message = "^dcconv: names must be names out of library, fused, graph, joined by commas, got "
    with pytest.raises(ValueError, match=message), backends.strategies(names):
        pass
    message = message.replace("names must", "weight_gradient must", 1)
    if names is not None:
        with (
            pytest.raises(ValueError, match=message),
            backends.strategies("library", weight_gradient=names),
        ):
            pass


def test_environment_names_the_allowed_strategies(world: World, monkeypatch: Any) -> None:
    code = "from dcconv.call import strategy; print(strategy._allowed.names)"
    environ = os.environ | {"DCCONV_STRATEGIES": "fused,library"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True
    )
    assert done.stdout == "fused,library\n"
    monkeypatch.setattr(strategy, "_allowed", strategy.Allowed("X"))
    message = (
        "^dcconv: DCCONV_STRATEGIES must be names out of library, fused, graph, joined by commas, "
        "got 'X'$"
    )
    with pytest.raises(ValueError, match=message):
        run(**operands())


def test_old_names_work_with_one_warning(world: World) -> None:
    new = "library (A), fused (B), graph (G)"
    for use, said in (
        (backends.strategies, f"dcconv: the strategies are named {new}; a later release"),
        (
            backends.plans,
            f"dcconv: backends.plans is named backends.strategies, and its plans {new}",
        ),
    ):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for names, want, name in (
                ("A", "library", "library"),
                ("B, A", "fused,library", "fused"),
                ("graph,A", "graph,library", "graph"),
            ):
                with use(names, input_gradient="A"):
                    run(**operands())
                    assert strategy._setting() == strategy.Allowed(want, "library")
                assert world.ran[-1] == (name, FORWARD)
        (warning,) = warned
        assert str(warning.message).startswith(said) and warning.filename == __file__
    message = (
        "^dcconv: names must be names out of library, fused, graph, joined by commas, got 'C'$"
    )
    with pytest.raises(ValueError, match=message), backends.plans("C"):
        pass


@pytest.mark.parametrize(
    ("variables", "allowed", "warned"),
    [
        ({"DCCONV_STRATEGIES": "library"}, "library", 0),
        ({"DCCONV_STRATEGIES": "B,A"}, "fused,library", 1),
        ({"DCCONV_PLANS": "A"}, "library", 1),
        ({"DCCONV_PLANS": "A", "DCCONV_STRATEGIES": ""}, "library", 1),
        ({"DCCONV_PLANS": "A", "DCCONV_STRATEGIES": "fused"}, "fused", 0),
    ],
)
def test_old_variable_works_with_one_warning(
    variables: dict[str, str], allowed: str, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DCCONV_PLANS", "DCCONV_STRATEGIES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    variable, setting = strategy._of_environment()
    monkeypatch.setattr(strategy, "_variable", variable)
    monkeypatch.setattr(strategy, "_allowed", setting)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            assert ",".join(strategy._allowed_names(FORWARD, setting)) == allowed
    assert len(found) == warned
    if variable == "DCCONV_PLANS":
        said = "dcconv: DCCONV_PLANS is named DCCONV_STRATEGIES, and its plans library (A), "
        assert str(found[0].message).startswith(said)


def test_triton_has_no_graph(triton: World) -> None:
    for names, strategy_name in (
        ("library", "library"),
        ("library,fused,graph", "fused"),
        ("fused", "fused"),
        ("graph,library", "library"),
    ):
        with backends.strategies(names):
            run(**small_pointwise())
        assert triton.ran[-1] == (strategy_name, FORWARD), names
    sentence = (
        "dcconv: no allowed strategy runs the %s of this call: "
        "graph: the triton backend has no strategy graph"
    )
    with backends.strategies("graph"), pytest.raises(NotImplementedError) as error:
        run(**small_pointwise())
    assert str(error.value) == sentence % FORWARD
    call = small_pointwise()
    call["weight"].requires_grad_()
    with (
        backends.strategies("library", weight_gradient="graph"),
        pytest.raises(NotImplementedError) as error,
    ):
        run(**call)
    assert str(error.value) == sentence % WEIGHT_GRADIENT
    with backends.strategies("graph"):
        text = backends.report(**call)
    assert (
        "triton    runs this call\n    forward: no allowed strategy runs it\n"
        "      library  not allowed" in text
    )


def test_benchmark_mode_times_and_runs_tuned_tiles_on_triton(triton: World, cache: Path) -> None:
    call = small_pointwise()
    for name in ("x", "weight"):
        call[name].requires_grad_()
    triton.clock.milliseconds = {"library": 3.0, "fused": 2.0}
    with backends.benchmarking():
        y = run(**call)
        assert {name for name, _ in triton.ran} == {"library*", "fused*"}
        assert sorted(triton.clock.measured) == ["fused"] * 21 + ["library"] * 21
        triton.ran.clear()
        y.sum().backward()
        assert triton.ran == [("fused*", WEIGHT_GRADIENT), ("fused*", INPUT_GRADIENT)]
    table, _ = tables.read(next(cache.glob("*.json")))
    assert [text.split()[:2] for text in sorted(table.times)] == [
        ["triton", d] for d in sorted(DIRECTIONS)
    ]
    # Without the mode: neither what it measured nor its tiles.
    triton.ran.clear()
    run(**call).sum().backward()
    assert triton.ran == [("fused", FORWARD), ("fused", INPUT_GRADIENT)]
    # Where the mode does not count: a pinned table, or algorithms that repeat.
    with backends.benchmarking():
        backends.pin_table(next(cache.glob("*.json")))
        triton.ran.clear()
        run(**call)
        assert triton.ran == [("fused", FORWARD)]
        backends.pin_table(None)
        torch.use_deterministic_algorithms(True)
        try:
            run(**call)
        finally:
            torch.use_deterministic_algorithms(False)
        assert triton.ran == [("fused", FORWARD)] * 2
        run(**call)
        assert triton.ran[-1] == ("fused*", FORWARD)
    assert len(triton.clock.measured) == 42


def test_compiled_code_has_the_tiles_of_the_mode(triton: World) -> None:
    module = dcconv.DecoupledConv2d(16, 16, 1).bfloat16().eval()
    x = small_pointwise()["x"]

    def compiled() -> list[tuple[str, str]]:
        torch._dynamo.reset()
        triton.ran.clear()
        with torch.no_grad():
            torch.compile(module, fullgraph=True, backend="eager")(x)
        return triton.ran

    assert compiled() == [("fused", FORWARD)]
    with backends.benchmarking():
        assert compiled() == [("fused*", FORWARD)]
        torch.use_deterministic_algorithms(True)
        try:
            assert compiled() == [("fused", FORWARD)]
        finally:
            torch.use_deterministic_algorithms(False)
    assert not triton.clock.measured


def test_one_backends_times_choose_nothing_on_the_other(triton: World) -> None:
    with backends.benchmarking():
        run(**small_pointwise())
        assert len(triton.clock.measured) == 14
        (key,) = strategy._caches["cpu"].table.times
    assert key.startswith("triton forward bfloat16 ")
    _, problem, _ = check_call(**small_pointwise())
    checked = check_call(**small_pointwise())[0]
    for backend, source in (("triton", strategy.MEASURED), ("cuda", "by rule")):
        found = key_of(backend, checked, problem, "nothing", FORWARD)
        assert strategy.decide(found, ("library", "fused"), benchmark=True).source == source


def test_choices_of_one_backend_are_not_taken_for_the_other(triton: World) -> None:
    with backends.strategies("library"):
        first = run(**small_pointwise())
        second = run(**small_pointwise(), backend="cuda")
        assert torch.equal(run(**small_pointwise()), first) and torch.equal(first, second)
    assert triton.ran == [("library", FORWARD)] * 2 and len(strategy._choices) == 2


@pytest.mark.parametrize(("name", "namespace"), [("cuda", "dcconv"), ("triton", "dcconv_triton")])
def test_passes_around_a_choice_are_the_backends(
    name: str, namespace: str, monkeypatch: Any
) -> None:
    """Those of backward, and those that make the operands of a measured gradient."""
    checked, problem, _ = check_call(**small_pointwise(), backend="reference")
    with backends.strategies("library"):
        chosen = strategy.choose(name, checked, problem, "output", 0, False)
    assert chosen.namespace == namespace
    seen = []

    def forward(*arguments: Any, namespace: str) -> tuple[Tensor, ...]:
        seen.append((*arguments[3:], namespace))
        return (torch.zeros(1),) * 5

    monkeypatch.setattr(library, "forward", forward)
    question = strategy.Question(name, checked, problem, "output", False, strategy.EVERY)
    assert list(strategy._runs(question, INPUT_GRADIENT, ("library",))) == ["library"]
    assert seen == [(namespace,)]


def test_interpreted_kernels_are_not_timed(triton: World, monkeypatch: Any, cache: Path) -> None:
    """On CPU tensors, which only Triton's interpreter takes, benchmark mode is off."""
    monkeypatch.setattr(strategy, "TIMED_DEVICES", ("cuda",))
    with backends.benchmarking():
        run(**small_pointwise())
        text = backends.report(**small_pointwise())
    assert triton.ran == [("fused", FORWARD)] and not triton.clock.measured and not cache.exists()
    assert "forward: fused (one pass; by rule)" in text


def test_report_names_tritons_strategy(triton: World) -> None:
    triton.refuse("fused", WEIGHT_GRADIENT)
    lines = backends.report(**small_pointwise()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[0] == "triton")
    assert lines[start : start + 11] == [
        "  triton    runs this call",
        "    forward: fused (one pass; by rule)",
        "      library  not measured",
        "      fused    not measured",
        "    input gradient: fused (one pass; by rule)",
        "      library  not measured",
        "      fused    not measured",
        "    weight gradient: library (library convolution and fused passes; the only one willing)",
        "      library  not measured",
        "      fused    fused does not want to",
        f"  cpu       could run it ({native.cpu_instructions()})",
    ]
    call = small_pointwise() | {"weight": torch.randn(16, 16, 3, 3).bfloat16()}
    text = backends.report(**call, padding=1)
    assert "    forward: fused (one pass; by rule)" in text
    wide = torch.randn(2, 64, 4, 5).bfloat16()
    text = backends.report(wide, torch.randn(16, 64, 3, 3).bfloat16())
    assert "    forward: library (library convolution and fused passes; by rule)" in text
    assert not triton.clock.measured


def test_report_has_choices_refusals_and_times(world: World) -> None:
    world.refuse("graph")
    world.refuse("fused", WEIGHT_GRADIENT)
    call = operands()
    lines = backends.report(**call).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[0] == "cuda")
    assert lines[start : start + 13] == [
        "  cuda      runs this call",
        "    forward: fused (one pass; by rule)",
        "      library  not measured",
        "      fused    not measured",
        "      graph    graph does not want to",
        "    input gradient: fused (one pass; by rule)",
        "      library  not measured",
        "      fused    not measured",
        "      graph    graph does not want to",
        "    weight gradient: library (library convolution and fused passes; the only one willing)",
        "      library  not measured",
        "      fused    fused does not want to",
        "      graph    graph does not want to",
    ]
    assert not world.clock.measured
    call["x"].requires_grad_()
    with backends.benchmarking():
        run(**call)
        text = backends.report(**call)
    assert (
        "forward: fused (one pass; measured here)\n      library  3.000 ms\n      fused    2.000 ms"
        in text
    )
    with backends.strategies("graph"):
        text = backends.report(**call)
    assert (
        "forward: no allowed strategy runs it\n      library  not allowed (backends.strategies"
        in text
    )
    assert "input gradient: library" in text


def test_ever_new_sizes_are_measured_only_so_often(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(strategy, "MOST_SIZES", 2)
    with backends.benchmarking():
        for n, strategy_name in ((1, "graph"), (2, "graph"), (3, "fused"), (2, "graph")):
            run(**operands(n))
            assert world.ran[-1] == (strategy_name, FORWARD)
        assert len(world.clock.measured) == 2 * 3 * stopwatch.ROUNDS
        # Of another kind of call there are none yet.
        run(**operands(3, stride=2))
        assert world.ran[-1] == ("graph", FORWARD)


def test_choices_are_forgotten_when_there_are_too_many(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(strategy, "_MOST_CHOICES", 3)
    for n in range(1, 9):
        run(**operands(n))
        assert len(strategy._choices) <= 3


def test_choice_follows_every_fact_of_the_tensors(world: World) -> None:
    """Strides are no part of a key of tables, but predicates see them; addresses nobody sees."""
    call = operands()
    x = call["x"]
    shifted = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    for t in (x, shifted, x.to(memory_format=torch.channels_last), x.double()):
        run(**(call | {"x": t, "weight": call["weight"].to(t.dtype)}))
    assert len(strategy._choices) == 3
