"""One folder from which a notebook without internet installs: ``make offline OUT=FOLDER`` (docs/offline.md).

``wheels/`` for each Python and ``lock-3.12.txt`` with their versions; ``source/``, this repository; ``models/``, the
scorers' and others that are on this machine; ``install.ipynb``, the cells; and last ``SHA256SUMS`` of all of it. Files
appear whole or not at all; the same command again fetches what is missing.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from huggingface_hub import snapshot_download
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from malpyeong.errors import InputError, counted
from malpyeong.files import digest, write_text, writing
from malpyeong.terminal import Command
from tools.constraints import ROOT, TOGETHER

PYTHONS = ("3.12", "3.13")  # Kaggle's and Colab's
SCORERS = ("bert-base-multilingual-cased", "lucadiliello/BLEURT-20")
SOURCE = ("malpyeong", "recipes", "tools", "constraints", "notebooks", "docs", "requirements.lock", "pyproject.toml")
SOURCE += ("Makefile", "README.md", "README.en.md", "LICENSE")
OTHER_WEIGHTS = {".h5", ".msgpack", ".onnx", ".ot"}  # of other libraries than torch
# Ubuntu 22.04, which both notebooks run on, has glibc 2.35.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}


class PipError(InputError):
    """pip has failed: its reason in one line."""


def pip(*arguments: str | Path) -> str:
    """Run pip and return what it prints.

    Raises:
        PipError: it failed.
    """
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if not result.returncode:
        return result.stdout
    reasons = re.findall(r"^ERROR: (.+)", result.stderr, re.MULTILINE) or result.stderr.strip().splitlines()[-1:]
    if re.search(r"connection (broken|error|refused|reset)|timed out|name resolution", result.stderr, re.IGNORECASE):
        reasons = [f"no package index can be reached; connect and start the same command again ({reasons[0]})"]
    raise PipError(f"pip {arguments[0]}: {reasons[0] if reasons else f'exit code {result.returncode}'}")


def resolve(wanted: Sequence[str], lock: Path) -> dict[str, Mapping[str, Any]]:
    """Return the metadata of every package that pip would install, by name."""
    quiet = ["--quiet", "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report=-"]
    report = pip("install", *quiet, "--constraint", lock, *wanted)
    packages = [item["metadata"] for item in json.loads(report)["install"]]
    return {canonicalize_name(package["name"]): package for package in packages}


def reach(
    wanted: Sequence[str], packages: Mapping[str, Mapping[str, Any]], python: str, without: Collection[str]
) -> tuple[set[str], list[str]]:
    """Return the names that a Python needs, and requirements of it that are not among the packages.

    pip evaluates markers for the Python that it runs on, whatever Python it is asked for.
    """
    environment = {**LINUX, "python_version": python, "python_full_version": f"{python}.0"}
    reached: dict[str, set[str]] = {}
    missing, waiting = [], [Requirement(line) for line in wanted]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras} - reached.get(name, set())
        if not extras or name in without:
            continue
        reached.setdefault(name, set()).update(extras)
        if name not in packages:
            missing.append(f"{name}{requirement.specifier}")
            continue
        for line in map(Requirement, packages[name].get("requires_dist", [])):
            if line.marker is None or any(line.marker.evaluate({**environment, "extra": extra}) for extra in extras):
                waiting.append(line)
    return {*reached}, missing


def wheel_of(name: str, version: str, python: str, wheels: Path) -> Path | None:
    """Return the wheel of a package for a Python, or None where there is none in the folder yet."""
    numbers = tuple(map(int, python.split(".")))
    tags = {
        *cpython_tags(numbers, platforms=PLATFORMS),
        *compatible_tags(numbers, f"cp{numbers[0]}{numbers[1]}", PLATFORMS),
    }
    for path in wheels.glob("*.whl"):
        own, number, _, of = parse_wheel_filename(path.name)
        if own == name and number.public == Version(version).public and not tags.isdisjoint(of):
            return path
    return None


def fetch(name: str, version: str, python: str, wheels: Path, part: Path) -> Path:
    """Download a package's wheel, or make it where only its source is there and holds nothing to compile.

    Raises:
        InputError: neither can be done.
    """
    pin = f"{name}=={Version(version).public}"
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    try:
        pip("download", "--no-deps", "--dest", part, *target, *(f"--platform={name}" for name in PLATFORMS), pin)
    except PipError as error:
        if "satisfies" not in error.message or "no package index" in error.message:
            raise
        pip("wheel", "--no-deps", "--wheel-dir", part, pin)
    (file,) = part.glob("*.whl")
    if not wheel_of(name, version, python, part):
        raise InputError(
            f"{pin}: there is no wheel for Python {python} on Linux; {file.name} is for this machine alone"
        )
    return file.replace(wheels / file.name)


def copy_source(folder: Path) -> None:
    """Copy the parts of this repository that a notebook needs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (ROOT / name for name in SOURCE):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(path, folder)


def model_files(name: str) -> dict[str, Path]:
    """Return the files of a model's folder, or of a hub id in this machine's cache, by their path in it; {} if none."""
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return {}
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in OTHER_WEIGHTS]
    safe = any(path.suffix == ".safetensors" for path in files)
    weights = ".safetensors" if safe else ".bin"
    if not any(path.suffix == weights for path in files):
        return {}
    return {str(path.relative_to(folder)): path for path in files if not (safe and path.suffix == ".bin")}


