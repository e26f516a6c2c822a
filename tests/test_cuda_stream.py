"""How the CUDA column asks for torch's current stream, without a GPU: the op layer as it is compiled for one, beside a
stand-in for libtorch_cuda.so that Python loads as torch loads its own, for itself alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NAME = "aoti_torch_get_current_cuda_stream"

STAND_IN = f'extern "C" int {NAME}(int device, void** stream) {{ return *stream = (void*)(4096L + device), 0; }}\n'
CALLER = """
#include <cstring>

#include "ops/cuda_common.h"
extern "C" [[gnu::visibility("default")]] int64_t stream_of(int device) {
  try {
    return reinterpret_cast<int64_t>(dlkern::ops::current_stream(device));
  } catch (const std::exception& error) {
    return std::strstr(error.what(), "no CUDA streams") ? -1 : -2;
  }
}
"""
ASK = f"""
import ctypes, sys
import torch
loaded = [ctypes.CDLL(path) for path in sys.argv[2:]]  # RTLD_LOCAL
try:
    ctypes.CDLL(None).{NAME}
except AttributeError:
    print("nobody finds it globally")
caller = ctypes.CDLL(sys.argv[1])
caller.stream_of.restype = ctypes.c_int64
print(caller.stream_of(int(torch.version.cuda is None) * 3))
"""


def build_script():
    spec = importlib.util.spec_from_file_location("dlkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    script, folder = build_script(), tmp_path_factory.mktemp("stream")
    _, includes, libraries = script.torch_paths()
    (folder / "caller.cpp").write_text(CALLER)
    compiler = os.environ.get("CXX", "g++").split()
    flags = ["-std=c++20", "-fPIC", "-shared", f"-DTORCH_TARGET_VERSION={script.TORCH_TARGET}", f"-I{ROOT / 'csrc'}"]
    headers = [word for path in includes for word in ("-isystem", str(path))]
    subprocess.run(
        [*compiler, *flags, *headers, "-o", str(folder / "caller.so"), str(folder / "caller.cpp"), f"-L{libraries}",
         "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    return folder / "caller.so"


def stand_in(folder: Path, name: str, source: str = STAND_IN) -> Path:
    (folder / "stand_in.cpp").write_text(source)
    compiler = os.environ.get("CXX", "g++").split()
    path = folder / name
    subprocess.run(
        [*compiler, "-fPIC", "-shared", f"-Wl,-soname,{name}", "-o", str(path), str(folder / "stand_in.cpp")], check=True)
    return path


def answer(*libraries: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, libraries)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA has the real one loaded")


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")
def test_it_is_found_in_torchs_own_library(caller):
    """Called it is, too, and where there is no GPU the error is CUDA's."""
    found, stream = answer(caller)
    assert found == "nobody finds it globally" and stream != "-1"
    assert torch.cuda.is_available() or stream == "-2"


@without_cuda
def test_it_is_found_in_a_library_that_python_loaded_for_itself_alone(caller, tmp_path):
    assert answer(caller, stand_in(tmp_path, "libtorch_cuda.so")) == ["nobody finds it globally", str(4096 + 3)]


@without_cuda
def test_without_it_the_call_raises(caller, tmp_path):
    assert answer(caller) == ["nobody finds it globally", "-1"]
    nothing = stand_in(tmp_path, "libtorch_cuda.so", "int nothing;\n")
    assert answer(caller, nothing) == ["nobody finds it globally", "-1"]
    assert answer(caller, stand_in(tmp_path, "libother.so")) == ["nobody finds it globally", "-1"]
