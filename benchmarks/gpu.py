"""GRPO on one GPU, measured: Unsloth against plain TRL + PEFT + bitsandbytes, memory limits, where a step's time goes.

    make bench-gpu                                    (or: python -m benchmarks.gpu all)
    python -m benchmarks.gpu a --only unsloth --minutes 9
    python -m benchmarks.gpu all --tiny --out /tmp/bench      (tries the benchmark itself on a CPU)

Parts:
  a  speed and memory of both backends for 4, 8 and 16 answers to a question (Qwen3-4B)
  b  the longest prompt that fits under a memory cap (4B: 15 GiB; 8B and 11.5B: 23 GiB)
  c  a step's time: generation, rewards (all five, their models on the GPU and on the CPU), update
  d  gradients of both backends on the same batch, against float32
  e  the whole way under a cap: SFT, 20 GRPO steps with a kill -9 and a resume, export with parity

Models have random weights in the real shapes; every case is a recipe of recipes/ run in a fresh process
(benchmarks/gpu_case.py). Each result is added to OUT/gpu.jsonl as soon as it is there, and a second start goes on after
the last one. Running out of memory is a result. See docs/gpu-benchmark.md.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_case import ROOT, Case
from benchmarks.gpu_table import table
from malpyeong.errors import InputError
from malpyeong.files import write_text
from malpyeong.terminal import Command

RECIPES = {stage: ROOT / "recipes" / "qwen" / f"{stage}.yaml" for stage in ("sft", "grpo")}
CHEAP = {"format": 0.2, "exact_match": 1.0, "rouge_1": 1.0}
FIVE = {"format": 0.2, "exact_match": 1.0, "rouge_1": 0.34, "bertscore": 0.33, "bleurt": 0.33}
BACKENDS = ("unsloth", "hf")
# Recipes that choose numbers by the card are told not to.
NO_CARD = {"gpu": "null"}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        backends: which ones.
        shape: the model of parts a, c and d.
        groups: num_generations of part a.
        prompt, completion: tokens.
        steps: of parts a and c; the first one is left out of the figures.
        limits: part b: (shape, cap in GiB, num_generations).
        coarse, fine: steps of part b's search, in tokens.
        longest: where it ends.
        whole: part e: (shape, cap in GiB, the recipes' ``gpu``).
        whole_steps, save_steps: of part e's GRPO.
        half: number format of part d that is compared with float32.
        scorers: devices of part c's scorers.
        values: overrides of every recipe.
    """

    backends: tuple[str, ...] = BACKENDS
    shape: str = "4b"
    groups: tuple[int, ...] = (4, 8, 16)
    prompt: int = 1_300
    completion: int = 320
    steps: int = 4
    limits: tuple[tuple[str, float, int], ...] = (("4b", 15, 8), ("8b", 23, 8), ("11.5b", 23, 4))
    coarse: int = 1_024
    fine: int = 256
    longest: int = 8_192
    whole: tuple[tuple[str, float, str | None], ...] = (("4b", 15, "t4"), ("8b", 23, "24gb"))
    whole_steps: int = 20
    save_steps: int = 5
    half: str = "bfloat16"
    scorers: tuple[str, ...] = ("cuda", "cpu")
    values: dict[str, str] = field(default_factory=dict)


TINY = Scale(
    backends=("hf",),
    shape="tiny",
    groups=(2, 4),
    prompt=96,
    completion=16,
    steps=2,
    limits=(("tiny", 1, 2),),
    coarse=64,
    fine=32,
    longest=128,
    whole=(("tiny", 1, None),),
    whole_steps=4,
    save_steps=1,
    half="auto",  # float32 on a CPU
    scorers=("cpu",),
    values={"training.optim": "adamw_torch"},
)


class OutOfTimeError(Exception):
    """There is no time left in this call; the next one goes on."""


