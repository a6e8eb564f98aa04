"""Repeat a prediction and compare it byte for byte: ``python -m malpyeong.reproduce RUN``.

Exit code 0: the same bytes; 1: not, and where; 2: something needed is missing or damaged.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from malpyeong import predict
from malpyeong.contest.records import load_records
from malpyeong.errors import InputError, printable
from malpyeong.files import check_writable, digest, read_text
from malpyeong.terminal import Command


def find_manifest(run: Path) -> Path:
    """Return the manifest that ``run`` is, stands beside, or holds.

    Raises:
        InputError: there is none, or there are several.
    """
    if run.is_dir():
        found = sorted(run.glob("*.manifest.json"))
        if len(found) == 1:
            return found[0]
        several = f"holds {len(found)} predictions; name one of them, as {found[0]}" if found else ""
        raise InputError(f"{run}: {several or 'holds no prediction with a manifest (NAME.manifest.json)'}")
    manifest = run if run.name.endswith(".manifest.json") else predict.manifest_of(run)
    if run.exists() and not manifest.exists():
        raise InputError(f"{run}: has no {manifest.name} beside it, which python -m malpyeong.predict writes")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        InputError: it is missing, damaged, or of a version with other options.
    """
    try:
        manifest: dict[str, Any] = json.loads(read_text(path, "the manifest of a prediction"))
        sections = [manifest[name] for name in ("sha256", "options", "made_of", "environment")]
        if not all(isinstance(section, dict) and section for section in sections):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: is damaged, or no manifest of a prediction") from None
    names = {str(parameter.name) for parameter in predict.main.params} - {"output"}
    if other := sorted(names ^ {*manifest["options"]}):
        raise InputError(f"{path}: was written by a version with other options ({', '.join(other)}); use that version")
    return manifest


def find_inputs(path: Path, manifest: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, str | None]:
    """Return where a prediction's inputs are: named by ``moved``, or where they were from the manifest's folder.

    Raises:
        InputError: one is not there.
    """
    inputs: dict[str, str | None] = {}
    for name in predict.INPUTS:
        value = inputs[name] = moved.get(name, manifest["options"][name])
        if name in moved or value is None or not str(value).startswith("."):  # a hub id
            continue
        inputs[name] = str(path.parent / str(value))
        if not Path(str(inputs[name])).exists():
            raise InputError(f"{path}: its {name}, {value}, is not there; say where it is with --input {name}=PATH")
    return inputs


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs, each with its name; of a folder's digests, file by file."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key}: {line}" for line in differences(old, new))
        elif old != new:
            shown = [str(value)[:12] if isinstance(value, str | int) else "none" for value in (old, new)]
            yield f"{key} {shown[0]} → {shown[1]}"


def first_difference(before: Path, now: Path) -> str:
    """Return where two files differ first: record and character of its answer, else line and character."""
    try:
        pairs = list(zip(load_records(before), load_records(now), strict=True))
        texts = [(f'id "{a.id}"', a.answer or "", b.answer or "") for a, b in pairs if a.id == b.id]
    except (InputError, ValueError):
        texts = []
    lines = [path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True) for path in (before, now)]
    texts += [(f"line {n}", a, b) for n, (a, b) in enumerate(itertools.zip_longest(*lines, fillvalue=""), 1)]
    where, old, new = next((text for text in texts if text[1] != text[2]), ("nowhere", "", ""))
    at = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    shown = [printable(text[at : at + 30]) for text in (old, new)]
    return f"{printable(where)}, character {at + 1}: {shown[0]!r} → {shown[1]!r}"


def repeat(manifest: Mapping[str, Any], inputs: Mapping[str, str | None], output: Path) -> None:
    """Predict again, with the options of a manifest."""
    words, arguments = [], []
    for parameter in predict.main.params:
        value = {**manifest["options"], **inputs, "output": str(output)}[str(parameter.name)]
        if isinstance(parameter, click.Argument):
            arguments.append(str(value))
        elif value is True:
            words.append(parameter.opts[-1])
        elif value is not None and value is not False:
            words.append(f"--{parameter.opts[-1].lstrip('-')}={value}")
    predict.main.main([*words, "--", *arguments], "predict", standalone_mode=False)


@click.command(cls=Command)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "moved",
    metavar="NAME=PATH",
    multiple=True,
    help=f"Where an input is that has moved; NAME is one of {', '.join(predict.INPUTS)}. May be given again.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Keep the repetition; a killed one resumes there."
)
def main(run: Path, moved: Sequence[str], output: Path | None) -> None:
    """Repeat the prediction RUN from its manifest and compare it byte for byte.

    RUN is a prediction, its manifest (NAME.manifest.json), or a folder that holds one. Inputs are looked for where they
    were from the manifest's folder. If one has changed, nothing is repeated. Exit code 0: the same; 1: not; 2: an
    input is missing or damaged.
    """
    path = find_manifest(run)
    manifest = read_manifest(path)
    names = dict(word.partition("=")[::2] for word in moved)
    if unknown := sorted({*names} - {*predict.INPUTS}):
        raise InputError(f"--input {unknown[0]}: name one of {', '.join(predict.INPUTS)}")
    inputs = find_inputs(path, manifest, names)
    first, *_ = (path.parent / name for name in manifest["sha256"])
    if output:
        check_writable(output, first, path, *inputs.values())
    from malpyeong.models.load import tokenizer_for_prediction

    tokenizer = tokenizer_for_prediction(str(inputs["model"]), inputs["adapter"])
    now = predict.digests(inputs, tokenizer)
    if changed := [*differences({key: manifest["made_of"].get(key) for key in now}, now)]:
        raise click.ClickException(f"{path}: not repeated; what it was made from has changed: {'; '.join(changed[:5])}")
    others = [*differences(manifest["environment"], predict.environment())]
    for line in others:
        click.echo(f"differs here: {line}")
    with tempfile.TemporaryDirectory() as folder:
        again = output or Path(folder) / first.name
        repeat(manifest, inputs, again)
        for name, expected in manifest["sha256"].items():
            before, new = path.parent / name, again.with_name(name.replace(first.stem, again.stem, 1))
            if digest(before if before.exists() else new) == digest(new) == expected:
                click.echo(f"{before}: the same, byte for byte ({expected})")
                continue
            where = first_difference(before, new) if before.exists() else "it is not there to be compared"
            edited = before.exists() and digest(before) != expected
            cause = "; the file is not what the prediction wrote" if edited else ""
            if others and digest(new) != expected:
                cause += f"; differs here: {'; '.join(others[:5])}"
            raise click.ClickException(f"{before}: another prediction: {where}{cause}")


if __name__ == "__main__":
    main()
