"""What must be settled before models are loaded: environment variables, package versions, the memory allocator."""

import ctypes
import functools
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from malpyeong.errors import InputError

_ROOT = Path(__file__).parents[2]

# Compiled code depends on all of them.
_COMPILED_WITH = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl")

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare_environment() -> None:
    """Set environment variables that are read once, early; what the user has set stays.

    - ``CUDA_VISIBLE_DEVICES=0``: one process trains on one GPU. Where there are two (Kaggle's T4s) the trainer would
      otherwise spread the batch over both, which neither 4-bit weights nor Unsloth can do.
    - ``UNSLOTH_DISABLE_STATISTICS``: Unsloth would ask the hub for a file to count its users, and waits when offline.
    - Where compiled code is kept: see :func:`keep_compiled_code`.

    Of several processes only the first one prints.
    """
    if processes() == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if not is_main_process():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 -- until the process ends
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    keep_compiled_code()


def processes() -> int:
    """Return how many processes train together, as ``accelerate launch`` and ``torchrun`` say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Tell whether this is the process that writes and prints: the only one, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def keep_compiled_code() -> Path:
    """Have compiled code kept for the next start, and return the folder that Inductor keeps its own in.

    Unsloth's, Inductor's and Triton's lie in one folder for this set of versions (code that another version compiled
    would be used unseen), but for what the user has set. Unsloth forgets Inductor's when it is imported, so that this
    is called again after that.
    """
    os.environ.update(_compiled_code())
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


@functools.cache
def _compiled_code() -> dict[str, str]:
    versions = "-".join(version(name) or "none" for name in _COMPILED_WITH)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "malpyeong" / f"compiled-{versions}"
    names = ("UNSLOTH_COMPILE_LOCATION", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: os.environ.get(name) or str(kept / name.split("_")[0].lower()) for name in names}


def keep_freed_memory() -> None:
    """Have this process keep the memory of large tensors that it frees, for the next ones.

    Where a model computes on a CPU: glibc hands every block over 32 MiB back to the system, and each new one is then
    filled with zeros page by page. Generation copies its whole KV cache at every token; this was half of its time
    (docs/prediction.md). At its peak the process holds a little more. An allocator that the user has set up
    (``MALLOC_…_``, ``GLIBC_TUNABLES``) is left alone, and so is another libc's.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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

    Raises:
        InputError: the package can be imported, but is not installed.
    """
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        cure = f'pip install --editable "{_ROOT}"' if package == "malpyeong" else f"pip install {package}"
        raise InputError(
            f"{package} is on the path but not installed, so that versions cannot be checked: {cure}"
        ) from None
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if installed is None:
            if not missing:
                continue
            yield f'{requirement.name} is not installed; {package} needs {wanted}: pip install "{wanted}"'
        elif not requirement.specifier.contains(installed.partition("+")[0], prereleases=True):
            yield f'{requirement.name} is {installed}; {package} needs {wanted}: pip install "{wanted}"'
