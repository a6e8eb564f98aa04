"""Which versions to install: constraints for pip. Needs nothing that is not in Python, but packaging where torch is.

python tools/constraints.py platform FILE       this machine's own torch, where that is in range, else what was tested
pip … --report - | python tools/constraints.py lock FILE        every package that pip would install (make lock)
"""

import json
import re
import shutil
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOGETHER = ("torch", "torchvision", "torchaudio", "triton")  # none can be replaced alone


def platform() -> list[str]:
    """Return constraints that keep the torch that is installed; or, where there is none in range, a file's lines."""
    kept = {}
    for name in TOGETHER:
        try:
            kept[name] = version(name)
        except PackageNotFoundError:
            continue
    if "torch" in kept and _in_range(kept["torch"]):
        return [f"{name}=={number}" for name, number in kept.items()]
    tested = "constraints/gpu.txt" if shutil.which("nvidia-smi") else "requirements.lock"
    return (ROOT / tested).read_text("utf-8").splitlines()


def lock(report: str) -> list[str]:
    """Return ``name==version`` of what a report of pip's would install, but for ourselves and what makes packages.

    Builds for one kind of machine (``2.13.0+cpu``) count as the version that they are of.
    """
    packages = [item["metadata"] for item in json.loads(report)["install"]]
    names = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in packages}
    own = ("malpyeong", "setuptools", "wheel")
    return [f"{name}=={number.partition('+')[0]}" for name, number in sorted(names.items()) if name not in own]


def _in_range(torch: str) -> bool:
    from packaging.requirements import Requirement

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    (ours,) = (line for line in map(Requirement, dependencies) if line.name == "torch")
    return ours.specifier.contains(torch.partition("+")[0])


if __name__ == "__main__":
    command, file = sys.argv[1:]
    lines = platform() if command == "platform" else lock(sys.stdin.read())
    Path(file).write_text("\n".join(lines) + "\n", "utf-8")
