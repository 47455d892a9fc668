"""What setup.py decides, what it does when something is missing, and what the library links to."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from build_script import setup
from paths import ROOT

from dcconv import native

REASON = "DCCONV_BUILD=none was set"

# Complete without PyTorch's headers, so that it compiles in no time.
EMPTY_MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


needs_library = pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
no_compiler = setup.why_no_library(os.environ)
needs_compiler = pytest.mark.skipif(no_compiler is not None, reason=str(no_compiler))


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def toolkit(home: Path, release: str = "13.0") -> Path:
    script(home / "bin/nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.88'")
    (home / "include").mkdir()
    (home / "include/cuda_runtime.h").touch()
    return home


@pytest.mark.parametrize("mode", ["auto", "local", "cuda", "cpu", "none"])
def test_mode_is_read(mode: str) -> None:
    assert setup.build_mode({"DCCONV_BUILD": mode}) == mode


@pytest.mark.parametrize("environ", [{}, {"DCCONV_BUILD": ""}], ids=["unset", "empty"])
def test_mode_defaults_to_auto(environ: dict[str, str]) -> None:
    assert setup.build_mode(environ) == "auto"


def test_unknown_mode_is_refused() -> None:
    rule = "dcconv: DCCONV_BUILD must be one of auto, local, cuda, cpu, none, got 'gpu'"
    with pytest.raises(ValueError, match=re.escape(rule)):
        setup.build_mode({"DCCONV_BUILD": "gpu"})


def test_cuda_home_is_not_where_a_wrapper_lies(tmp_path: Path) -> None:
    real = toolkit(tmp_path / "real")
    script(tmp_path / "local/bin/nvcc", f'exec {real}/bin/nvcc "$@"')
    environ = {"PATH": str(tmp_path / "local/bin")}
    assert setup.find_cuda_home(environ, [tmp_path / "absent", real]) == real
    assert setup.find_cuda_home(environ, [tmp_path / "absent"]) is None


def test_cuda_home_follows_a_link_to_the_compiler(tmp_path: Path) -> None:
    real = toolkit(tmp_path / "real")
    (tmp_path / "local/bin").mkdir(parents=True)
    (tmp_path / "local/bin/nvcc").symlink_to(real / "bin/nvcc")
    assert setup.find_cuda_home({"PATH": str(tmp_path / "local/bin")}, []) == real


def test_cuda_home_that_is_set_wins_when_it_is_one(tmp_path: Path) -> None:
    chosen, other = toolkit(tmp_path / "chosen"), toolkit(tmp_path / "other")
    assert setup.find_cuda_home({"CUDA_HOME": str(chosen)}, [other]) == chosen
    assert setup.find_cuda_home({"CUDA_HOME": str(tmp_path)}, [other]) == other


def test_newest_numbered_toolkit_comes_first(tmp_path: Path) -> None:
    for name in ("cuda-9.2", "cuda-13.0", "cuda-12.8"):
        (tmp_path / name).mkdir()
    found = [home.name for home in setup.usual_cuda_homes(tmp_path)]
    assert found == ["cuda", "cuda-13.0", "cuda-12.8", "cuda-9.2"]


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        (
            "compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_120",
            "8.0;8.6;8.9;9.0a;10.0;12.0+PTX",
        ),
        ("compute_80 compute_86 compute_89 compute_90", "8.0;8.6;8.9+PTX;9.0a"),
    ],
    ids=["12.8", "12.0"],
)
def test_default_archs_are_those_the_compiler_knows(known: str, archs: str) -> None:
    assert setup.cuda_archs({}, known.replace(" ", "\n")) == archs


def test_arch_list_that_is_set_is_kept() -> None:
    assert setup.cuda_archs({"TORCH_CUDA_ARCH_LIST": "9.0a"}, "compute_80") == "9.0a"


@pytest.mark.parametrize(
    ("archs", "passes", "code"),
    [
        (
            "8.0;8.6;8.9;9.0a;10.0;12.0+PTX",
            ["80", "80", "80", "90a", "100", "120", "120"],
            ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"],
        ),
        ("9.0a", ["90a"], ["sm_90a"]),
        ("9.0 9.0a", ["90", "90a"], ["sm_90", "sm_90a"]),
        ("12.0;8.9;8.6+PTX", ["86", "86", "86", "120"], ["sm_86", "compute_86", "sm_89", "sm_120"]),
        ("10.3f", ["103f"], ["sm_103f"]),
        ("Hopper", [], []),
        ("8.0;Ada", [], []),
        ("", [], []),
    ],
)
def test_a_file_is_read_once_for_gpus_of_one_version(
    archs: str, passes: list[str], code: list[str]
) -> None:
    pairs = zip(passes, code, strict=True)
    assert setup.gencode(archs) == [f"-gencode=arch=compute_{a},code={c}" for a, c in pairs]


def test_cuda_is_left_out_with_a_reason(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", release="12.6")
    assert setup.why_no_cuda(home, "12.9") is None
    assert setup.why_no_cuda(home, None) == "the installed PyTorch is not a CUDA build"
    assert setup.why_no_cuda(None, "12.9") == "no CUDA toolkit was found (set CUDA_HOME)"
    assert setup.why_no_cuda(home, "13.2") == (
        f"the CUDA toolkit in {home} is 12.6, PyTorch was built with 13.2"
    )


def test_local_build_compiles_for_the_gpus_that_are_there() -> None:
    assert setup.local_archs([(9, 0), (8, 6), (8, 6), (12, 0)]) == "8.6;9.0a;12.0"
    assert setup.local_archs([]) == ""


@pytest.mark.parametrize(
    ("capability", "isa"),
    [("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "baseline"), ("SVE256", "baseline")],
)
def test_local_build_compiles_for_the_processor_that_is_there(capability: str, isa: str) -> None:
    assert setup.local_isa(capability) == isa


def test_local_build_leaves_out_the_other_instruction_sets_alone() -> None:
    every = set(setup.library(None, False).sources)
    of_sets = {f for f in every if f.endswith(tuple(f"_{isa}.cpp" for isa in setup.ISAS))}
    assert len(of_sets) == 2 * len(setup.ISAS)
    for isa in setup.ISAS:
        left = set(setup.library(None, False, isa).sources)
        assert every - left == {f for f in of_sets if not f.endswith(f"_{isa}.cpp")}


def test_a_compiled_file_takes_one_short_line() -> None:
    file = "csrc/cuda/ops_library.cu"
    compiler = f"[3/36] /usr/bin/nvcc -MD -I/a -c -c {ROOT}/{file} -o ops.o -gencode=arch"
    assert setup.shown(f"{compiler}\n", False) == f"[3/36] {file}\n"
    host = f"[4/36] c++ -MMD -c {ROOT}/csrc/ops.cpp -o ops.o -O3"
    assert setup.shown(f"{host}\n", False) == "[4/36] csrc/ops.cpp\n"
    link = "g++ -pthread -shared -Wl,-rpath a.o b.o -o build/dcconv/_C.abi3.so\n"
    assert setup.shown(link, False) == "linking _C.abi3.so\n"
    for line in (f"{compiler}\n", link):
        assert setup.shown(line, True) == line
    for line in ("a.cpp:7:2: error: no such thing\n", "ninja: build stopped.\n", "\n"):
        assert setup.shown(line, False) == line


def test_output_is_recorded_whole_and_shown_short(tmp_path: Path) -> None:
    program = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import setup
with setup.recorded(Path("build.log"), False):
    subprocess.run(["echo", "[1/2] c++ -I/a/b -c /x/y.cpp -o y.o -O3"])
    os.write(2, b"y.cpp:1: warning: w\\n")
    print("from Python")
print("after")
"""
    said = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [
        "[1/2] /x/y.cpp",
        "y.cpp:1: warning: w",
        "from Python",
        "after",
    ]
    assert "-I/a/b -c /x/y.cpp -o y.o -O3" in (tmp_path / "build.log").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_alone_lists_the_targets_and_does_nothing(tmp_path: Path) -> None:
    command = ["make", f"VENV={tmp_path / 'venv'}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = said.splitlines()
    assert all(re.match(r"make [a-z-]+ +\S", line) for line in lines), said
    assert {"demo", "test", "build"} <= {line.split()[1] for line in lines}
    assert not (tmp_path / "venv").exists()


def test_first_error_is_found_in_compiler_output() -> None:
    log = """
    [1/2] c++ -Werror -c a.cpp -o a-error.o
    a.h:3:1: warning: unused
    a.cpp:7:2: error: no such thing
    b.cpp:1:10: fatal error: b.h: No such file or directory
    """
    assert setup.first_error(log) == "a.cpp:7:2: error: no such thing"
    assert setup.first_error("ninja: no work to do.") is None
    assert setup.first_error("a.cu(3): error: x is undefined") == "a.cu(3): error: x is undefined"
    assert setup.first_error("b.cpp:1:10: fatal error: b.h") == "b.cpp:1:10: fatal error: b.h"


def package(folder: Path, source: str = EMPTY_MODULE) -> Path:
    """Make a package of one C++ file with the project's build files."""
    (folder / "dcconv").mkdir()
    (folder / "dcconv/__init__.py").write_text('__version__ = "0"\n')
    (folder / "csrc").mkdir()
    (folder / "csrc/ops.cpp").write_text(source)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    return folder


def build(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DCCONV_", "TORCH_"))}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=inherited | settings,
        capture_output=True,
        text=True,
    )


def record(folder: Path) -> dict[str, str | None]:
    spec = importlib.util.spec_from_file_location("record", folder / "dcconv/_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: value for name, value in vars(module).items() if name.isupper()}


def test_none_leaves_a_record_and_no_old_library(tmp_path: Path) -> None:
    folder = package(tmp_path)
    stale = folder / "dcconv/_C.abi3.so"
    stale.touch()
    result = build(folder, DCCONV_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert "dcconv: installing without the compiled library" in result.stdout
    assert record(folder)["REASON"] == REASON
    assert not stale.exists()


def test_unknown_mode_stops_the_build(tmp_path: Path) -> None:
    result = build(package(tmp_path), DCCONV_BUILD="gpu")
    assert result.returncode != 0
    assert (
        "dcconv: DCCONV_BUILD must be one of auto, local, cuda, cpu, none, got 'gpu'"
        in result.stderr
    )


def test_missing_compiler_is_a_reason_or_an_error(tmp_path: Path) -> None:
    folder = package(tmp_path)
    reason = "no C++ compiler was found (looked for 'no-such-compiler')"
    result = build(folder, CXX="no-such-compiler -O2")
    assert result.returncode == 0, result.stderr
    assert record(folder)["REASON"] == reason
    for mode in ("cpu", "cuda"):
        result = build(folder, CXX="no-such-compiler -O2", DCCONV_BUILD=mode)
        assert result.returncode != 0
        assert f"dcconv: DCCONV_BUILD={mode} cannot be met: {reason}" in result.stderr


@needs_compiler
def test_library_is_built_and_recorded(tmp_path: Path) -> None:
    folder = package(tmp_path)
    result = build(folder, DCCONV_BUILD="cpu")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (folder / "dcconv").glob("_C*")] == ["_C.abi3.so"]
    assert record(folder) == {
        "REASON": None,
        "CUDA_REASON": "the compiled library has no CUDA code: DCCONV_BUILD=cpu was set",
        "ARCHS": None,
        "ISA": None,
        "TORCH": str(torch.__version__),
    }


@needs_compiler
def test_local_build_records_the_instruction_set(tmp_path: Path) -> None:
    folder = package(tmp_path)
    result = build(folder, DCCONV_BUILD="local")
    assert result.returncode == 0, result.stderr
    assert record(folder)["ISA"] == setup.local_isa(torch.backends.cpu.get_cpu_capability())


def test_library_for_another_processor_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.missing is not None:
        pytest.skip(native.missing)
    ops = SimpleNamespace(dcconv=SimpleNamespace(cpu_isas=list, cpu_isa=lambda: "avx2"))
    monkeypatch.setattr(native, "_build", SimpleNamespace(ISA="avx512"))
    assert native._load() is None
    monkeypatch.setattr(native, "torch", SimpleNamespace(ops=ops))
    assert native._load() == (
        "the compiled library was built for a processor with avx512 alone (DCCONV_BUILD=local), "
        "which this one lacks"
    )
    only = "avx2 instructions, the only ones compiled: DCCONV_BUILD=local"
    assert native.cpu_instructions() == only
    monkeypatch.setattr(native, "_build", SimpleNamespace(ISA=None))
    assert native.cpu_instructions() == "avx2 instructions"


@needs_compiler
def test_source_that_does_not_compile_is_a_reason_in_auto_mode(tmp_path: Path) -> None:
    folder = package(tmp_path, source="#error broken on purpose\n")
    result = build(folder)
    assert result.returncode == 0, result.stderr
    reason = record(folder)["REASON"]
    assert reason is not None
    assert re.match(r"it did not compile: .*ops\.cpp.*error.*broken on purpose", reason)


@needs_compiler
def test_source_that_does_not_compile_is_an_error_when_asked_for(tmp_path: Path) -> None:
    folder = package(tmp_path, source="#error broken on purpose\n")
    result = build(folder, DCCONV_BUILD="cpu")
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout + result.stderr
    assert not (folder / "dcconv/_build.py").exists()


def test_package_without_library_works_and_says_why(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "dcconv",
        tmp_path / "dcconv",
        ignore=shutil.ignore_patterns("_C.*", "_build.py", "__pycache__"),
    )
    (tmp_path / "dcconv/_build.py").write_text(f"REASON = {REASON!r}\nCUDA_REASON = None\n")
    program = """
import sys, warnings
sys.modules["dcconv._C"] = None  # an editable install would find its own
import dcconv, torch
x, w = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = dcconv.decoupled_conv2d(x, w)
print(dcconv.__file__)
print(tuple(y.shape))
print(*[w.message for w in caught], sep="|")
print(dcconv.backends.report(x, w))
try:
    dcconv.decoupled_conv2d(x, w, backend="cpu")
except NotImplementedError as error:
    print("refused:", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("DCCONV_")}
        | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    sentence = f"the compiled library is missing: {REASON}"
    path, shape, warning, *report, refusal = result.stdout.splitlines()
    assert path == str(tmp_path / "dcconv/__init__.py")
    assert shape == "(1, 3, 3, 3)"
    assert warning == f"dcconv: the plain PyTorch reference runs on cpu tensors (cpu: {sentence})"
    assert any(line.split() == ["cpu", *sentence.split()] for line in report)
    assert refusal == f"refused: dcconv: backend 'cpu' cannot run this call: {sentence}"


def library() -> Path:
    import dcconv._C

    return Path(dcconv._C.__file__)


@needs_library
def test_library_is_for_every_python() -> None:
    assert library().name == "_C.abi3.so"


@needs_library
def test_library_uses_only_the_stable_abi() -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(library())],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    symbols = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    unstable = [symbol for symbol in symbols if re.search(r"\b(at|c10|torch|caffe2)::", symbol)]
    assert unstable == []


@needs_library
def test_library_has_no_threads_of_its_own() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run(
        ["readelf", "-d", str(library())], check=True, capture_output=True, text=True
    ).stdout
    assert "libtorch_cpu" in needed
    assert "omp" not in needed


@needs_library
def test_cuda_code_is_there_exactly_if_the_record_says_so() -> None:
    assert hasattr(torch.ops.dcconv, "cuda_arch") == (native.cuda_missing() is None)


@needs_library
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_gpu_runs_code_for_its_own_generation() -> None:
    reason = native.cuda_missing()
    if reason is not None:
        pytest.skip(reason)
    arch = torch.zeros(1, dtype=torch.int32, device="cuda")
    torch.ops.dcconv.cuda_arch(arch)
    major, minor = torch.cuda.get_device_capability()
    assert arch.item() in range(major * 100, major * 100 + minor * 10 + 1, 10)


def test_every_folder_of_the_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "dcconv").glob("**/__init__.py")
    }
    assert set(re.findall(r"\"(.*?)\"", listed[1])) == found


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_lint_formats_every_file_of_c(tmp_path: Path) -> None:
    command = ["make", "--dry-run", "lint", f"VENV={tmp_path}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in said.splitlines() if "clang-format" in line)
    endings = (".h", ".inl", ".cpp", ".cuh", ".cu", ".c", ".cc", ".hpp")
    found = (path for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*"))
    files = {str(path.relative_to(ROOT)) for path in found if path.suffix in endings}
    assert set(line.split()) >= files and "tests/cuda/simt/simt.h" in files
