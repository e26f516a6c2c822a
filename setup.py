"""Builds dlkern: libdlkern.so (ops, through torch's stable ABI, free of Python) and dlkern._C (facts, pybind11).

A build.ninja is written and run, so a second build compiles only what changed. Environment switches:
  DLKERN_CUDA=0|1|auto           CUDA column: never, with nvcc (default: 1 where nvcc is found), only where a GPU is
  DLKERN_CUDA_ARCHITECTURES      e.g. "80;90a" (default), semicolon-separated; compute_80 PTX is always added
  DLKERN_ISAS                    e.g. "portable" or "portable;avx2;avx512" (default on x86-64)
  DLKERN_VARIANT=debug           not optimised, for a debugger (default: release)
  DLKERN_NATIVE=0                no native library at all (the reference column serves)
  DLKERN_JOBS                    parallel compilations (default: CPU count)
Test libraries (sanitizers, CUDA kernels on the host): python setup.py build_native --variant NAME.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
VERSION = "0.1.0"
TORCH_TARGET = "0x020b000000000000ULL"  # stable ABI of torch 2.11

ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
}
VARIANT_FLAGS = {
    "release": "-O3 -g0",
    # Neither the sanitizers' libraries nor "wide" are optimised: their tests spend more time compiling than in kernels.
    "asan": "-O0 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "debug": "-O0 -g",
    # The AVX-512 code with its 64-byte vectors lowered to AVX2, for machines without AVX-512.
    "wide": "-O0 -g0",
}
WIDE_FLAGS = "-mavx2 -mfma -mf16c -DDLKERN_VECTOR_BYTES=64"
# The CUDA column on the host: libraries for tests, in build/<variant>. `kernels` are the flags of csrc/cuda alone.
HOST_VARIANTS = {
    "cuda_on_host": {"common": "-O2 -g0", "kernels": "", "link": ""},
    # Hooks of our own serve the instrumentation; libtsan is not linked.
    "cuda_on_host_checked": {
        "common": "-O2 -g0 -DDLKERN_CHECKED",
        "kernels": "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-threadsafe-statics",
        "link": "",
    },
    "cuda_on_host_asan": {
        "common": "-O0 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "kernels": "",
        "link": "-fsanitize=address,undefined",
    },
}
# Sources of csrc/cuda that are not kernels of the column.
CUDA_DEVICE_ONLY = {"device.cu"}
CUDA_PROGRAMS = {"conformance.cu", "conformance_sm90.cu"}

# CPU sources compiled once, not once an instruction set.
PLAIN_CPU_SOURCES = {"isa.cpp", "parallel.cpp", "scratch.cpp"}


def torch_paths():
    import torch

    base = Path(torch.__file__).resolve().parent
    include = base / "include"
    return torch.__version__, [include, include / "torch" / "csrc" / "api" / "include"], base / "lib"


def isas():
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["portable"]
    return [name for name in os.environ.get("DLKERN_ISAS", "portable;avx2;avx512").split(";") if name]


def find_nvcc():
    """Path of nvcc where the CUDA column is to be built, or None with the reason."""
    choice = os.environ.get("DLKERN_CUDA", "1")
    if choice == "0":
        return None, "left out (DLKERN_CUDA=0)"
    if choice == "auto":
        import torch

        if not torch.cuda.is_available():
            return None, "left out (no GPU here; DLKERN_CUDA=1 builds it all the same)"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if not nvcc:
        return None, "left out (nvcc not found)"
    return nvcc, ""


def run_text(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


class Ninja:
    """Writes one build.ninja."""

    def __init__(self):
        self.lines = ["ninja_required_version = 1.3"]
        self.rules = set()

    def rule(self, name, command, depfile=True):
        if name in self.rules:
            return
        self.rules.add(name)
        self.lines += [f"rule {name}", f"  command = {command}", "  description = $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, out, rule, inputs, implicit=(), **variables):
        tail = f" | {' '.join(map(str, implicit))}" if implicit else ""
        self.lines.append(f"build {out}: {rule} {' '.join(map(str, inputs))}{tail}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        return out

    def run(self, directory, targets=()):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            import ninja

            executable = os.path.join(ninja.BIN_DIR, "ninja")
        except ImportError:
            executable = shutil.which("ninja") or sys.exit("dlkern: ninja not found (pip install ninja)")
        jobs = os.environ.get("DLKERN_JOBS", str(os.cpu_count() or 1))
        path = directory / "build.ninja"
        text = "\n".join(self.lines) + "\n"
        with locked(directory / "lock"):  # tests run in two processes, and both may want the same library
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            subprocess.run([executable, "-C", str(directory), "-j", jobs, *map(str, targets)], check=True)


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def native_objects(ninja, build, variant, compiler):
    """Objects of libdlkern.so: op layer once, kernels once an instruction set."""
    torch_version, includes, _ = torch_paths()
    include_flags = " ".join(f"-isystem {path}" for path in includes)
    warnings = "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized"
    common = f"-std=c++20 -fPIC -fvisibility=hidden {warnings} {VARIANT_FLAGS[variant]} -I{CSRC}"
    if isas() == ["portable"]:
        common += " -DDLKERN_NO_SIMD"
    if variant == "wide":
        common += " -DDLKERN_WIDE"
    ninja.rule("cxx", f"{compiler} -MMD -MF $out.d {common} $flags -c $in -o $out")
    built = " ".join(f"-DDLKERN_BUILT_{isa.upper()}" for isa in isas())
    torch_flags = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} {built} {include_flags}"
    objects = []
    op_layer = sorted(source for source in (CSRC / "ops").glob("*.cpp") if not source.name.startswith("cuda_"))
    for source in op_layer + [CSRC / "cpu" / name for name in sorted(PLAIN_CPU_SOURCES)]:
        objects.append(ninja.build(build / f"{source.parent.name}_{source.stem}.o", "cxx", [source], flags=torch_flags))
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in PLAIN_CPU_SOURCES:
            continue
        for isa in isas():
            isa_flags = WIDE_FLAGS if variant == "wide" and isa == "avx512" else ISA_FLAGS[isa]
            objects.append(
                ninja.build(build / f"cpu_{source.stem}_{isa}.o", "cxx", [source], flags=f"{isa_flags} -DDLKERN_ISA={isa}")
            )
    return objects, torch_version


def cuda_architectures():
    return [name for name in os.environ.get("DLKERN_CUDA_ARCHITECTURES", "80;90a").split(";") if name]


def cudart_directory(nvcc):
    """Where libcudart_static.a lies: beside nvcc (which may be a script that calls another), or where CUDA usually is."""
    homes = [Path(nvcc).resolve().parent.parent, Path(os.environ.get("CUDA_HOME", "/")), Path("/usr/local/cuda")]
    for directory in (home / part for home in homes for part in ("lib64", "lib", "targets/x86_64-linux/lib")):
        if (directory / "libcudart_static.a").exists():
            return directory
    sys.exit("dlkern: libcudart_static.a not found (set CUDA_HOME)")


def cuda_objects(ninja, build, nvcc, compiler):
    """Objects of the CUDA column: kernels by nvcc, their op layer by the host compiler. ptxas's report lies beside."""
    def codes(source):
        names = cuda_architectures()
        if source.stem.endswith("_sm90") and "90a" in names:  # for other architectures there is nothing in it
            names = ["90a"]
        flags = [f"-gencode arch=compute_{name},code=sm_{name}" for name in names]
        return " ".join(flags if names == ["90a"] else [*flags, "-gencode arch=compute_80,code=compute_80"])

    host = f"-ccbin {shlex.quote(shutil.which(compiler.split()[-1]) or compiler.split()[-1])}"
    ninja.rule(
        "nvcc",
        f"{nvcc} {host} -std=c++20 -O3 $codes -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden "
        f"-MD -MF $out.d -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; false)",
    )
    kernels = [
        ninja.build(build / f"cuda_{source.stem}.o", "nvcc", [source], codes=codes(source))
        for source in sorted((CSRC / "cuda").glob("*.cu"))
        if source.name not in CUDA_PROGRAMS
    ]
    _, includes, _ = torch_paths()
    flags = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} " + " ".join(f"-isystem {path}" for path in includes)
    layer = [
        ninja.build(build / f"ops_{source.stem}.o", "cxx", [source], flags=flags)
        for source in sorted((CSRC / "ops").glob("cuda_*.cpp"))
    ]
    return kernels, layer


