"""What must be settled before torch, Unsloth or trl are imported: environment variables and package versions."""

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

# Unsloth's compiled code depends on all of them.
_COMPILED_WITH = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl")


def prepare_environment() -> None:
    """Set environment variables that are read once, early; what the user has set stays.

    - ``CUDA_VISIBLE_DEVICES=0``: the recipes are for one GPU. Where there are two (Kaggle's T4s) the trainer would
      otherwise spread the batch over both, which neither 4-bit weights nor Unsloth can do.
    - ``UNSLOTH_COMPILE_LOCATION``: a folder for this set of versions. Code that another version compiled would be used
      unseen.
    - ``UNSLOTH_DISABLE_STATISTICS``: Unsloth would ask the hub for a file to count its users, and waits when offline.
    """
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    versions = "-".join(version(name) or "none" for name in _COMPILED_WITH)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache / "malpyeong" / f"unsloth-{versions}"))


def version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_problems(package: str, missing: bool = True) -> Iterator[str]:
    """Yield a line for every requirement of an installed package that this environment does not meet.

    Args:
        package: ``malpyeong`` for our own pins, ``unsloth`` or ``unsloth_zoo`` for what they can work with.
        missing: whether a package that is not installed at all counts.
    """
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            if not missing:
                continue
            yield f'{requirement.name} is not installed; {package} needs {wanted}: pip install "{wanted}"'
        elif not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            yield f'{requirement.name} is {found}; {package} needs {wanted}: pip install "{wanted}"'
