"""A disk that is full: one line, nothing half-written. What runs into it is real; files may not grow beyond a limit."""

import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tqdm.auto import tqdm

from malpyeong.errors import InputError
from malpyeong.files import PartFile, _temporary_beside, new_folder, write_text, writing
from malpyeong.models.load import load_tokenizer
from malpyeong.samples import TINY_BASE
from malpyeong.terminal import Command

WEIGHTS = {"a": torch.zeros(100_000)}


@contextmanager
def no_file_above(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "torch": lambda folder: torch.save(WEIGHTS, folder / "optimizer.pt"),
    "safetensors": lambda folder: save_file(WEIGHTS, folder / "adapter_model.safetensors"),
    "tokenizers": lambda folder: load_tokenizer(str(TINY_BASE)).save_pretrained(folder),
    "Python": lambda folder: (folder / "a").write_bytes(b"0" * 100_000),
    "malpyeong": lambda folder: write_text(folder / "a.json", "0" * 100_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_any_library_raises_is_one_line(name, tmp_path):
    with (
        pytest.raises(InputError, match="cannot be written") as error,
        no_file_above(10_000),
        new_folder(tmp_path / "모형") as folder,
    ):
        WRITERS[name](folder)
    assert "모형" in error.value.message
    assert not any(tmp_path.iterdir())


def test_other_errors_come_through(tmp_path):
    for error in (ValueError("a"), RuntimeError("b"), FileNotFoundError(2, "c"), InputError("d")):
        with pytest.raises(type(error)) as found, writing(tmp_path):
            raise error
        assert found.value is error


def test_a_part_file_stays_usable(tmp_path):
    part = PartFile(tmp_path / "part.jsonl", {})
    part.add({"id": 1})
    with pytest.raises(InputError, match=r"part\.jsonl: cannot be written"), no_file_above(100):
        part.add({"id": "2" * 200})
    assert PartFile(part.path, {}).pieces == [{"id": 1}]


def test_a_command_names_what_nothing_else_has_caught():
    @click.command(cls=Command)
    def main():
        Path("/dev/full").write_text("a")

    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "No space left" in result.stderr


def test_an_error_begins_a_line_below_an_open_progress_bar():
    bars = []

    @click.command(cls=Command)
    def main():
        bars.append(tqdm(range(3), file=sys.stderr))
        raise InputError("a")

    assert CliRunner().invoke(main, []).stderr.splitlines()[-1] == "Error: a"


def test_what_a_killed_write_left_is_removed(tmp_path):
    write_text(tmp_path / "a.json", "1")
    left, others = (_temporary_beside(tmp_path / name) for name in ("a.json", "b.json"))
    write_text(tmp_path / "a.json", "2")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.json", others])
    assert not left.exists()


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(run_module, tmp_path):
    command = ("-m", "benchmarks.torture", "--command", "predict", "--kills", "2", "--no-faults")
    result = run_module(*command, "-o", tmp_path / "torture")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| predict | 2 |" in (tmp_path / "torture" / "torture.md").read_text("utf-8")
