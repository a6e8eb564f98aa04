"""Every command that reads a file, on 30 kinds of broken file: one line that names it, exit code 2, nothing written."""

import gzip
import importlib
import io
import json
import os
import pickle
import runpy
import shutil
import zipfile
from functools import lru_cache

import pytest
from click.testing import CliRunner

from malpyeong.contest.records import load_records, write_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.prompts.context import write_contexts
from malpyeong.samples import DATA, TINY_BASE
from tests.conftest import ROOT

GOLD, DEV = (load_records(DATA / f"{split}.json", "gold")[:4] for split in ("test", "dev"))
GOOD = [record.to_json() for record in GOLD]
TEXT = json.dumps(GOOD, ensure_ascii=False)


def changed(**changes):
    return json.dumps([{**GOOD[0], **changes}, *GOOD[1:]], ensure_ascii=False).encode()


def zipped():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("train.json", TEXT)
    return data.getvalue()


def loop(path):
    path.symlink_to(path.name)


KINDS = {
    "empty": b"",
    "white space": b" \r\n\t",
    "not JSON": "번호,질문\n1,무엇".encode(),
    "cut off": TEXT[:-40].encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16 without mark": TEXT.encode("utf-16-le"),
    "CP949": "한글 맞춤법, 표준어 규정".encode("cp949"),
    "NUL bytes": b"\0" * 1_000,
    "binary": bytes(range(256)) * 40,
    "a folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "a link to itself": loop,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "no keys": b'[{}, {"a": 1}]',
    "a list of numbers": b"[1, 2, 3]",
    "null": b"null",
    "a number": b"17",
    "a huge number": b'[{"id": ' + b"9" * 10_000 + b"}]",
    "a number beyond floats": b'{"id": 1e999, "question": 1e999, "rules": 1e999, "candidates": 1e999}',
    "NaN": b'[{"id": NaN, "input": NaN}]',
    "an empty list": b"[]",
    "an empty object": b"{}",
    "empty strings": b'{"id": "", "question": "", "input": "", "category": "", "text": "", "": ""}',
    "deep nesting": b'{"id":' * 100_000,
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "JSON behind JSON": (TEXT + TEXT).encode(),
    "lines among JSON": (TEXT + "\n" + json.dumps(GOOD[0]) + "\n").encode(),
    "half a surrogate pair": b'{"id": "\\ud800", "question": "\\udfff", "rules": [], "1": "\\ud800"}',
    "zip": zipped(),
    "pickle": pickle.dumps(GOOD),
    "gzip": gzip.compress(TEXT.encode()),
    "a page that is no file": b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>",
}
# Of records alone.
RECORDS = {
    "an id that is a number": changed(id=1),
    "an id twice": changed(id=GOLD[1].id),
    "no input": changed(input=None),
    "a question that is a list": changed(input={"question_type": "선택형", "question": ["가"]}),
    "half a surrogate pair in an answer": changed(output={"answer": "SURROGATE"}).replace(b"SURROGATE", b"\\ud83d"),
    "an answer of 10 MB": changed(output={"answer": "LONG"}).replace(b"LONG", "가".encode() * 3_500_000),
    "an answer that is a number": changed(output={"answer": 7}),
    "NaN in a field": changed(source=float("nan")),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Files that are as they should be."""
    folder = tmp_path_factory.mktemp("좋은 파일")
    write_records(folder / "gold.json", GOLD)
    write_records(folder / "dev.json", DEV)
    rules = load_rule_book(DATA / "rules.json")[:5]
    (folder / "rules.json").write_text(json.dumps([rule.to_json() for rule in rules]))
    write_contexts(folder / "context.jsonl", GOLD + DEV, [[(1.0, rules[0])]] * 8, [[]] * 8)
    (folder / "labels.json").write_text(json.dumps({record.id: rules[0].id for record in GOLD + DEV}))
    return folder


@lru_cache
def command(name):
    if name.startswith("recipes/"):
        return runpy.run_path(str(ROOT / name))["main"]
    return importlib.import_module(name).main


def arguments(name, bad, good, output):
    """Return a command's module and arguments; ``bad`` is the file that is broken."""
    gold, rules, context, labels = (good / file for file in ("gold.json", "rules.json", "context.jsonl", "labels.json"))
    module, role = name.split(", ")
    sft = {"train": gold, "dev": good / "dev.json", "context": context, "labels": labels, role: bad}
    training = [f"data.{key}={value}" for key, value in sft.items() if key in ("train", "dev", "context", "labels")]
    training += ["data.mode=choose_rule", f"training.output={output / 'run'}"]
    tiny = ROOT / "recipes" / "tiny"
    mine = {"questions": gold, "rules": rules, role: bad}
    found = {"rules": rules, "examples": gold, "labels": labels, role: bad}
    searched = [part for key in ("rules", "examples", "labels") for part in (f"--{key}", found[key])]
    searched = [bad if role == "questions" else gold, *searched]
    pair = [bad, gold] if role == "gold" else [gold, bad if role == "pred" else gold]
    score = [*pair, "--metrics", "em,rouge1", *(["--labels", bad] if role == "categories" else [])]
    return {
        "evaluate": ("malpyeong.evaluate", score),
        "report": ("malpyeong.report.__main__", ["errors", *score, "-o", output / "page.html"]),
        "submit": ("malpyeong.submit", [*pair, "-o", output / "submission.json"]),
        "predict": (
            "malpyeong.predict",
            [TINY_BASE, bad if role == "questions" else gold, "-o", output / "pred.json", "--max-new-tokens", "2"]
            + (["--context", bad] if role == "context" else []),
        ),
        "sft": ("recipes/sft.py", [bad if role == "recipe" else tiny / "sft.yaml", *training]),
        "doctor": ("malpyeong.doctor", [bad if role == "recipe" else tiny / "sft.yaml", *training, "--quick"]),
        "mine": (
            "recipes/mine.py",
            [tiny / "mine.yaml", *(f"data.{key}={mine[key]}" for key in ("questions", "rules")),
             f"mining.output={output / 'mined'}", "--estimate"],
        ),
        "search": ("malpyeong.retrieval.__main__", ["search", *searched, "-o", output / "found.jsonl"]),
        "compare": ("malpyeong.retrieval.__main__", ["evaluate", *searched]),
        "rules": ("malpyeong.rules", ["build", bad, "-o", output / "rules.json"]),
    }[module]  # fmt: skip


ROLES = (
    *("evaluate, gold", "evaluate, pred", "evaluate, categories", "report, gold", "report, pred", "report, categories"),
    *("submit, gold", "submit, pred", "predict, questions", "predict, context"),
    *("mine, questions", "mine, rules"),
    *("sft, recipe", "sft, train", "sft, dev", "sft, context", "sft, labels"),
    *("doctor, recipe", "doctor, train", "doctor, labels"),
    *("search, questions", "search, rules", "search, examples", "search, labels", "compare, questions"),
    *("compare, rules", "compare, labels", "rules, document"),
)  # fmt: skip
OF_RECORDS = ("gold", "pred", "questions", "train", "dev", "examples")
# What is as it should be: a label file may name no question of these.
FINE = {
    "search, labels": {"an empty object", "empty strings"},
    "evaluate, categories": {"empty strings"},
    "report, categories": {"empty strings"},
}


def make(kind, path):
    content = {**KINDS, **RECORDS}[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLES)
def test_one_line_names_the_file(name, good, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    failures = []
    for kind in {**KINDS, **(RECORDS if name.split(", ")[1] in OF_RECORDS else {})}.keys() - FINE.get(name, set()):
        folder = tmp_path / kind
        folder.mkdir()
        bad = folder / "고장 난 파일.json"
        make(kind, bad)
        (tmp_path / "output").mkdir()
        module, words = arguments(name, bad, good, tmp_path / "output")
        result = CliRunner().invoke(command(module), list(map(str, words)))
        errors, code = result.stderr.splitlines(), 2
        if name == "doctor, labels":  # one finding among others
            errors, code = [line for line in result.stdout.splitlines() if str(bad) in line], 1
        problems = [
            *([f"exit code {result.exit_code}, {result.exception!r}"] if result.exit_code != code else []),
            *([f"{len(errors)} lines: {errors[:3]}"] if len(errors) != 1 else []),
            *([f"not named: {errors}"] if str(bad) not in "".join(errors) else []),
            *([f"written: {list((tmp_path / 'output').rglob('*'))}"] if any((tmp_path / "output").iterdir()) else []),
        ]
        if problems:
            failures.append(f"{kind}: {'; '.join(problems)}"[:400])
        shutil.rmtree(tmp_path / "output")
    assert not failures, "\n".join(failures)