class Bench:
    """Runs cases once each, and keeps their results.

    Args:
        out: folder of gpu.jsonl.
        work: folder for models, runs and logs; up to 60 GB.
        scale: how much is measured.
        only: run only cases whose key has this in it.
        minutes: after them nothing is started, and what runs is killed.
    """

    def __init__(self, out: Path, work: Path, scale: Scale, only: str, minutes: float) -> None:
        self.work, self.scale, self._only = work.resolve(), scale, only
        self._file = out / "gpu.jsonl"
        self._deadline = time.monotonic() + 60 * minutes
        self._longest = 0.0  # seconds that a case has taken: one that hardly fits is not begun
        self.failed: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        (self.work / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, case: Case) -> dict[str, Any] | None:
        """Run a case unless its result is there; return it, or None if the case was not asked for or failed."""
        text = json.dumps(asdict(case))
        result = self.work / "result.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu_case", text, str(result)]
        return self._measure(case.key, command, result, list(case.arguments), case.kill_at, case.makes)

    def run_module(self, key: str, *arguments: object, result: Path) -> dict[str, Any] | None:
        """Run ``python -m …`` as a case; its figures are the JSON file that it writes."""
        words = [str(argument) for argument in arguments]
        return self._measure(key, [sys.executable, "-m", *words], result, words)

    def make(self, name: str, *arguments: object, makes: Path) -> Path:
        """Run ``python -m …`` unless what it makes is there; its time is of no interest.

        Raises:
            click.ClickException: it fails.
        """
        if not makes.exists():
            click.echo(f"{name}: making {makes}")
            code, _ = self._wait([sys.executable, "-m", *map(str, arguments)], name, None)
            if code:
                raise click.ClickException(f"{makes}: could not be made\n{self._tail(name)}")
        return makes

    def wants(self, key: str) -> bool:
        """Tell whether a case is asked for."""
        return self._only in key

    def add(self, key: str, status: str, figures: Any, **others: Any) -> dict[str, Any]:  # noqa: ANN401 -- JSON
        """Write a result down."""
        row = {
            "key": key,
            "status": status,
            "date": str(date.today()),
            "git": _revision(),
            **others,
            "figures": figures,
        }
        text = json.dumps(row, ensure_ascii=False)
        # As on any machine: paths relative to the repository.
        text = text.replace(f"{self.work}/", "runs/bench/").replace(f"{ROOT}/", "")
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(f"{text}\n")
        return row

    def known(self, key: str, makes: str | None = None) -> dict[str, Any] | None:
        """Return the result of a case, if there is one that is not a failure, and what the case makes is there."""
        rows = [row for row in load(self._file) if row["key"] == key]
        counts = rows and rows[-1]["status"] != "failed" and (makes is None or Path(makes).exists())
        return rows[-1] if counts else None

    def _measure(
        self,
        key: str,
        command: list[str],
        result: Path,
        arguments: list[str],
        kill_at: str | None = None,
        makes: str | None = None,
    ) -> dict[str, Any] | None:
        if not self.wants(key):
            return None
        if known := self.known(key, makes):
            click.echo(f"{key}: {known['status']} (known)")
            return known
        click.echo(f"{key}: …", nl=False)
        start = time.monotonic()
        code, killed = self._wait(command, key, kill_at)
        seconds = round(time.monotonic() - start, 1)
        if killed:
            row = self.add(key, "killed", {}, arguments=arguments, seconds=seconds)
        elif code == 0 and result.exists():
            found = json.loads(result.read_text("utf-8"))
            row = self.add(
                key,
                found.get("status", "ok"),
                found.get("figures", found),
                arguments=arguments,
                seconds=seconds,
                environment=found.get("environment"),
            )
        else:
            row = self.add(key, "failed", {"log": self._tail(key)}, arguments=arguments, seconds=seconds)
            self.failed.append(key)
        click.echo(f" {row['status']}, {seconds:.0f} s")
        return None if row["status"] == "failed" else row

    def _wait(self, command: Sequence[str], key: str, kill_at: str | None) -> tuple[int, bool]:
        """Run a command; return its code and whether it was killed at ``kill_at``."""
        if time.monotonic() + self._longest > self._deadline:
            raise OutOfTimeError
        start = time.monotonic()
        settings = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            # As Unsloth would set it, but before the GPU is first touched, and for both backends alike.
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "UNSLOTH_DISABLE_STATISTICS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        with self._log(key).open("wb") as log:
            # A session of its own, so that nothing that the process started is left behind on the GPU.
            process = subprocess.Popen(
                command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None:
                    if kill_at and _is_complete(Path(kill_at)):
                        return -signal.SIGKILL, True
                    if time.monotonic() > self._deadline:
                        click.echo(" out of time")
                        raise OutOfTimeError
                    time.sleep(0.05)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                self._longest = max(self._longest, time.monotonic() - start)
        return process.returncode, False

    def _log(self, key: str) -> Path:
        return self.work / "logs" / f"{key.replace('/', '-')}.txt"

    def _tail(self, key: str) -> str:
        return self._log(key).read_text("utf-8", errors="replace")[-2_000:]

    # ---- what the cases need

    def model(self, shape: str) -> Path:
        """Return a model folder with random weights, and beside it its adapter."""
        folder = self.work / "models" / shape
        made = folder.with_name(f"{shape}-adapter")
        self.make(f"model {shape}", "benchmarks.random_models", shape, folder, "--recipe", RECIPES["grpo"], makes=made)
        return folder

    def questions(self, shape: str, lengths: Sequence[int]) -> Path:
        """Return a training file of one question for each prompt length."""
        from benchmarks.random_models import make_questions

        path = self.work / f"questions-{shape}-{len(lengths)}x{min(lengths)}-{max(lengths)}.json"
        if not path.exists():
            make_questions(path, self.model(shape), lengths)
        return path

    def scorers(self) -> tuple[Path, Path]:
        """Return mBERT and BLEURT-20 with random weights."""
        from benchmarks import random_scorers

        encoder, bleurt = self.work / "models" / "mbert", self.work / "models" / "bleurt"
        small = self.scale.shape == "tiny"
        if not (encoder / "model.safetensors").exists():
            size = {"hidden": 32, "vocabulary": 1_000, "words": 900} if small else {}
            random_scorers.make_encoder(encoder, **size)
        if not (bleurt / "spm.model").exists():
            size = {"hidden": 24, "layers": 2, "heads": 2, "embedding": 8, "vocabulary": 1_500, "pieces": 1_300}
            random_scorers.make_bleurt(bleurt, **(size if small else {}))
        return encoder, bleurt

    def by_hand(self, num_generations: int, batch_size: int, groups: int = 1, longest: int = 0) -> dict[str, Any]:
        """Return the GRPO recipe's keys that a card would decide.

        Args:
            num_generations: answers to a question.
            batch_size: answers in one backward pass.
            groups: questions a step.
            longest: tokens of the longest prompt; 0: as usual here.
        """
        return {
            **NO_CARD,
            "model.max_length": (longest or self.scale.prompt) + self.scale.completion,
            "training.batch_size": batch_size,
            "training.gradient_accumulation_steps": groups * num_generations // batch_size,
            "training.num_generations": num_generations,
            "training.max_completion_length": self.scale.completion,
        }

    def grpo(
        self,
        key: str,
        shape: str,
        backend: str,
        lengths: Sequence[int],
        values: dict[str, Any],
        scorers: dict[str, str] | None = None,
        **case: Any,  # noqa: ANN401 -- fields of Case
    ) -> dict[str, Any] | None:
        """Run the GRPO recipe, one step a question unless ``values`` says another number.

        Args:
            key: of the case.
            shape: of the model.
            backend: ``unsloth`` or ``hf``.
            lengths: prompt lengths in tokens, one question each.
            values: overrides.
            scorers: where the models of all five rewards run (``device``); None: only the rewards without models.
            case: further fields of the case.
        """
        known = self.known(key, case.get("makes"))
        if known or not self.wants(key):
            return known if self.wants(key) else None
        model = self.model(shape)
        output = self.work / "runs" / key.replace("/", "-")
        shutil.rmtree(output, ignore_errors=True)  # of an attempt that failed
        rewards: dict[str, Any] = {"data.rewards": json.dumps(CHEAP), "data.scorers": "null"}
        if scorers is not None:
            encoder, bleurt = self.scorers()
            named = {"bertscore": str(encoder), "bleurt": str(bleurt), "dtype": "float32", **scorers}
            rewards = {"data.rewards": json.dumps(FIVE), "data.scorers": json.dumps(named)}
        base = {
            "model.name": model,
            "model.adapter": f"{model}-adapter",
            "model.backend": backend,
            "data.train": self.questions(shape, lengths),
            **rewards,
            "training.output": output,
            "training.max_steps": len(lengths),
            "training.warmup_steps": 0,
            "training.save_steps": self.scale.save_steps,
        }
        return self.run(Case(key, "grpo.py", self._arguments("grpo", base | values), self.scale.completion, **case))

    def sft(
        self,
        key: str,
        shape: str,
        backend: str,
        values: dict[str, Any],
        **case: Any,  # noqa: ANN401 -- fields of Case
    ) -> dict[str, Any] | None:
        """Run the SFT recipe for a few steps; as :meth:`grpo`."""
        known = self.known(key, case.get("makes"))
        if known or not self.wants(key):
            return known if self.wants(key) else None
        questions = self.questions(shape, [self.scale.prompt] * 32)
        base = {
            "model.name": self.model(shape),
            "model.backend": backend,
            "data.train": questions,
            "data.dev": questions,
            "training.epochs": 2,
            "training.eval_steps": 2,
        }
        return self.run(Case(key, "sft.py", self._arguments("sft", base | values), **case))

    def _arguments(self, stage: str, values: dict[str, Any]) -> tuple[str, ...]:
        overrides = [f"{name}={value}" for name, value in (values | self.scale.values).items()]
        return (str(RECIPES[stage]), *overrides, "--resume", "auto")


def part_a(bench: Bench) -> None:
    """Speed and memory of both backends; a step is one question with all its answers in one backward pass."""
    scale = bench.scale
    for backend in scale.backends:
        for size in scale.groups:
            key = f"a/{scale.shape}/{backend}/G{size}"
            values = bench.by_hand(size, batch_size=size)
            bench.grpo(key, scale.shape, backend, [scale.prompt] * scale.steps, values, check=False)


def part_b(bench: Bench) -> None:
    """The longest prompt under a cap: ever longer ones, a step each, until memory is out; coarsely, then finely."""
    scale = bench.scale
    for shape, cap, size in scale.limits:
        for backend in scale.backends:
            start, end, step = 0, scale.longest, scale.coarse
            for name in ("coarse", "fine"):
                lengths = list(range(start + step, end + 1, step))
                if not lengths:
                    break
                values = bench.by_hand(size, batch_size=2, longest=lengths[-1])
                key = f"b/{shape}/{backend}/G{size}/{cap:g}GiB/{name}"
                row = bench.grpo(key, shape, backend, lengths, values, cap_gib=cap, ascending=True, check=False)
                if row is None or row["status"] == "ok":
                    break
                done = len(row["figures"]["steps"])
                start, end, step = start + done * step, start + (done + 1) * step - 1, scale.fine


def part_c(bench: Bench) -> None:
    """Where a step's time goes: four questions with eight answers each, all five rewards."""
    scale = bench.scale
    size = max(scale.groups) // 2
    for backend in scale.backends:
        for device in scale.scorers:
            key = f"c/{scale.shape}/{backend}/scorers on {device}"
            values = {**bench.by_hand(size, batch_size=size, groups=4), "training.max_steps": scale.steps}
            lengths = [scale.prompt] * (4 * scale.steps)
            bench.grpo(key, scale.shape, backend, lengths, values, scorers={"device": device}, check=False)


def part_d(bench: Bench) -> None:
    """Gradients of the adapter on one batch with the same weights and answers, against computing in float32."""
    scale = bench.scale
    files = {}
    for backend, dtype in [("hf", "float32"), *((backend, scale.half) for backend in scale.backends)]:
        name = f"{backend} {dtype}"
        files[name] = bench.work / f"gradients-{scale.shape}-{name.replace(' ', '-')}.safetensors"
        values = {**bench.by_hand(4, batch_size=4), "model.dtype": dtype, "training.max_grad_norm": 1e9}
        key = f"d/{scale.shape}/{name}"
        bench.grpo(key, scale.shape, backend, [scale.prompt], values, gradients=str(files[name]), check=False)
    key = f"d/{scale.shape}/agreement"
    if bench.wants(key) and not bench.known(key) and all(file.exists() for file in files.values()):
        rows = [bench.known(f"d/{scale.shape}/{name}") for name in files]
        weights = {row["figures"].get("weights_sha256") for row in rows if row}
        bench.add(key, "ok", {"same_4bit_weights": len(weights) == 1, "pairs": agreement(files)})


def part_e(bench: Bench) -> None:
    """SFT, then GRPO that is killed and resumed, with all rewards under a cap; then the merge, checked."""
    scale = bench.scale
    backend = scale.backends[0]
    for shape, cap, card in scale.whole:
        place = f"e/{shape}/{backend}/{cap:g}GiB"
        if bench.known(f"{place}/export"):
            continue
        sft, grpo = (bench.work / "runs" / f"{place}-{stage}".replace("/", "-") for stage in ("sft", "grpo"))
        # What the recipe makes of this card; without one, as little as possible.
        by_hand = {"training.batch_size": 1, "training.gradient_accumulation_steps": 4, "model.max_length": 2_048}
        chosen = {"gpu": card} if card else {**NO_CARD, **by_hand}
        values = {**chosen, "training.output": sft}
        adapter = str(sft / "adapter")
        if bench.sft(f"{place}/sft", shape, backend, values, cap_gib=cap, makes=adapter) is None:
            continue
        chosen = {"gpu": card} if card else bench.by_hand(2, batch_size=2)
        values = {
            **chosen,
            "model.adapter": adapter,
            "training.output": grpo,
            "training.max_steps": scale.whole_steps,
        }
        half = str(grpo / f"checkpoint-{scale.whole_steps // 2}")
        for name, ends in (("killed", {"kill_at": half}), ("resumed", {"makes": str(grpo / "adapter")})):
            row = bench.grpo(
                f"{place}/grpo {name}", shape, backend, [scale.prompt] * 8, values,
                scorers={} if card else {"device": "cpu"}, cap_gib=cap, **ends,
            )  # fmt: skip
            if row is None:
                break
        else:
            if not bench.known(f"{place}/log"):
                log = json.loads((grpo / "log.json").read_text("utf-8"))
                bench.add(f"{place}/log", "ok", {"steps": [line for line in log if "reward" in line]})
            merged = bench.work / "merged"
            shutil.rmtree(merged, ignore_errors=True)
            # In float32: between random logits a 16-bit merge turns near ties.
            command = ("malpyeong.export", grpo / "adapter", "-o", merged, "--dtype", "float32", "--check-records", "4")
            bench.run_module(f"{place}/export", *command, result=merged / "export.json")
            shutil.rmtree(merged, ignore_errors=True)  # up to 33 GB


PARTS: dict[str, Callable[[Bench], None]] = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e}


