"""Pack vLLM's CUDA release into one archive that a Hopper host without a network can import: `make gpu-archive`.

The host has Python 3.12, torch 2.11 for CUDA 13, Triton 3.6 and transformers (docs/gpu.md). The archive adds vLLM and the small
wheels that it imports when it starts. It must stay under 64 MiB with the tree beside it, so what an unquantised MoE model on Hopper
never touches goes: device code of other GPUs (zeroed in place, which only pays once compressed, and keeps every offset), whole
libraries, tuning files of other devices. Quantised models, FlashInfer and FlashMLA do not run with it.

    python benchmarks/pack_engine.py --version 0.32.0 --out build/engine.tar.xz
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

SM = 90
# What vLLM imports when it starts and a plain PyTorch image lacks; where vLLM pins a version, that one.
WHEELS = (
    *("annotated-types", "apache-tvm-ffi", "cachetools", "cbor2", "compressed-tensors==0.17.0", "fastapi>=0.133,<0.137", "httpx2"),
    *("llguidance>=1.7,<1.8", "loguru", "msgspec", "openai", "openai-harmony", "partial-json-parser", "pybase64", "pydantic"),
    *("pydantic-core", "pyzmq", "sniffio", "starlette", "typing-inspection", "xgrammar==0.2.8"),
)
GLIBC = (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64")
# Libraries that are used, and lose the code of other GPUs.
STRIPPED = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so", "_C.abi3.so", "_moe_C.abi3.so")
LEFT_OUT = (
    *("_vllm_fa2_C.abi3.so", "_flashmla_C.abi3.so", "_flashmla_extension_C.abi3.so", "_qutlass_C.abi3.so", "_flashkda_C.abi3.so"),
    *("_deepselect_C.abi3.so", "_rust_tool_parser.abi3.so", "vllm-rs"),
)
FOLDERS_LEFT_OUT = (
    *("third_party/deep_gemm", "third_party/flashkda", "third_party/flashmla", "third_party/fmha_sm100"),
    *("vllm_flash_attn/cute", "entrypoints/serve/instrumentator/static"),
)
# A fat binary: magic, version, size of this header, bytes that follow; then entries of device code, each with a header of its own.
_MAGIC = b"\x50\xed\x55\xba"
_MACHINE_CODE = 2
_ENTRY_KINDS = (1, _MACHINE_CODE, 16, 64)


def device_code(blob: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, start, size) of every piece of device code in a library's fat binaries."""
    at = 0
    while (at := blob.find(_MAGIC, at)) >= 0:
        version, header, size = struct.unpack_from("<HHQ", blob, at + 4)
        if version != 1 or header != 16 or size > len(blob) - at:
            at += 4  # these bytes by chance
            continue
        entry, end = at + header, at + header + size
        while entry + 64 <= end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", blob, entry)
            if kind not in _ENTRY_KINDS or not 64 <= entry_header <= 4096:
                break
            yield kind, struct.unpack_from("<I", blob, entry + 28)[0], entry + entry_header, entry_size
            entry += entry_header + entry_size
        at = end


def strip(library: Path) -> tuple[int, int]:
    """Zero, in place, all device code but machine code for `SM`; returns the bytes kept and zeroed.

    Raises:
        ValueError: nothing would be left, so the library is not built for this GPU.

    """
    blob = bytearray(library.read_bytes())
    kept = zeroed = 0
    for kind, architecture, start, size in list(device_code(blob)):
        if kind == _MACHINE_CODE and architecture == SM:
            kept += size
        else:
            blob[start : start + size] = bytes(size)
            zeroed += size
    if zeroed and not kept:
        raise ValueError(f"{library.name} has no code for sm_{SM}")
    library.write_bytes(blob)
    return kept, zeroed


def download(folder: Path, *requirements: str) -> None:
    """Wheels for the host, whatever this machine is."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    subprocess.run([*command, *(word for name in PLATFORMS for word in ("--platform", name)), *requirements], check=True)


def is_left_out(path: Path) -> bool:
    """Whether a file of vLLM is of no use on the host."""
    tuned = path.suffix == ".json" and "configs" in path.parts
    return path.name in LEFT_OUT or (tuned and not any(name in path.name for name in ("H100", "H200")))


def lay_out_engine(version: str, scratch: Path) -> Path:
    """Download, unpack and strip; returns the folder to import from."""
    wheels, site = scratch / "wheels", scratch / "site"
    download(wheels, f"vllm=={version}", *WHEELS)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    for name in FOLDERS_LEFT_OUT:
        shutil.rmtree(site / "vllm" / name, ignore_errors=True)
    for path in sorted(path for path in (site / "vllm").rglob("*") if path.is_file()):
        if is_left_out(path):
            path.unlink()
        elif path.name in STRIPPED:
            kept, zeroed = strip(path)
            print(f"{path.name}: {kept >> 10} KiB of sm_{SM} kept, {zeroed >> 10} KiB zeroed", flush=True)
    return site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="0.32.0", help="release of vLLM (default: 0.32.0)")
    parser.add_argument("--out", type=Path, default=Path("build/engine.tar.xz"), help="(default: build/engine.tar.xz)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        site = lay_out_engine(args.version, Path(scratch))
        with tarfile.open(args.out, "w:xz", preset=6) as archive:
            archive.add(site, "site")
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