def kernel_resources(ptxas_output, family):
    """Rows of ptxas -v's report: registers, shared memory, stack and spills of each kernel and architecture."""
    rows, pattern = [], re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)", re.DOTALL)
    for name, arch, stack, stores, loads, registers, rest in pattern.findall(ptxas_output):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append({
            "family": family, "kernel": demangled(name), "arch": f"sm_{arch}", "registers": int(registers),
            "shared": int(shared.group(1)) if shared else 0, "stack": int(stack),
            "spill_stores": int(stores), "spill_loads": int(loads),
        })
    return rows


def demangled(symbol):
    """Kernel name with its template arguments, as the source has them; the symbol where c++filt is missing."""
    text = run_text(["c++filt", symbol]).strip() or symbol
    text = text.replace("(anonymous namespace)::", "").replace("dlkern::cuda::", "").removeprefix("void ")
    text = re.sub(r"_GLOBAL__N__\w+::|\((?:int|bool|PoolIndices|Stored|Pass)\)", "", text)
    depth = 0
    for i, character in enumerate(text):  # cut the parameter list
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return text[:i]
    return text


def write_cuda_kernels(build, kernels):
    rows = []
    for item in kernels:
        report = Path(f"{item}.ptxas")
        if report.exists():
            rows += kernel_resources(report.read_text(), item.stem.removeprefix("cuda_"))
    rows.sort(key=lambda row: (row["family"], row["kernel"], row["arch"]))
    (build / "cuda_kernels.json").write_text(json.dumps(rows))


