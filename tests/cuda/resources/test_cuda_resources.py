"""The compile gate: what the built library's kernels use, and that the gate sees a spill."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_resources as gate
import pytest
from build_script import setup

from dcconv import native

missing_tools = gate.why_not()
cuda_home = setup.find_cuda_home(os.environ, setup.usual_cuda_homes())

needs_tools = pytest.mark.skipif(missing_tools is not None, reason=str(missing_tools))
needs_nvcc = pytest.mark.skipif(cuda_home is None, reason="no CUDA toolkit was found")

# Tensor cores with all that belongs to them; the same without ldmatrix and with an array indexed at
# run time. A kernel without faults; one whose 64 live values cannot be in 32 registers; an array
# indexed at run time; CUDA's own sine of a double; 16-byte accesses promised and not made.
SOURCE = """
#include <cuda_bf16.h>

#include "cuda/support/tensor_core.cuh"

namespace dcconv {
namespace {

template <class T, bool all>
__global__ void implicit_gemm_kernel(const uint4* x, float* y, int n) {
  __shared__ uint4 rows[32];
  cuda::copy_async(rows + threadIdx.x, x + threadIdx.x, n > 3);
  cuda::commit_async();
  cuda::wait_async<0>();
  __syncwarp();
  uint32_t a[4] = {1, 2, 3, rows[n].x}, b[2] = {4, 5};
  if (all) cuda::load_matrix_x4(a, rows + threadIdx.x);
  float d[4] = {};
  cuda::mma(d, a, b, T{});
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = d[i % 4] + y[i];
  if (!all) v[n] = 1.0f;
  for (int i = 0; i < 16; ++i) y[threadIdx.x * 16 + i] = v[all ? i : (i + n) % 16];
}

template <class T, int V, bool both>
__global__ void copy_kernel(const T* x, T* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (both) {
    reinterpret_cast<int4*>(y)[i] = reinterpret_cast<const int4*>(x)[i];
  } else {
    y[i] = x[i];
  }
}
template __global__ void copy_kernel<__nv_bfloat16, 8, true>(
    const __nv_bfloat16*, __nv_bfloat16*);
template __global__ void copy_kernel<float, 4, false>(const float*, float*);

__global__ void __launch_bounds__(1024, 2) spill_kernel(const float* x, float* y, int n) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7 + 3) % 64] + x[k];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = v[i];
}

__global__ void index_kernel(const float* x, float* y, int n) {
  __shared__ float tile[33];
  float v[16];
  for (int i = 0; i < 16; ++i) v[i] = x[i] + y[i];
  v[n] = 1.0f;
  tile[threadIdx.x] = v[n ^ 3];
  __syncthreads();
  for (int i = 0; i < 16; ++i) y[i * n + threadIdx.x] = v[(i + n) % 16] * tile[n];
}

__global__ void sine_kernel(const double* x, double* y) { y[threadIdx.x] = sin(x[threadIdx.x]); }

}  // namespace
}  // namespace dcconv

