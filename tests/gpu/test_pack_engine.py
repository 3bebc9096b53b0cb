"""The engine archive: which device code of a library stays."""

import struct
from pathlib import Path

import pytest
from pack_engine import SM, device_code, is_left_out, strip

MACHINE_CODE, PTX = 2, 1


def entry(kind: int, architecture: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", architecture)
    return header.ljust(64, b"\0") + code


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return b"\x50\xed\x55\xba" + struct.pack("<HHQ", 1, 16, len(body)) + body


def test_only_machine_code_of_the_gpu_stays(tmp_path):
    library = tmp_path / "lib.so"
    binary = fat_binary(entry(MACHINE_CODE, 80, b"old!" * 8), entry(MACHINE_CODE, SM, b"good" * 8), entry(PTX, SM, b"text" * 8))
    library.write_bytes(b"host code" + b"\x50\xed\x55\xba by chance " + bytes(64) + binary + b"more host code")
    size = library.stat().st_size
    assert len(list(device_code(library.read_bytes()))) == 3
    assert strip(library) == (32, 64)
    blob = library.read_bytes()
    assert len(blob) == size and b"good" * 8 in blob and b"host code" in blob and blob.endswith(b"more host code")
    assert b"old!" not in blob and b"text" not in blob


def test_a_library_without_code_for_the_gpu_is_an_error(tmp_path):
    library = tmp_path / "lib.so"
    library.write_bytes(fat_binary(entry(MACHINE_CODE, 80, b"old!" * 8)))
    with pytest.raises(ValueError, match=f"lib.so has no code for sm_{SM}"):
        strip(library)


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("vllm/_flashmla_C.abi3.so", True),
        ("vllm/_moe_C.abi3.so", False),
        ("vllm/model_executor/layers/fused_moe/configs/E=64,N=1024,device_name=NVIDIA_A100.json", True),
        ("vllm/model_executor/layers/fused_moe/configs/E=64,N=1024,device_name=NVIDIA_H100_80GB_HBM3.json", False),
        ("vllm/config.json", False),
    ],
)
def test_files_that_are_left_out(path, left_out):
    assert is_left_out(Path(path)) is left_out
