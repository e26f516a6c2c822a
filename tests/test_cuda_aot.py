"""Machine code of the CUDA column, compiled here for sm_80 and sm_90a: registers within the committed budgets
(tests/budgets/nvcc-<version>/<family>.json), no stack, no spills, the tensor-core and asynchronous-copy instructions
there, wide loads where the layout allows them.

After a deliberate change: python tests/test_cuda_aot.py --write [family ...], and say in the commit what the change
bought. The budgets name the sources they were measured on (sources.py): of those that did not change since, only the
families of ALWAYS are compiled again, all of them with DLKERN_AOT=all.
"""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sources import digest, module_file, skip_if_unchanged

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
FAMILIES = sorted(
    path.stem for path in CUDA.glob("*.cu") if path.stem not in ("device", "conformance", "conformance_sm90"))
ARCHITECTURES = {family: ("90a",) if family.endswith("_sm90") else ("80", "90a") for family in FAMILIES}
# Quick to compile: what was written down of them is compared with what the compiler says now.
ALWAYS = ("dropout", "linear_sm90", "positions")
FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v", "-cubin")
every_build = pytest.mark.parametrize(
    "family,architecture", [(family, name) for family in FAMILIES for name in ARCHITECTURES[family]])

# family -> pattern of kernel names -> patterns of the opcodes each such kernel must have.
MMA = {"__nv_bfloat16": "HMMA.16816.F32.BF16", "__half": "HMMA.16816.F32$"}
WGMMA = {"__nv_bfloat16": "F32.BF16", "__half": "F32$"}
PACK = {"__nv_bfloat16": "F2FP.BF16.F32.PACK_AB", "__half": "F2FP.F16.F32.PACK_AB"}
REQUIRED = {
    "attention": {
        **{rf"attention_(varlen_|rotary_)?forward_kernel<{t}, .*": [mma, "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "MUFU.EX2"]
           for t, mma in MMA.items()},
        r"attention_(varlen_|rotary_)?forward_kernel<float, .*": ["FFMA", "LDS.128", "LDGSTS.E.BYPASS.128", "MUFU.EX2"],
    },
    "attention_backward": {
        **{rf"attention_(varlen_|rotary_)?backward_(query|key)_kernel<{t}, .*": [mma, "LDSM.16.M88.4", "LDGSTS.E"]
           for t, mma in MMA.items()},
        **{rf"attention_backward_\w+_kernel<{t}, \d+, false>": [mma, "LDSM.16.M88.4"] for t, mma in MMA.items()},
        r"attention_(varlen_|rotary_)?backward_(query|key)_kernel<float, .*": ["FFMA", "LDS.128", "LDGSTS.E.BYPASS.128"],
    },
    "attention_sm90": {
        **{rf"attention_(varlen_)?forward_sm90_kernel<{t}, 64>": [f"HGMMA.64x128x16.{types}", f"HGMMA.64x64x16.{types}"]
           for t, types in WGMMA.items()},
        **{rf"attention_(varlen_)?forward_sm90_kernel<{t}, \d+>": [
            f"HGMMA.64x128x16.{types}", "UTMALDG.4D", "SYNCS.PHASECHK", "USETMAXREG", "MUFU.EX2", "BAR.ARV", PACK[t]]
           for t, types in WGMMA.items()},
    },
    "attention_backward_sm90": {
        **{rf"attention_(varlen_)?backward_query_sm90_kernel<{t}, 64>": [
            f"HGMMA.64x128x16.{types}", f"HGMMA.64x64x16.{types}"] for t, types in WGMMA.items()},
        **{rf"attention_(varlen_)?backward_\w+_sm90_kernel<{t}, 128>": [
            f"HGMMA.64x128x16.{types}", f"HGMMA.64x64x16.{types}"] for t, types in WGMMA.items()},
        **{rf"attention_(varlen_)?backward_\w+_sm90_kernel<{t}, \d+>": [
            f"HGMMA.64x64x16.{types}", "UTMALDG.4D", "SYNCS.PHASECHK", "USETMAXREG", "MUFU.EX2", PACK[t]]
           for t, types in WGMMA.items()},
    },
    "batch_norm": {
        r"batch_norm_(apply|backward_apply)_kernel<(float, \w+, 4|(__nv_bfloat16|__half), \w+, 8)>": ["LDG.E.128", "STG.E.128"],
        r"batch_norm_(backward_)?partial_kernel<(float, \w+, 4|(__nv_bfloat16|__half), \w+, 8)>": ["LDG.E.128"],
    },
    "conv": {
        **{rf"conv2d_product_kernel<TensorCores<{t}, .*, 8> >": [mma, "LDSM.16", "LDGSTS.E.BYPASS.128", "LDGDEPBAR"]
           for t, mma in MMA.items()},
        **{rf"conv2d_product_kernel<TensorCores<{t}, .*, 1> >": [mma, "LDSM.16", "LDG.E.U16"] for t, mma in MMA.items()},
        r"conv2d_product_kernel<TensorCores<.*, [01], 1, 8> >": ["LDSM.16.MT88.4"],
        r"conv2d_product_kernel<TensorCores<float, .* >": ["HMMA.1688.F32.TF32", "LDS", "LDGSTS.E", "LDGDEPBAR"],
        r"conv2d_product_kernel<TensorCores<float, .*, 4> >": ["LDGSTS.E.BYPASS.128"],
        r"conv2d_product_kernel<TensorCores<float, .*, 0, [01], 4> >": ["LDSM.16.M88.4"],
        r"conv2d_product_kernel<Exact<.* >": ["FFMA", "LDS.128", "LDGSTS.E", "LDGDEPBAR"],
    },
    "conv_sm90": {
        **{rf"conv2d_sm90_kernel<{t}, WgmmaShape<{n}, .*": [f"HGMMA.64x{n}x16.{types}", "SYNCS.PHASECHK", "USETMAXREG"]
           for t, types in WGMMA.items() for n in (256, 128, 64)},
        r"conv2d_sm90_kernel<.*, [01]>": ["UTMALDG.4D.IM2COL", "UTMALDG.3D"],
        r"conv2d_sm90_kernel<.*, 2>": ["UTMALDG.4D.IM2COL", "UTMALDG.2D"],
    },
    "conv_depthwise": {
        r"depthwise_(forward|backward_input)_kernel<(float, 4|(__nv_bfloat16|__half), 8)>": ["LDG.E.128", "STG.E"],
        r"pixel_sums_kernel<(float, 4|(__nv_bfloat16|__half), 8), (false|true)>": ["LDG.E.128"],
    },
    "dropout": {r"dropout_kernel<(float, 4|(__nv_bfloat16|__half), 8)>": ["LDG.E.128", "STG.E.128", "IMAD.WIDE.U32"]},
    "embedding": {
        r"embedding_forward_kernel<uint4, .*": ["LDG.E.128", "STG.E.128"],
        r"embedding_forward_kernel<uint2, .*": ["LDG.E.64", "STG.E.64"],
        r"embedding_sums_kernel<(float, 4|(__nv_bfloat16|__half), 8)>": ["LDG.E.128", "STG.E.128", "SHFL.IDX"],
        r"embedding_parts_kernel<(float, 4|(__nv_bfloat16|__half), 8)>": ["LDG.E.128", "STG.E.128"],
    },
    "layer_norm": {
        r"layer_norm_(forward|backward)_kernel<(float, \(Rows\)\d, 4|(__nv_bfloat16|__half), \(Rows\)\d, 8)>": [
            "LDG.E.128", "STG.E"],
    },
    "linear": {
        **{rf"linear_\w+_kernel<{t}, .*true>": [mma, "LDSM.16", "LDGSTS.E.BYPASS.128", "LDGDEPBAR"] for t, mma in MMA.items()},
        **{rf"linear_\w+_kernel<{t}, .*false>": [mma, "LDSM.16"] for t, mma in MMA.items()},
        r"linear_backward_weight_kernel<.*": ["LDSM.16.MT88.4"],
        r"activation_backward_kernel<.*": ["LDG.E.128", "STG.E.128"],
    },
    "linear_sm90": {
        **{rf"linear_sm90_kernel<{t}, WgmmaShape<{n}, .*": [
            f"HGMMA.64x{n}x16.{types}", "UTMALDG.2D", "SYNCS.PHASECHK", "USETMAXREG"]
           for t, types in WGMMA.items() for n in (256, 128)},
    },
    "loss": {
        r"(cross_entropy|probabilities)_backward_kernel<(float, \d+, 4|(__nv_bfloat16|__half), \d+, 8)>": [
            "LDG.E.128", "STG.E.128", "MUFU.EX2"],
        r"(cross_entropy|probabilities)_forward_kernel<(float, \d+, 4|(__nv_bfloat16|__half), \d+, 8)>": [
            "LDG.E.128", "SHFL.BFLY", "MUFU.EX2"],
    },
    "optim": {
        r"(sgd|adam|lars|grad_scale|grad_clamp)_kernel<.*": ["LDG.E.128", "STG.E.128"],
        r"optim_sums_kernel<.*": ["LDG.E.128", "DADD"],
        r"adam_kernel<.*": ["MUFU.RSQ"],
    },
    "pooling": {
        r"(max|avg)_pool2d_(for|back)ward_kernel<(float, 4|(__nv_bfloat16|__half), 8).*": ["LDG.E.128", "STG.E.128"],
        r"max_pool2d_forward_kernel<(__nv_bfloat16|__half), 8, 1>": ["STG.E.64"],
        r"max_pool2d_backward_kernel<(__nv_bfloat16|__half), 8, unsigned char>": ["LDG.E.64"],
    },
    "pooling_adaptive_max": {
        r"adaptive_max_pool2d_(for|back)ward_kernel<(float, 4|(__nv_bfloat16|__half), 8)>": ["LDG.E.128", "STG.E.128"],
    },
    "pooling_lp": {
        r"lp_pool2d_(forward|slope|backward)_kernel<(float, 4|(__nv_bfloat16|__half), 8), float>": ["LDG.E.128", "STG.E.128"],
        r"lp_pool2d_(forward|slope)_kernel<.*, double>": ["DFMA", "DADD"],
    },
    "positions": {r"rotary_kernel<(float, float, 4|(__nv_bfloat16|__half), \w+, 8)>": ["LDG.E.128", "STG.E.128"]},
    "rnn": {
        **{rf"rnn_forward_kernel<{t}, .*": [mma, "LDSM.16", "LDGSTS.E.BYPASS.128", "LDGDEPBAR", "RED"]
           for t, mma in MMA.items()},
        r"rnn_forward_kernel<float, .*": ["FFMA", "LDS.128", "LDGSTS.E.BYPASS.128", "RED"],
        **{rf"rnn_input_kernel<{t}, .*": [mma, "LDSM.16"] for t, mma in MMA.items()},
    },
    "rnn_options": {
        **{rf"rnn_(product|project)_kernel<{t}, .*": [mma, "LDSM.16", "LDGSTS.E.BYPASS.128"] for t, mma in MMA.items()},
        r"rnn_(product|project)_kernel<float, .*": ["FFMA", "LDS.128", "LDGSTS.E.BYPASS.128"],
        r"rnn_options_forward_kernel<.*": ["SHFL.BFLY", "MUFU.EX2"],
    },
    "rnn_options_backward": {
        **{rf"rnn_(state|project)_backward_kernel<{t}, .*": [mma, "LDSM.16.MT88", "LDGSTS.E.BYPASS.128"]
           for t, mma in MMA.items()},
        r"rnn_(state|project)_backward_kernel<float, .*": ["FFMA", "LDS.128", "LDGSTS.E.BYPASS.128"],
        r"rnn_options_backward_kernel<.*": ["SHFL.BFLY"],
        r"rnn_terms_kernel<.*": ["DADD"],
    },
    "rnn_backward": {
        **{rf"rnn_backward_kernel<{t}, .*": [mma, "LDSM.16.MT88", "LDGSTS.E.BYPASS.128", "RED"] for t, mma in MMA.items()},
        r"rnn_backward_kernel<float, .*": ["FFMA", "LDS.128", "LDGSTS.E.BYPASS.128", "RED"],
    },
}
FORBIDDEN = ("LDL", "STL")

nvcc = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(nvcc is None, reason="nvcc is not installed")


@functools.cache
def nvcc_version() -> str:
    return re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout).group(1)