extern "C" const void* every_kernel[] = {
    (const void*)dcconv::implicit_gemm_kernel<dcconv::BFloat16, true>,
    (const void*)dcconv::implicit_gemm_kernel<dcconv::Half, false>,
    (const void*)dcconv::copy_kernel<__nv_bfloat16, 8, true>,
    (const void*)dcconv::copy_kernel<float, 4, false>,
    (const void*)dcconv::spill_kernel,
    (const void*)dcconv::index_kernel,
    (const void*)dcconv::sine_kernel,
};
"""


@pytest.fixture(scope="module")
def sample() -> Path:
    """A library of faulty kernels for sm_80 and sm_90a, with PTX of sm_90, compiled once."""
    headers = sorted((gate.ROOT / "csrc").rglob("*.*h"))
    recipe = [SOURCE, Path(__file__).read_text(), setup.ask_nvcc(cuda_home, "--version")]
    recipe += [header.read_text() for header in headers]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:20]
    gate.CACHE.mkdir(parents=True, exist_ok=True)
    library = gate.CACHE / f"kernels-{digest}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=gate.CACHE) as folder:
                os.replace(compiled(Path(folder)), library)
    return library


def compiled(folder: Path) -> Path:
    (folder / "kernels.cu").write_text(SOURCE)
    codes = ("80,code=sm_80", "90a,code=sm_90a", "90,code=compute_90")
    command = [str(cuda_home / "bin/nvcc"), "-shared", "-std=c++17", "-Xcompiler=-fPIC"]
    command += [f"-I{gate.ROOT / 'csrc'}", "-o", "kernels.so"]
    command += [f"-gencode=arch=compute_{code}" for code in codes]
    subprocess.run([*command, "kernels.cu"], cwd=folder, check=True, capture_output=True)
    return folder / "kernels.so"


@pytest.fixture(scope="module")
def found(sample: Path) -> gate.Resources:
    return gate.read_once(sample)


@needs_tools
@needs_nvcc
def test_what_is_kept_is_what_was_read(
    sample: Path, found: gate.Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(gate, "CACHE", tmp_path / "kept")
    monkeypatch.setattr(gate, "read", lambda library: calls.append(library) or found)
    assert gate.read_once(sample) == gate.read_once(sample) == found
    assert calls == [sample]
    # Another library by its contents, whatever its name.
    other = tmp_path / sample.name
    other.write_bytes(sample.read_bytes() + b"\0")
    assert gate.read_once(other) == found
    assert calls == [sample, other]


@needs_tools
@needs_nvcc
def test_spills_and_stack_arrays_are_seen(found: gate.Resources) -> None:
    assert found.archs == ["sm_80", "sm_90a"] and found.ptx == ["sm_90"]
    assert found.usage["spill"]["sm_80"].stack > 0
    assert found.usage["spill"]["sm_80"].registers <= 32
    assert found.usage["index"]["sm_80"].stack >= 64
    assert found.usage["copy<bfloat16, 8, true>"]["sm_80"].stack == 0
    problems = gate.broken_rules(found)
    for kernel in ("spill", "index"):
        assert any(p.startswith(f"{kernel} must not spill") for p in problems)
    assert not any(p.startswith(("copy<bfloat16", "sine")) for p in problems)
    assert found.usage["sine(double)"]["sm_80"].stack > 0


@needs_tools
@needs_nvcc
def test_system_shared_memory_is_not_the_kernels(found: gate.Resources) -> None:
    assert [found.usage["index"][arch].shared for arch in found.archs] == [132, 132]
    assert [found.usage["spill"][arch].shared for arch in found.archs] == [0, 0]


@needs_tools
@needs_nvcc
def test_access_widths_come_from_the_machine_code(found: gate.Resources) -> None:
    assert found.widths["copy<bfloat16, 8, true>"] == (128, 128)
    assert found.widths["copy<float, 4, false>"] == (32, 32)
    assert "copy<float, 4, false> must access memory 128 bits at a time, got 32" in (
        gate.broken_rules(found)
    )


@needs_tools
@needs_nvcc
def test_tensor_core_kernels_are_held_to_their_instructions(found: gate.Resources) -> None:
    assert found.instructions["implicit_gemm<bfloat16, true>"] == gate.REQUIRED.keys()
    assert found.widths["implicit_gemm<bfloat16, true>"].load == 128
    problems = [p for p in gate.broken_rules(found) if p.startswith("implicit_gemm<")]
    name = "implicit_gemm<float16, false>"
    assert {p for p in problems if "stack" not in p} == {
        f"{name} must use ldmatrix, got no LDSM",
        f"{name} must not use local memory, got LDL",
        f"{name} must not use local memory, got STL",
    }


SASS = """
	code for sm_80
		Function : gemm
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/  IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
  /* 0x000fe400078e00ff */
        /*0010*/  @!P0 LDGSTS.E.BYPASS.128 [R13], [R10.64], P0 ;  /* 0x000000000a0d7fae */
        /*0020*/  LDGDEPBAR ;  /* 0x00000000000079af */
        /*0030*/  LDSM.16.MT88.4 R12, [R5+0x8000] ;  /* 0x000000000505783b */
        /*0040*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  /* 0x0000000c0804723c */
        /*0050*/  STG.E desc[UR4][R2.64], R4 ;  /* 0x0000000402007986 */
		Function : other
        /*0000*/  EXIT ;  /* 0x000000000000794d */