def build_cuda_on_host(output, variant):
    """Writes libdlkern_cuda_on_host.so: the CUDA column's kernels and op layer for CPU tensors. Beside it
    libplanted.so, kernels with planted bugs (the tool's own tests), and the instruction-conformance program."""
    compiler = os.environ.get("CXX", "g++")
    flags = HOST_VARIANTS[variant]
    objects = output / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    ninja = Ninja()
    _, includes, torch_lib = torch_paths()
    torch_flags = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -DDLKERN_CUDA_ON_HOST " + " ".join(
        f"-isystem {path}" for path in includes)
    ninja.rule(
        "host_cxx",
        f"{compiler} -MMD -MF $out.d -std=c++20 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wextra "
        f"-Wno-psabi -Wno-unknown-pragmas {flags['common']} -I{CSRC} $flags -c $in -o $out",
    )
    ninja.rule("host_link", f"{compiler} -shared {flags['link']} -o $out $in $libs", depfile=False)
    ninja.rule("host_program", f"{compiler} {flags['link']} -o $out $in", depfile=False)

    def compiled(sources, prefix, extra):
        return [ninja.build(objects / f"{prefix}_{path.stem}.o", "host_cxx", [path], flags=extra) for path in sources]

    runtime = compiled(sorted((CSRC / "cuda_on_host").glob("*.cpp")), "runtime", "")
    kernel_flags = f"-x c++ {flags['kernels']}"
    not_kernels = CUDA_DEVICE_ONLY | CUDA_PROGRAMS
    sources = [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.name not in not_kernels]
    kernels = compiled(sources, "cuda", kernel_flags)
    layer = compiled(sorted((CSRC / "ops").glob("cuda_*.cpp")), "ops", torch_flags)
    planted = compiled([ROOT / "tests" / "cuda" / "planted.cu"], "planted", kernel_flags)
    library = output / "libdlkern_cuda_on_host.so"
    ninja.build(library, "host_link", runtime + kernels + layer, libs=f"-L{torch_lib} -ltorch_cpu -lc10")
    tests = output / "libplanted.so"
    ninja.build(tests, "host_link", runtime + planted)
    targets = [library, tests]
    for source in sorted(CUDA_PROGRAMS):
        program = compiled([CSRC / "cuda" / source], "program", kernel_flags)
        targets.append(ninja.build(output / Path(source).stem, "host_program", runtime + program))
    ninja.run(objects, targets)


