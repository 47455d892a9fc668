"""Out of memory is one sentence of the class that PyTorch has for it, and prints no stack."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dcconv import backends, native
from dcconv.call import implementations, runner, strategy
from dcconv.functional import decoupled_conv2d, patch_norm
from dcconv.operator.records import Operands, Problem

needs_library = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def expanded(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of these sizes that take the memory of one."""
    return torch.zeros(1, 1, 1, 1, dtype=dtype).expand(*sizes)


# Each wants 2^39 elements or more, which no machine has, inside an op: a batch of one image with
# such strides would be copied by PyTorch before.
CALLS: dict[str, Callable[[], object]] = {
    "one pass": lambda: decoupled_conv2d(torch.zeros(1, 1, 2**10, 2**10), expanded(2**20, 1, 1, 1)),
    "passes": lambda: decoupled_conv2d(
        torch.zeros(1, 2, 2**10, 2**10, dtype=torch.bfloat16),
        expanded(2**20, 1, 1, 1, dtype=torch.bfloat16),
        groups=2,
    ),
    "norm-free": lambda: decoupled_conv2d(
        torch.zeros(1, 1, 2**10, 2**10), expanded(2**20, 1, 1, 1), magnitude="linear"
    ),
    "depthwise": lambda: decoupled_conv2d(
        expanded(2, 2**10, 2**15, 2**15), torch.zeros(2**10, 1, 1, 1), groups=2**10
    ),
    "norms": lambda: patch_norm(expanded(2, 2, 2**20, 2**20), 1),
    "padding": lambda: decoupled_conv2d(
        torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1), padding=(2**20, 2**17)
    ),
}


@needs_library
@pytest.mark.parametrize("name", CALLS)
def test_it_is_one_sentence(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as own:
        torch.empty(2**50)
    with backends.use_backend("cpu"), pytest.raises(type(own.value)) as caught:
        CALLS[name]()
    # Words that others look for to take a smaller batch.
    assert re.fullmatch(
        r"dcconv: DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes\."
        r"( Error code 12 \(Cannot allocate memory\))?",
        str(caught.value),
    ), str(caught.value)
    assert type(caught.value) is type(own.value)
    assert capfd.readouterr().err == ""


def test_a_gpu_has_a_class_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes through C++ loses its class: forward, with gradients or without, and backward."""
    text = "dcconv: CUDA out of memory. Tried to allocate 2.00 GiB."

    def full(*arguments: object) -> None:
        raise RuntimeError(text)

    x, weight = torch.zeros(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
    learned = x.clone().requires_grad_()
    out_of_memory = pytest.raises(torch.OutOfMemoryError, match=f"^{re.escape(text)}$")
    chosen = SimpleNamespace(forward=full)
    monkeypatch.setattr(strategy, "choose", lambda *arguments: chosen)
    composed = runner.runner(implementations.backends["triton"], lambda: False)
    for image in (x, learned):
        with out_of_memory:
            composed.conv2d(Operands(image, weight, *[None] * 4), Problem(), "nothing", None)
    if not native.missing:
        y = decoupled_conv2d(learned, weight, backend="cpu")
        monkeypatch.setattr(native, "conv2d_arguments", full)
        with out_of_memory:
            y.sum().backward()
        for image in (x, learned):
            with out_of_memory:
                decoupled_conv2d(image, weight, backend="cpu")
    other = RuntimeError("dcconv: groups must divide the 4 channels of x, got 3")
    assert native.as_pytorch(other) is other


def test_no_message_of_compiled_code_names_a_file_of_the_build() -> None:
    """PyTorch's own checks begin with file and line, and its own wrappers print a stack."""
    checks = re.compile(
        r"\b((STD_)?TORCH_CHECK|STD_CUDA_(KERNEL_LAUNCH_)?CHECK|(STABLE_)?TORCH_ERROR_CODE_CHECK)\s*\("
        r"|torch::stable::(empty|empty_like|fill_|pad|parallel_for|new_empty|clone)\("
        r"|__FILE__"
    )
    sources = [path for path in CSRC.rglob("*") if path.is_file()]
    assert len(sources) > 50
    found = [
        f"{path.relative_to(CSRC)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if checks.search(line)
    ]
    assert found == []