"""


@pytest.mark.parametrize(
    ("line", "change", "problem"),
    [
        ("HMMA.16816.F32.BF16", "FFMA", "must use mma.sync, got no HMMA"),
        ("LDGSTS.E.BYPASS.128", "LDG.E.128", "must use cp.async, got no LDGSTS"),
        ("LDSM.16.MT88.4", "LDS.128", "must use ldmatrix, got no LDSM"),
        ("LDGDEPBAR", "STL.64 [R1], R2", "must not use local memory, got STL"),
        ("LDGDEPBAR", "@P1 LDL R2, [R1]", "must not use local memory, got LDL"),
    ],
)
def test_each_instruction_of_a_tensor_core_kernel_counts(
    line: str, change: str, problem: str
) -> None:
    def problems(sass: str) -> list[str]:
        found = gate.parse_instructions(sass)
        assert found["other"] == frozenset()
        name = "implicit_gemm<float16, 8>"
        usage = {name: {"sm_80": gate.Usage(90, 0, 0)}}
        widths = {name: gate.Widths(128, 128)}
        resources = GOOD._replace(usage=usage, widths=widths, instructions={name: found["gemm"]})
        return gate.broken_rules(resources)

    assert problems(SASS) == []
    assert SASS.count(line) == 1
    assert problems(SASS.replace(line, change)) == [f"implicit_gemm<float16, 8> {problem}"]


def test_kernels_of_one_name_are_judged_by_the_worse() -> None:
    good = frozenset(gate.REQUIRED)
    assert gate.worse(good, good) == good
    assert gate.worse(good, good - {"LDSM"} | {"STL"}) == good - {"LDSM"} | {"STL"}


def test_tensor_core_kernel_without_machine_code_breaks_the_rule() -> None:
    usage = {"implicit_gemm<float16>": {"sm_80": gate.Usage(90, 0, 0)}}
    found = GOOD._replace(usage=usage, instructions={})
    assert len(gate.broken_rules(found)) == len(gate.REQUIRED)


@needs_tools
@needs_nvcc
def test_release_is_that_of_the_compiler(found: gate.Resources) -> None:
    release = re.search(r"V([\d.]+)", setup.ask_nvcc(cuda_home, "--version"))
    assert release is not None and found.release == release[1]


@needs_tools
@needs_nvcc
def test_command_line(
    sample: Path, found: gate.Resources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.tsv"
    call = ["--library", str(sample), "--table", str(path)]
    assert gate.main([*call, "--check"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert gate.main([*call, "--write"]) == 1  # written, and the rules still hold
    assert path.read_text() == gate.table(found)
    capsys.readouterr()
    gate.main([*call, "--check"])
    assert gate.REFRESH not in capsys.readouterr().err
    path.write_text(path.read_text().replace("index\t", "index\t1"))
    assert gate.main([*call, "--check"]) == 1
    shown = capsys.readouterr().err
    assert "-index\t1" in shown and "+index\t" in shown and gate.REFRESH in shown


@needs_tools
def test_library_without_kernels_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.main(["--library", sys.executable]) == 2
    assert "must be a library with CUDA kernels" in capsys.readouterr().err


USAGE = {
    "norm<bfloat16, 8>": {"sm_80": gate.Usage(32, 0, 0), "sm_90a": gate.Usage(34, 64, 0)},
    "norm<double, 2>": {"sm_80": gate.Usage(64, 0, 40), "sm_90a": gate.Usage(60, 0, 40)},
}
WIDTHS = {"norm<bfloat16, 8>": gate.Widths(128, 32), "norm<double, 2>": gate.Widths(128, 64)}
GOOD = gate.Resources("13.0.88", ["sm_120"], ["sm_80", "sm_90a"], USAGE, WIDTHS, {})


def test_table_of_good_kernels() -> None:
    assert gate.broken_rules(GOOD) == []
    assert gate.table(GOOD).splitlines() == [
        "# nvcc 13.0.88, PTX sm_120",
        "kernel\tsm_80\tsm_90a\tload\tstore",
        "norm<bfloat16, 8>\t32\t34 + 64\t128\t32",
        "norm<double, 2>\t64 ! 40\t60 ! 40\t128\t64",
    ]
    assert gate.differences(GOOD, gate.table(GOOD)) == []


def test_fewer_architectures_are_compared_where_both_have_them() -> None:
    usage = {kernel: {"sm_80": by["sm_80"]} for kernel, by in USAGE.items()}
    part = GOOD._replace(archs=["sm_80"], usage=usage)
    assert gate.not_comparable(part, gate.table(GOOD)) is None
    assert gate.differences(part, gate.table(GOOD)) == []
    usage["norm<double, 2>"] = {"sm_80": gate.Usage(65, 0, 40)}
    assert any("+norm<double, 2>\t65" in line for line in gate.differences(part, gate.table(GOOD)))


def test_another_release_is_a_reason() -> None:
    other = GOOD._replace(release="13.1.80")
    assert gate.not_comparable(other, gate.table(GOOD)) == (
        "the committed table is of nvcc 13.0.88, this library of 13.1.80"
    )


def test_new_and_gone_kernels_are_differences() -> None:
    one = {"norm<double, 2>": USAGE["norm<double, 2>"]}
    assert gate.differences(GOOD._replace(usage=one), gate.table(GOOD))
    assert gate.differences(GOOD, gate.table(GOOD._replace(usage=one)))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void dcconv::(anonymous namespace)::epilogue_kernel<__nv_bfloat16, dcconv::portable::"
            "Cosine, 8, true>(dcconv::(anonymous namespace)::P<__nv_bfloat16>)",
            "epilogue<bfloat16, Cosine, 8, true>",
        ),
        ("dcconv::(anonymous namespace)::cuda_arch_kernel(int*)", "cuda_arch"),
        ("void dcconv::f_kernel<c10::Half, (dcconv::Layout)1>(int)", "f<float16, (Layout)1>"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert gate.shorten(name) == short


def test_only_double_may_use_the_stack() -> None:
    assert gate.may_use_stack("norm<double, 2>") and gate.may_use_stack("sine(double)")
    assert not gate.may_use_stack("double_norm<float>") and not gate.may_use_stack("norm<float>")


# The rest is about the library of this checkout.

cuda_reason = native.cuda_missing()
needs_cuda_code = pytest.mark.skipif(cuda_reason is not None, reason=str(cuda_reason))


@pytest.fixture(scope="module")
def built() -> gate.Resources:
    spec = importlib.util.find_spec("dcconv._C")
    assert spec is not None and spec.origin is not None
    return gate.read_once(Path(spec.origin))


@needs_tools
@needs_cuda_code
def test_no_kernel_of_the_library_breaks_a_rule(built: gate.Resources) -> None:
    assert gate.broken_rules(built) == []


@needs_tools
@needs_cuda_code
def test_library_holds_the_architectures_it_was_built_for(built: gate.Resources) -> None:
    listed = [a.strip() for a in re.split(r"[;\s]+", str(native._build.ARCHS)) if a.strip()]
    names = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in listed}
    with_ptx = {
        f"sm_{arch.removesuffix('+PTX').replace('.', '')}"
        for arch in listed
        if arch.endswith("+PTX")
    }
    assert set(built.archs) == names
    assert set(built.ptx) == with_ptx
    every = {arch for by_arch in built.usage.values() for arch in by_arch}
    assert all(by_arch.keys() == every for by_arch in built.usage.values())


def test_committed_table_names_the_default_architectures() -> None:
    first, titles, *rows = gate.TABLE.read_text(encoding="utf-8").splitlines()
    assert first.endswith(f"PTX sm_{setup.ARCHS[-1].replace('.', '')}")
    assert titles.split("\t")[1:-2] == [f"sm_{arch.replace('.', '')}" for arch in setup.ARCHS]
    assert rows == sorted(rows) and len(rows) > 1


@needs_tools
@needs_cuda_code
def test_library_uses_what_the_committed_table_says(built: gate.Resources) -> None:
    committed = gate.TABLE.read_text(encoding="utf-8")
    reason = gate.not_comparable(built, committed)
    if reason is not None:
        pytest.skip(reason)
    changed = gate.differences(built, committed)
    assert not changed, "\n".join([*changed, gate.REFRESH])