def agreement(files: dict[str, Path]) -> list[dict[str, Any]]:
    """Return for each pair of gradient files the relative error ‖x − y‖ / ‖y‖ and the cosine over all weights."""
    from safetensors.torch import load_file
    from torch import Tensor

    def join(path: Path) -> dict[str, Tensor]:
        return {name.replace(".default.", "."): tensor.double().flatten() for name, tensor in load_file(path).items()}

    found, names = [], list(files)
    gradients = {name: join(path) for name, path in files.items()}
    for place, reference in enumerate(names):
        for other in names[place + 1 :]:
            x, y = gradients[other], gradients[reference]
            if x.keys() != y.keys():
                raise click.ClickException(f"{other} and {reference} train different weights")
            difference = sum(float((x[key] - y[key]).square().sum()) for key in y)
            norms = [sum(float(g[key].square().sum()) for key in y) for g in (x, y)]
            product = sum(float(x[key] @ y[key]) for key in y)
            found.append(
                {
                    "of": other,
                    "against": reference,
                    "relative_error": (difference / norms[1]) ** 0.5,
                    "cosine": product / (norms[0] * norms[1]) ** 0.5,
                }
            )
    return found


def load(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; a line that a kill cut off is left out."""
    rows = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _is_complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text("utf-8")))
    except (OSError, ValueError):
        return False


def _revision() -> str | None:
    """Return git's revision, or what MALPYEONG_REVISION says where the code was copied without its history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MALPYEONG_REVISION")
    return result.stdout.strip()


@click.command(cls=Command)
@click.argument("parts", nargs=-1, required=True, type=click.Choice([*PARTS, "all", "table"]))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results", help="Results.")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "bench", help="Models, runs, logs.")
@click.option("--only", default="", help="Only cases whose key has this in it, such as unsloth or /G8.")
@click.option("--minutes", default=1e6, type=float, help="Stop after them; the next call goes on.")
@click.option("--tiny", is_flag=True, help="Tiny shapes, without Unsloth: tries the benchmark on a CPU.")
def main(parts: tuple[str, ...], out: Path, work: Path, only: str, minutes: float, tiny: bool) -> None:
    """Measure PARTS and write OUT/gpu.jsonl and OUT/gpu.md; ``table`` only writes gpu.md again.

    \b
    a  speed and memory of Unsloth and plain TRL for 4, 8 and 16 answers to a question
    b  the longest prompt that fits under a memory cap
    c  a step's time: generation, rewards, update
    d  gradients of both on the same batch
    e  the whole way under a cap: SFT, GRPO with a kill and a resume, export
    """
    measured = list(PARTS) if "all" in parts else [part for part in parts if part in PARTS]
    if measured and not tiny:
        _check_machine(only)
    bench = Bench(out, work, TINY if tiny else Scale(), only, minutes)
    finished = True
    try:
        for part in measured:
            PARTS[part](bench)
    except OutOfTimeError:
        finished = False
    rows = load(out / "gpu.jsonl")
    write_text(out / "gpu.md", table(rows))
    click.echo(f"{out / 'gpu.md'}: {len(rows)} results")
    if not finished:
        click.echo("out of time: the same command goes on from here")
    if bench.failed:
        raise click.ClickException(f"failed: {', '.join(bench.failed)}; see {bench.work / 'logs'}")


def _check_machine(only: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("there is no GPU here; --tiny tries the benchmark on a CPU")
    if importlib.util.find_spec("unsloth") is None and "hf" not in only:
        raise InputError("unsloth is not installed; install it (docs/gpu-benchmark.md), or measure --only hf")


if __name__ == "__main__":
    main()