def copy_models(names: Sequence[str], out: Path, part: Path) -> None:
    """Copy models into ``out``/models, each under the last part of its name.

    Raises:
        InputError: one that is not of :data:`SCORERS` is not here.
    """
    for name in (*SCORERS, *names):
        files = model_files(name)
        if not files and name in names:
            raise InputError(f"{name}: is no folder with weights, nor in the hub's cache: hf download {name}")
        if not files:
            click.echo(f"left out: {name} is not in the hub's cache (hf download {name})")
        for relative, source in files.items():
            target = out / "models" / Path(name).resolve().name / relative
            if not (target.exists() and digest(target) == digest(source)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, part / "file")
                (part / "file").replace(target)


def check_out(out: Path) -> None:
    """Make sure that the folder may be filled.

    Raises:
        InputError: it lies in this repository, or holds something else.
    """
    if out.resolve().is_relative_to(ROOT.resolve()):
        raise InputError(f"{out}: lies in the repository; name a folder outside of it (make offline OUT=/tmp/pack)")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is no folder")
    ours = re.compile(r"wheels|models|source|install\.ipynb|SHA256SUMS|\.part|lock-3\.\d+\.txt")
    others = [path.name for path in out.glob("*") if not ours.fullmatch(path.name)]
    if others:
        raise InputError(f"{out}: holds {others[0]}, which is not of such a pack; choose another folder")


def collect(
    out: Path,
    pythons: Sequence[str],
    lock: Path,
    extras: Sequence[str],
    without: Collection[str],
    models: Sequence[str],
) -> None:
    """Fill the folder; see the module."""
    wheels, part = out / "wheels", out / ".part"
    for path in (out / "SHA256SUMS", *out.glob("lock-*.txt")):
        path.unlink(missing_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    for folder in (wheels, part):
        folder.mkdir(parents=True, exist_ok=True)
    copy_models(models, out, part)
    copy_source(out / "source")
    shutil.copytree(out / "source", part / "build")
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", part, part / "build")
    (own,) = part.glob("malpyeong-*.whl")
    own = own.replace(wheels / own.name)
    wanted = [f"malpyeong[{','.join(extras)}] @ {own.resolve().as_uri()}", "setuptools>=77"]
    kept = {own}
    packages = resolve(wanted, lock)
    for python in pythons:
        reached, missing = reach(wanted, packages, python, without)
        while missing:
            wanted += missing
            packages = resolve(wanted, lock)
            reached, missing = reach(wanted, packages, python, without)
        pins = {name: str(packages[name]["version"]) for name in sorted(reached)}
        for name, version in pins.items():
            wheel = wheel_of(name, version, python, wheels)
            if wheel is None:
                wheel = fetch(name, version, python, wheels, part)
                click.echo(f"Python {python}: {wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB)")
            kept.add(wheel)
        lines = [f"{name}=={Version(version).public}\n" for name, version in pins.items()]
        write_text(out / f"lock-{python}.txt", "".join(lines))
    for stale in {*wheels.glob("*.whl")} - kept:
        stale.unlink()
    shutil.rmtree(part)
    shutil.copyfile(ROOT / "notebooks" / "offline.ipynb", out / "install.ipynb")
    sums = [f"{digest(path)}  {path.relative_to(out).as_posix()}\n" for path in sorted(files_in(out))]
    write_text(out / "SHA256SUMS", "".join(sums))


def files_in(folder: Path) -> Iterator[Path]:
    """Yield every file under a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


@click.command(cls=Command)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--python", "pythons", multiple=True, default=PYTHONS, show_default=True, help="May be given again.")
@click.option("--cpu", is_flag=True, help="The packages of requirements.lock, not those of constraints/gpu.txt.")
@click.option("--without-torch", is_flag=True, help="Leave out torch and what only it needs: the notebook has one.")
@click.option("--model", "models", multiple=True, help="Folder, or hub id that is in the cache; may be given again.")
def main(out: Path, pythons: Sequence[str], cpu: bool, without_torch: bool, models: Sequence[str]) -> None:
    """Collect in OUT what a notebook without internet needs. The same command again fetches what is missing."""
    check_out(out)
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["requires-python"]
    for python in pythons:
        if not re.fullmatch(r"3\.\d+", python) or Version(python) not in SpecifierSet(supported):
            raise InputError(f"--python {python}: name one of Python {supported}, as 3.12")
    lock = ROOT / ("requirements.lock" if cpu else "constraints/gpu.txt")
    if not lock.is_file():
        raise InputError(f"{lock}: no such lock; take it from the repository, or write it again with make lock")
    extras = ["rules", "retrieval", *([] if cpu else ["gpu"])]
    with writing(out):
        collect(out, pythons, lock, extras, TOGETHER if without_torch else (), models)
    sizes = [sum(path.stat().st_size for path in files_in(out / name)) / 1e6 for name in ("wheels", "models")]
    number = counted(len([*(out / "wheels").iterdir()]), "wheel")
    click.echo(f"{out}: Python {', '.join(pythons)}; {number}, {sizes[0]:,.0f} MB; models, {sizes[1]:,.0f} MB")


if __name__ == "__main__":
    main()