def build_libraries(output, build, variant="release", facts=True):
    """Writes libdlkern.so (and _C) into `output`."""
    compiler = os.environ.get("CXX", "g++")
    ninja = Ninja()
    build.mkdir(parents=True, exist_ok=True)
    objects, torch_version = native_objects(ninja, build, variant, compiler)
    _, _, torch_lib = torch_paths()
    sanitize = VARIANT_FLAGS[variant] if variant == "asan" else ""
    nvcc, reason = find_nvcc()
    print(f"dlkern: CUDA column {'with ' + nvcc if nvcc else reason}")
    ninja.rule("link", f"{compiler} -shared {sanitize} -o $out $in -L{torch_lib} -ltorch_cpu -lc10 $libs", depfile=False)
    library = output / "libdlkern.so"
    libraries, kernels = "-ldl", []
    if nvcc:
        kernels, layer = cuda_objects(ninja, build, nvcc, compiler)
        objects = objects + kernels + layer
        # The CUDA runtime linked in; it finds the driver at run time, where there is one.
        libraries = f"-L{cudart_directory(nvcc)} -lcudart_static -Wl,--exclude-libs,ALL -ldl -lrt -lpthread"
    ninja.build(library, "link", objects, libs=libraries)
    targets = [library]
    if kernels:  # first, because dlkern._C tells what ptxas said of them
        ninja.run(build, kernels)
    write_cuda_kernels(build, kernels)
    if facts:
        import pybind11

        write_build_info(build, torch_version, compiler, nvcc)
        python_include = sysconfig.get_paths()["include"]
        flags = f"-I{build} -isystem {pybind11.get_include()} -isystem {python_include}"
        module = [
            ninja.build(build / "module.o", "cxx", [CSRC / "module.cpp"], flags=flags),
            build / "cpu_isa.o",
        ]
        ninja.rule("link_module", f"{compiler} -shared {sanitize} -o $out $in", depfile=False)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        targets.append(ninja.build(output / f"_C{suffix}", "link_module", module))
    ninja.run(build, targets)


def write_build_info(build, torch_version, compiler, nvcc):
    """build_info.h: what dlkern._C tells. Rewritten only when it changes, so that nothing rebuilds."""
    compiler_version = (run_text([*compiler.split(), "--version"]).splitlines() or [""])[0]
    nvcc_version = (run_text([nvcc, "--version"]).strip().splitlines() or [""])[-1] if nvcc else ""
    architectures = os.environ.get("DLKERN_CUDA_ARCHITECTURES", "80;90a") if nvcc else ""
    facts = {
        "DLKERN_VERSION": VERSION, "DLKERN_COMPILER": compiler_version, "DLKERN_TORCH_VERSION": torch_version,
        "DLKERN_NVCC_VERSION": nvcc_version, "DLKERN_CUDA_ARCHITECTURES": architectures, "DLKERN_ISAS": ";".join(isas()),
    }
    text = "#pragma once\n" + "".join(f"#define {name} {json.dumps(value)}\n" for name, value in facts.items())
    kernels = build / "cuda_kernels.json"
    text += f'static const char kCudaKernelsJson[] = R"json({kernels.read_text() if kernels.exists() else "[]"})json";\n'
    header = build / "build_info.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


class BuildExt(build_ext):
    """pip install, pip install -e and build_ext --inplace all come here."""

    def run(self):
        if os.environ.get("DLKERN_NATIVE", "1") == "0":
            print("dlkern: native library left out (DLKERN_NATIVE=0)")
            return
        in_place = self.inplace or getattr(self, "editable_mode", False)
        output = ROOT / "dlkern" if in_place else Path(self.build_lib).resolve() / "dlkern"
        output.mkdir(parents=True, exist_ok=True)
        variant = os.environ.get("DLKERN_VARIANT", "release")
        if variant not in ("release", "debug"):
            sys.exit(f"dlkern: DLKERN_VARIANT must be release or debug, got {variant}")
        build_libraries(output, ROOT / "build" / "native", variant)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class BuildNative(Command):
    """Libraries for tests: --variant asan writes build/asan/libdlkern.so."""

    description = "build a variant of the native library for tests"
    user_options: ClassVar = [("variant=", None, "release, asan, debug, wide, cuda_on_host[_checked|_asan]")]

    def initialize_options(self):
        self.variant = "release"

    def finalize_options(self):
        pass

    def run(self):
        output = ROOT / "build" / self.variant
        output.mkdir(parents=True, exist_ok=True)
        if self.variant in HOST_VARIANTS:
            return build_cuda_on_host(output, self.variant)
        build_libraries(output, output / "objects", self.variant, facts=False)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("dlkern._C", sources=[])],
        cmdclass={"build_ext": BuildExt, "build_native": BuildNative},
    )
