"""Does all of it run on this card, how fast, and with how much memory?

    make gpu-check                            (SFT; GRPO killed and resumed, with KL and gold, with vLLM; export …)
    python -m benchmarks.gpu_check --speed    (GRPO: NF4 and 16 bits, native sampling and vLLM, 8 to 32 completions)
    python -m benchmarks.gpu_check --limits   (under caps of 15 and 23 GiB: the presets, the longest prompt)
    python -m benchmarks.gpu_check --tiny     (tries the check itself on a CPU)

Offline: a model with random weights in a real one's shape (benchmarks/random_models.py) answers made-up questions.
Every step is one of the project's own commands in a process of its own, with a time limit and a log; the figures come
from the runs' logs. Each step adds a row to the results; docs/gpu.md says how to read them. Exit code 1 names what
failed.
"""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from malpyeong.config.gpu import nearest
from malpyeong.config.load import read_recipe
from malpyeong.contest.records import load_records
from malpyeong.errors import InputError
from malpyeong.models.environment import version
from malpyeong.models.memory import GIB, SHAPES, estimate_recipe
from malpyeong.report.run_page import read_run
from malpyeong.terminal import Command
from malpyeong.training.run import git_revision

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "vllm")
SMALL, FOUR, EIGHT = "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B"
FIVE = {"format": 0.2, "exact_match": 1.0, "rouge_1": 0.34, "bertscore": 0.33, "bleurt": 0.33}
CHEAP = ['data.rewards={"format": 0.2, "exact_match": 1.0}', "data.scorers=null"]
LENGTHS = [1_024 * number for number in range(1, 9)]  # prompts among which --limits finds the longest, in tokens
PARTS = ("step", "generate", "reward", "update")
_CARD = (
    "import json, torch; p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None; "
    "print(json.dumps(p and [p.name, p.total_memory / 2**30, p.major >= 8]))"
)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: in the table.
        command: what follows ``python``.
        output: what it makes: a run's folder, a merged model, or a prediction; removed first, unless ``resumes``.
        figures: takes the step and its log, and returns what was measured; a ValueError says what is wrong with it.
        model: of ``SHAPES``, or tiny.
        limit: seconds.
        absent: why it cannot run on this machine.
        resumes: resume from what is there.
        kill: kill it as soon as its second checkpoint is complete.
        cap_gib: what it may allocate on the GPU.
        environment: further variables.
    """

    name: str
    command: Sequence[object]
    output: Path
    figures: Callable[["Step", str], dict[str, Any]]
    model: str
    limit: float = 300
    absent: str = ""
    resumes: bool = False
    kill: bool = False
    cap_gib: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Check:
    """Runs steps, and adds a row to ``results`` for each; ``work`` holds models, runs and logs."""

    def __init__(self, results: Path, work: Path, tiny: bool) -> None:
        self.results, self.work, self.tiny = results, work.resolve(), tiny
        (self.work / "logs").mkdir(parents=True, exist_ok=True)
        shown = subprocess.run([sys.executable, "-c", _CARD], capture_output=True, text=True, check=True).stdout
        card = None if tiny else json.loads(shown)
        if not (card or tiny):
            raise InputError("no GPU that this build of torch can use is here; --tiny tries the check on a CPU")
        self.card, self.gib, self.ampere = card or ("none", 0.0, False)
        self.backend = "unsloth" if not tiny and find_spec("unsloth") else "hf"
        self.no_vllm = "not installed" if find_spec("vllm") is None else "" if self.ampere else "not for this card"
        self.rows: list[dict[str, Any]] = []

    def model(self, name: str, syllables: int) -> Path:
        """Return the folder of a model with random weights, made if it is not there."""
        folder = self.work / f"{name.rpartition('/')[2]}-{syllables}"
        if not folder.exists():
            click.echo(f"making {folder}", err=True)
            command = ["-m", "benchmarks.random_models", name, str(folder), f"--syllables={syllables}"]
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        return folder

    def questions(self, model: Path, lengths: Sequence[int]) -> Path:
        """Return a file of one question for each prompt length; GRPO with seed 0 asks the shortest first."""
        from benchmarks.random_models import make_questions

        path = self.work / f"{model.name}-{len(lengths)}x{max(lengths)}.json"
        order = random.Random(0).sample(range(len(lengths)), len(lengths))  # as grpo_dataset draws it
        make_questions(path, model, [length for _, length in sorted(zip(order, sorted(lengths), strict=True))])
        return path

    def five(self, whole: bool) -> list[str]:
        """Return the overrides for all rewards; their models have random weights, and real shapes if ``whole``."""
        from benchmarks.random_scorers import make_bleurt, make_encoder

        folder = self.work / ("scorers" if whole else "small-scorers")
        if not (folder / "bleurt" / "spm.model").exists():
            small = {"hidden": 24, "layers": 2, "heads": 2, "embedding": 8, "vocabulary": 1_500, "pieces": 1_300}
            make_encoder(folder / "bertscore", **({} if whole else {"hidden": 32, "vocabulary": 1_000, "words": 900}))
            make_bleurt(folder / "bleurt", **({} if whole else small))
        named = [f"data.scorers.{name}={folder / name}" for name in ("bertscore", "bleurt")]
        return [f"data.rewards={json.dumps(FIVE)}", *named]

    def run(self, step: Step) -> None:
        """Run a step, and add its row to the results."""
        click.echo(f"{step.name}: ", nl=False, err=True)
        log = self.work / "logs" / f"{re.sub('[^0-9A-Za-z]+', '-', step.name)}.txt"
        start, command = time.monotonic(), [str(part) for part in step.command]
        status, figures = step.absent or self._ended(step, command, log), {}
        seconds = round(time.monotonic() - start, 1)
        if status in ("ok", "killed", "out of memory"):
            try:
                figures = step.figures(step, log.read_text("utf-8", errors="replace"))
            except ValueError as error:
                status, figures = "failed", {"note": str(error)}
            if step.cap_gib and figures.get("peak_reserved_gib", 0) > 1.01 * step.cap_gib:
                status = "failed"  # the cap had no effect
        revision = git_revision() or os.environ.get("MALPYEONG_REVISION")  # where the code was copied without history
        row = {"step": step.name, "status": status, "date": str(date.today()), "git": revision}
        row |= {"card": self.card, "card_gib": round(self.gib, 1), "cap_gib": step.cap_gib, "model": step.model}
        row |= {"versions": {name: installed for name in PACKAGES if (installed := version(name))}}
        row |= {"command": ["python", *(part.replace(f"{ROOT}/", "") for part in command)]}
        row |= {"environment": step.environment, "seconds": seconds, "figures": figures}
        self.rows.append(row)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        where = f"; see {log}" if status in ("failed", "out of time") else ""
        click.echo(f"{status}, {seconds:.0f} s{where}", err=True)

    def _ended(self, step: Step, command: list[str], log: Path) -> str:
        """Run a step's command; return how it ended."""
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        if step.cap_gib:
            share = min(1.0, step.cap_gib / self.gib)
            settings["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f},expandable_segments:True"
        if not step.resumes:
            shutil.rmtree(step.output, ignore_errors=True)
            if step.output.suffix:
                step.output.unlink(missing_ok=True)
        with log.open("wb") as written:
            # A session of its own, so that nothing that the process started stays behind on the GPU.
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=settings | step.environment,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            end = time.monotonic() + step.limit
            try:
                while process.poll() is None:
                    if step.kill and _is_complete(step.output / "checkpoint-2"):
                        return "killed"
                    if time.monotonic() > end:
                        return "out of time"
                    time.sleep(0.02)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode == 3 and step.cap_gib and b"memory does not suffice" in log.read_bytes():
            return "out of memory"
        return "failed" if process.returncode or step.kill else "ok"

    def trained(self, step: Step, _: str) -> dict[str, Any]:
        """Return the medians of a run's steps without the first, and the peak beside the estimate."""
        recipe: Any = read_recipe(str(step.command[1]), [str(part) for part in step.command[2:] if "=" in str(part)])
        log = [row for row in read_run(step.output).log if "step_seconds" in row]
        if step.resumes and [row["step"] for row in log] != list(range(1, recipe.training.max_steps + 1)):
            raise ValueError(f"the log has the steps {[row['step'] for row in log]}")
        if log and "kl" in log[0] and not _has_reference(step.output, Path(recipe.model.adapter)):
            raise ValueError("the reference of the KL penalty is not SFT's adapter")
        figures: dict[str, Any] = {"steps": len(log)}
        if log:
            figures["first_step_seconds"] = round(log[0]["step_seconds"], 2)
            later = log[1:] or log
            for name in (f"{part}_seconds" for part in PARTS if f"{part}_seconds" in log[0]):
                figures[name] = round(statistics.median(row[name] for row in later), 3)
            if "generate_seconds" in figures:
                size = recipe.training.batch_size * recipe.training.gradient_accumulation_steps
                rates = [size * row["completions/mean_length"] / row["generate_seconds"] for row in later]
                figures["tokens_per_second"] = round(statistics.median(rates), 1)
            for name in (name for name in log[0] if name.startswith("peak_")):
                figures[name] = round(max(row[name] for row in log), 3)
        if step.model in SHAPES:
            estimate = estimate_recipe(recipe, SHAPES[step.model], recipe.model.backend, self.gib)
            figures["estimated_gib"] = round(estimate.peak / GIB, 3)
        return figures

    def longest(self, step: Step, log: str) -> dict[str, Any]:
        """Return the longest prompt whose step was done, beside the run's figures."""
        figures = self.trained(step, log)
        return figures | {"longest_prompt": LENGTHS[figures["steps"] - 1] if figures["steps"] else 0}


def exported(step: Step, _: str) -> dict[str, Any]:
    """Return how a merged model compares."""
    parity = json.loads((step.output / "export.json").read_text("utf-8"))
    agreement = f"{parity['dtype']}, likeliest token the same at {parity['top_token_agreement']:.1%}"
    return {"max_logit_diff": parity["max_logit_diff"], "same_answers": parity["same_answers"], "note": agreement}


def predicted(step: Step, log: str) -> dict[str, Any]:
    """Return the speed of a prediction, and how many of its answers are those of transformers."""
    answers, well_formed, seconds = re.findall(r"(\d+) answers, (\d+) well formed; ([\d.]+) s after loading", log)[-1]
    if answers != well_formed:
        raise ValueError(f"{well_formed} of {answers} answers are well formed")
    other = step.output.with_name("transformers.json")
    files = (step.output, other if other.exists() else step.output)
    texts, others = ([record.answer or "" for record in load_records(file)] for file in files)
    note = f"{answers} answers, {well_formed} well formed, {sum(map(str.__eq__, texts, others))} as transformers gives"
    # The tokenizer's tokens are single characters, but for the first of an answer.
    rate = sum(map(len, texts)) / max(float(seconds), 0.1)
    return {"predict_seconds": float(seconds), "tokens_per_second": round(rate, 1), "note": note}


def everything(check: Check) -> Iterator[Step]:
    """Yield the stages from SFT to prediction, as few steps each as tell whether they run."""
    name = "tiny" if check.tiny else SMALL if check.gib < 12 else FOUR
    model = check.model(name, 24 if check.tiny else 256)
    sft, grpo, vllm, merged, answers = (check.work / part for part in ("sft", "grpo", "grpo-vllm", "merged", "answers"))
    answers.mkdir(exist_ok=True)
    length, records = (100, 8) if check.tiny else (600, 32)
    questions, dev = (check.questions(model, [length] * number) for number in (records, 4))
    common = [f"model.name={model}", f"model.backend={check.backend}", f"data.train={questions}"]
    tokens = 64 if check.tiny else 320
    if check.tiny:
        common += ["gpu=null", "model.max_length=180", "training.batch_size=2", "training.optim=adamw_torch"]
        common += ["training.gradient_accumulation_steps=2"]
    else:
        common += [f"gpu={nearest(check.gib, check.ampere) or 't4'}"]
    two_epochs = [f"data.dev={dev}", "training.epochs=2", "training.eval_steps=2", f"training.output={sft}"]
    yield Step("SFT", [RECIPES / "sft.py", RECIPES / "sft.yaml", *common, *two_epochs], sft, check.trained, name)
    common += [f"model.adapter={sft / 'adapter'}", *check.five(whole=False), "training.warmup_steps=0"]
    if check.tiny:
        common += ["training.num_generations=4", f"training.max_completion_length={tokens}"]
    command = [RECIPES / "grpo.py", RECIPES / "grpo.yaml", *common]
    four_steps = ["training.max_steps=4", "training.save_steps=1", f"training.output={grpo}", "--resume", "auto"]
    yield Step("GRPO, killed", [*command, *four_steps], grpo, check.trained, name, kill=True)
    yield Step("GRPO, resumed", [*command, *four_steps], grpo, check.trained, name, resumes=True)
    more = ["training.beta=0.04", "training.gold_advantage=4", f"data.dev={dev}", "training.eval_steps=1"]
    more += ["training.max_steps=2", f"training.output={check.work / 'grpo-more'}"]
    yield Step("GRPO, KL, gold, dev", [*command, *more], check.work / "grpo-more", check.trained, name)
    # vLLM's share of a smaller card would hold hardly more than 16-bit weights.
    sampled = [f"model.load_in_4bit={str(check.gib < 38).lower()}", "training.use_vllm=true", "training.max_steps=2"]
    command += [*sampled, f"training.output={vllm}"]
    yield Step("GRPO, vLLM", command, vllm, check.trained, name, absent=check.no_vllm)
    export = ["-m", "malpyeong.export", grpo / "adapter", "-o", merged, "--check-records=4"]
    yield Step("export", export, merged, exported, name)
    for engine, absent in (("transformers", ""), ("vllm", check.no_vllm)):
        output = answers / f"{engine}.json"
        predict = ["-m", "malpyeong.predict", merged, questions, "-o", output, f"--engine={engine}"]
        predict.append(f"--max-new-tokens={tokens}")
        yield Step(f"predict, {engine}", predict, output, predicted, name, absent=absent)


def speed(check: Check) -> Iterator[Step]:
    """Yield GRPO of 4B, answers of some 310 tokens to prompts of 1,300, sampled in every way."""
    model, run = check.model(FOUR, 512), check.work / "speed"
    ways = [(size, bits, way) for size in (8, 16, 32) for bits in ("NF4", "16-bit") for way in ("native", "vLLM")]
    ways += [(16, "NF4", "no graphs"), (16, "16-bit", "no graphs"), (8, "NF4", "plain TRL")]
    for size, bits, way in ways:
        backend = "hf" if way == "plain TRL" else check.backend
        values = [f"model.name={model}", f"model.backend={backend}", "model.adapter=null", *CHEAP, "gpu=null"]
        values += [f"model.load_in_4bit={str(bits == 'NF4').lower()}", f"training.output={run}"]
        values += [f"training.use_vllm={str(way == 'vLLM').lower()}"]
        values += [f"data.train={check.questions(model, [1_300] * (size // 2))}"]
        values += ["model.max_length=1620", "training.batch_size=8", "training.num_generations=8"]
        values += [f"training.gradient_accumulation_steps={size // 8}", "training.max_completion_length=320"]
        values += ["training.max_steps=4", "training.warmup_steps=0"]
        yield Step(
            f"{bits}, {way}, {size} completions",
            [RECIPES / "grpo.py", RECIPES / "grpo.yaml", *values],
            run,
            check.trained,
            FOUR,
            limit=400,
            absent=check.no_vllm if way == "vLLM" else "",
            environment={"UNSLOTH_DECODE_CUDA_GRAPHS": "0"} if way == "no graphs" else {},
        )


def limits(check: Check) -> Iterator[Step]:
    """Yield what has to fit a smaller card: presets with all rewards, then longer prompts until memory is out."""
    run = check.work / "limits"
    eight = ["training.gradient_accumulation_steps=2"]  # completions a step
    for name, cap, preset, length, fewer in ((FOUR, 15, "t4", 1_300, []), (EIGHT, 23, "24gb", 1_700, eight)):
        model, size = check.model(name, 512), name.rpartition("-")[2]
        command = [RECIPES / "grpo.py", RECIPES / "grpo.yaml", f"model.name={model}", f"model.backend={check.backend}"]
        command += ["model.adapter=null", f"training.output={run}", "training.warmup_steps=0"]
        whole = [f"gpu={preset}", f"data.train={check.questions(model, [length] * 8)}", *check.five(whole=True), *fewer]
        whole += ["training.max_steps=3"]
        longer = ["gpu=null", f"data.train={check.questions(model, LENGTHS)}", *CHEAP, "training.batch_size=2"]
        longer += [f"model.max_length={LENGTHS[-1] + 320}", "training.max_completion_length=320"]
        longer += ["training.gradient_accumulation_steps=4", "training.num_generations=8"]
        longer += [f"training.max_steps={len(LENGTHS)}", "training.save_steps=1"]
        for what, values, figures in (("all rewards", whole, check.trained), ("longest prompt", longer, check.longest)):
            step = f"{size}, {preset}, {what}" if values is whole else f"{size}, {what}"
            yield Step(step, [*command, *values], run, figures, name, limit=500, cap_gib=cap)


KINDS = {"everything": everything, "speed": speed, "limits": limits}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    columns = {"first step s": "first_step_seconds", **{f"{part} s": f"{part}_seconds" for part in PARTS}}
    columns |= {"tokens/s": "tokens_per_second", "peak GiB": "peak_allocated_gib", "reserved": "peak_reserved_gib"}
    columns |= {"estimated": "estimated_gib", "longest prompt": "longest_prompt", "note": "note"}
    shown = {name: key for name, key in columns.items() if any(key in row["figures"] for row in rows)}
    lines = [["step", "result", "s", *shown], ["-"] * (3 + len(shown))]
    for row in rows:
        values = [str(row["figures"].get(key, "")) for key in shown.values()]
        lines.append([row["step"], row["status"], f"{row['seconds']:.0f}", *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _has_reference(run: Path, adapter: Path) -> bool:
    """Tell whether a run's checkpoint holds the adapter that it started from, up to 16 bits."""
    import torch
    from safetensors.torch import load_file

    kept = next(run.glob("checkpoint-*/ref/adapter_model.safetensors"), None)
    if kept is None:
        return False
    reference, start = load_file(kept), load_file(adapter / "adapter_model.safetensors")
    return all(torch.allclose(reference[name].float(), start[name].float(), 0.01, 1e-7) for name in start)


def _is_complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text("utf-8")))
    except (OSError, ValueError):
        return False


@click.command(cls=Command)
@click.option("--speed", "kind", flag_value="speed", help="Ways of sampling; leaves out what RESULTS has already.")
@click.option("--limits", "kind", flag_value="limits", help="Memory, on a card of more than 23 GiB; the same.")
@click.option("--tiny", is_flag=True, help="The smallest shape: tries the check itself on a CPU.")
@click.option("--only", default="", help="Steps whose name has this in it; what they need must be there already.")
@click.option("-o", "--results", type=click.Path(path_type=Path), help="Rows.  [default: WORK/results.jsonl]")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs/gpu-check", help="Models, runs, logs.")
def main(kind: str | None, tiny: bool, only: str, results: Path | None, work: Path) -> None:
    """Check this card, step by step, and print a table."""
    if kind and tiny:
        raise click.UsageError(f"--{kind} needs a GPU")
    check = Check(results or work / "results.jsonl", work, tiny)
    known = set()
    if kind and check.results.exists():
        rows = map(json.loads, check.results.read_text("utf-8").splitlines())
        known = {row["step"] for row in rows if row["card"] == check.card and row["status"] in ("ok", "out of memory")}
    for step in KINDS[kind or "everything"](check):
        if only in step.name and step.name not in known:
            check.run(step)
    click.echo(table(check.rows))
    failed = [row["step"] for row in check.rows if row["status"] in ("failed", "out of time")]
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; the logs are in {check.work / 'logs'}")


if __name__ == "__main__":
    main()