def build_script():
    spec = importlib.util.spec_from_file_location("dlkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def sources(name: str) -> str:
    """Digest of what decides the machine code of csrc/cuda/<name>.cu, and of what is asked of it."""
    return digest([CUDA / f"{name}.cu"], nvcc_version(), *FLAGS, json.dumps([REQUIRED.get(name), FORBIDDEN]))


def compiled(name: str, architecture: str) -> tuple[Path, str]:
    """cubin of csrc/cuda/<name>.cu and what ptxas said; kept in build/cuda_aot until a source changes."""
    directory = ROOT / "build" / "cuda_aot"
    directory.mkdir(parents=True, exist_ok=True)
    cubin = directory / f"{name}_sm_{architecture}_{sources(name)}.cubin"
    report = cubin.with_suffix(".ptxas")
    if not report.exists():
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        result = subprocess.run(
            [nvcc, *FLAGS, "-gencode", target, str(CUDA / f"{name}.cu"), "-o", str(cubin)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        report.write_text(result.stdout + result.stderr)
    return cubin, report.read_text()


def resources(family: str, architecture: str) -> dict[str, dict[str, int]]:
    rows = build_script().kernel_resources(compiled(family, architecture)[1], family)
    assert rows, "ptxas's report was not understood"
    keys = ("registers", "shared", "stack", "spill_stores", "spill_loads")
    return {row["kernel"]: {key: row[key] for key in keys} for row in rows}


def budget_path(family: str) -> Path:
    return ROOT / "tests" / "budgets" / f"nvcc-{nvcc_version()}" / f"{family}.json"


def budgets_of(family: str) -> dict:
    if not budget_path(family).exists():
        pytest.skip(f"no budgets for nvcc {nvcc_version()}: python tests/test_cuda_aot.py --write")
    return json.loads(budget_path(family).read_text())


def check_resources(family: str, architecture: str, rows: dict[str, dict[str, int]]) -> None:
    for kernel, row in rows.items():
        assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, (family, architecture, kernel)


def test_a_change_anywhere_below_changes_the_digest(tmp_path):
    kernel, header, deep = (tmp_path / name for name in ("k.cu", "h.cuh", "d.cuh"))
    kernel.write_text('#include "h.cuh"\n')
    header.write_text('  #  include "d.cuh"\n#include <cuda.h>\n')
    deep.write_text("int x;")
    first = digest([kernel], "-O3")
    assert first == digest([kernel], "-O3") != digest([kernel], "-O2")
    deep.write_text("int y;")
    assert digest([kernel], "-O3") != first
    assert module_file("dlkern.kernels.conv") == [ROOT / "kernels" / "conv.py"] and not module_file("dlkern.kernels.nothing")


@every_build
def test_budgets_hold_no_spill(family, architecture):
    """The budgets themselves: writing them again must not make a spill the norm."""
    rows = budgets_of(family)[f"sm_{architecture}"]
    assert rows
    check_resources(family, architecture, rows)


@every_build
def test_budgets(family, architecture):
    budgets = budgets_of(family)
    skip_if_unchanged(budgets["sources"], sources(family), family in ALWAYS)
    recorded, found = budgets[f"sm_{architecture}"], resources(family, architecture)
    if budgets["sources"] == sources(family):
        assert found == recorded, "the same sources, and other machine code than was written down"
    assert sorted(found) == sorted(recorded), "kernels came or went: write new budgets"
    over = {
        kernel: {key: (value, recorded[kernel][key]) for key, value in row.items() if value > recorded[kernel][key]}
        for kernel, row in found.items()
    }
    assert not {kernel: row for kernel, row in over.items() if row}
    check_build(family, architecture)


def check_build(family: str, architecture: str) -> None:
    """What no change may lose: no spills, and the instructions of REQUIRED."""
    check_resources(family, architecture, resources(family, architecture))
    # ptxas says so where it makes wgmma wait, or leaves setmaxnreg out.
    assert not re.search("serialized|C75[01]", compiled(family, architecture)[1])
    check_instructions(family, architecture)


def disassembler() -> str | None:
    try:
        import triton
    except ImportError:
        return shutil.which("nvdisasm")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(path) if path.exists() else shutil.which("nvdisasm")


def opcodes(cubin: Path) -> dict[str, set[str]]:
    """Opcodes of each kernel, by its name with template arguments."""
    text = subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    for part in re.split(r"\.section\s+\.text\.", text)[1:]:
        name = build_script().demangled(re.match(r"[\w$]+", part).group(0))
        found[name] = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", part, re.MULTILINE))
    return found


def check_instructions(family: str, architecture: str) -> None:
    if disassembler() is None:
        pytest.skip("no nvdisasm (Triton's wheel carries one)")
    kernels = opcodes(compiled(family, architecture)[0])
    assert sorted(kernels) == sorted(resources(family, architecture))
    for pattern, required in REQUIRED[family].items():
        matching = {name: ops for name, ops in kernels.items() if re.fullmatch(pattern, name)}
        assert matching, f"no kernel matches {pattern}"
        for name, ops in matching.items():
            for opcode in required:
                assert any(re.match(opcode, op) for op in ops), f"{name} has no {opcode}"
    for name, ops in kernels.items():
        assert not [op for op in ops if op.startswith(FORBIDDEN)], f"{name} uses local memory"


@pytest.mark.parametrize("name,architecture", [("conformance", "80"), ("conformance_sm90", "90a")])
def test_conformance_program_compiles(name, architecture):
    cubin, _ = compiled(name, architecture)
    assert cubin.stat().st_size > 0


def test_copies_for_other_gpus_are_told_by_their_shared_memory(tmp_path):
    """runs_on_hopper() takes a kernel without static shared memory for an empty copy: all of sm_90a's have some, and a build
    for sm_90, which knows no wgmma, has none."""
    for family in FAMILIES:
        if family.endswith("_sm90"):
            assert all(row["shared"] > 0 for row in budgets_of(family)["sm_90a"].values()), family
    report = subprocess.run(
        [nvcc, *FLAGS, "-gencode", "arch=compute_90,code=sm_90", str(CUDA / "linear_sm90.cu"), "-o", str(tmp_path / "cubin")],
        capture_output=True, text=True, check=True)
    rows = build_script().kernel_resources(report.stdout + report.stderr, "linear_sm90")
    assert rows and not any(row["shared"] for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["conformance", "conformance_sm90"])
def test_instructions_of_the_hardware_and_their_host_twins_agree(tmp_path, name):
    """Each function of ptx.cuh or hopper.cuh on the GPU against its twin in csrc/cuda_on_host, word by word."""
    hopper = name == "conformance_sm90"
    if hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper")
    device, host, source = tmp_path / "device", tmp_path / "host", str(CUDA / f"{name}.cu")
    target = "-gencode=arch=compute_90a,code=sm_90a" if hopper else "-arch=native"
    runtime = [str(path) for path in sorted((ROOT / "csrc" / "cuda_on_host").glob("*.cpp"))]
    subprocess.run([nvcc, "-std=c++20", "-O3", target, source, "-o", str(device)], check=True)
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-w", "-fno-strict-aliasing", *runtime, "-x", "c++", source, "-o", str(host)],
        check=True)
    lines = [subprocess.run([p], capture_output=True, text=True, check=True).stdout.splitlines() for p in (device, host)]
    assert len(lines[0]) == len(lines[1]) > 0
    differing = [pair for pair in zip(*lines) if pair[0] != pair[1]]
    assert not differing, differing[:20]


def write_budgets(families: list[str]) -> None:
    """Budgets of the families, or of those whose sources changed; none is written of a build that fails the checks."""
    for family in families or FAMILIES:
        path = budget_path(family)
        if not families and path.exists() and json.loads(path.read_text()).get("sources") == sources(family):
            continue
        for architecture in ARCHITECTURES[family]:
            check_build(family, architecture)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {f"sm_{architecture}": resources(family, architecture) for architecture in ARCHITECTURES[family]}
        lines = [
            f'  "{architecture}": {{\n'
            + ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in kernels.items())
            + "\n  }"
            for architecture, kernels in rows.items()
        ]
        path.write_text(f'{{\n  "sources": "{sources(family)}",\n' + ",\n".join(lines) + "\n}\n")
        print(family, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    write_budgets(sys.argv[2:])
