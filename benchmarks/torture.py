"""SIGKILL, a full disk, a read-only folder: does each long command go on to the same result?

    make torture                                            # 10 kills of each command, then both faults
    python -m benchmarks.torture --command sft --kills 2    # a look at one of them

Kills: a run of the tiny model is killed at a random moment, resumed, killed again, until it ends; then the next one
begins. From its random moment on a kill waits until the run's Python stack says that it is in the phase whose turn it
is: generation, reward, update, save, write. In the end every file must be that of a run that
nobody disturbed, bit for bit (of logs and tables: all but times), and no other file be left.

Faults: the disk fills up, or becomes read-only, before, within and at the end of a run. The command must end in one
line, and go on to the same result once there is room. Where the kernel lets a user mount (``unshare -rm``) the disk is
a tmpfs; elsewhere files may not grow beyond a limit (EFBIG), and read-only is a folder without the right to write.
"""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from pyarrow.parquet import read_table

from malpyeong.contest.records import load_records, write_records
from malpyeong.files import write_text
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Command

ROOT = Path(__file__).parent.parent
COMMANDS = ("sft", "grpo", "mine", "predict")
# Python that shows its stack on SIGUSR1, in the file that its first argument names, from the first line that it prints.
CHILD = (
    "import faulthandler, runpy, signal, sys; shown = open(sys.argv[1], 'w'); faulthandler.register(signal.SIGUSR1, "
    "shown); print(flush=True); sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
BEGUN = re.compile(rb"(?:^|[\r\n])(?:predict: |mine: )? *\d+%\|")  # the progress bar
FIRST_SAVED = re.compile(r"checkpoint-\d+/trainer_state\.json|part\.jsonl$")
FAULTS = ("full", "full at the end", "read-only at the start", "read-only")
# What the run is doing → what its stack holds then; the first that fits.
PHASES = {
    "write": ("malpyeong/files.py", "finish_run"),
    "save": ("_save_checkpoint",),
    "evaluation": ("in evaluate",),
    "log": ("in log",),
    "reward": ("malpyeong/training/rewards.py", "_calculate_rewards"),
    "generation": ("in _generate", "decoding/engines.py"),
    "perplexity": ("perplexity.py",),
    "update": ("training_step", "optimizer.py", "_clip_grad_norm"),
}
AIMS = {
    "sft": ("update", "evaluation", "save", "write", "any"),
    "grpo": ("generation", "reward", "update", "save", "write"),
    "mine": ("perplexity", "write", "any"),
    "predict": ("generation", "write", "any"),
}
TIMES = re.compile(r"_seconds$|_runtime$|_per_second$|^step_time$")


@dataclass
class Job:
    """One command on small data, and what an undisturbed run of it left.

    Attributes:
        name: of the command.
        words: the command line, without Python.
        folder: that it writes into.
        seconds: from its progress bar to its end.
        whole: :func:`contents` of ``folder`` after an undisturbed run.
        size: of ``folder`` then, in bytes.
        saved: what is there when a full disk can only meet the result.
        room: in bytes, that is too little for the result then.
    """

    name: str
    words: Sequence[str]
    folder: Path
    seconds: float = 0.0
    whole: Mapping[str, Any] = field(default_factory=dict)
    size: int = 0
    saved: re.Pattern[str] = FIRST_SAVED
    room: int = 0


def jobs(work: Path) -> list[Job]:
    """Write the small data and return the four commands on it."""
    records = sorted(load_records(DATA / "train.json", "gold"), key=lambda one: len(one.question + (one.answer or "")))
    for name, part in (("train", records[:160]), ("dev", records[160:168]), ("questions", records[:24])):
        write_records(work / f"{name}.json", part)
    train, dev, questions = (work / f"{name}.json" for name in ("train", "dev", "questions"))
    model = f"model.name={TINY_BASE}"
    recipes = {
        "sft": [
            *(f"data.train={train}", f"data.dev={dev}", "training.batch_size=8", "training.epochs=0.6"),
            *("training.eval_steps=2", "training.logging_steps=1", "training.warmup_steps=2"),
        ],
        "grpo": [
            *(f"data.train={train}", f"model.adapter={work / 'adapter'}", "training.batch_size=8"),
            *("training.num_generations=4", "training.max_completion_length=64", "training.max_steps=6"),
            *("training.save_steps=2", "data.rewards={format: 1, rouge_1: 1}"),
        ],
        "mine": [f'data.questions=["{questions}"]', "mining.batch_tokens=2000"],
    }
    found = []
    for name, overrides in recipes.items():
        output = f"{'mining' if name == 'mine' else 'training'}.output={work / 'disk' / name}"
        recipe = ("recipes/tiny", f"{name}.yaml")
        words = [f"recipes/{name}.py", "/".join(recipe), model, *overrides, output, "--resume", "auto"]
        found.append(Job(name, words, work / "disk" / name))
    answers = ["malpyeong/predict.py", TINY_BASE, questions, "--batch-size", "4", "--max-new-tokens", "64"]
    found.append(
        Job(
            "predict",
            [*map(str, answers), "-o", str(work / "disk" / "predict" / "pred.json")],
            work / "disk" / "predict",
        )
    )
    return found


class Child:
    """A command that is running."""

    def __init__(self, job: Job, work: Path) -> None:
        self.stack, self.output = work / "stack.txt", work / "output.txt"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": "0",
        }
        with self.output.open("wb") as output:
            command = [sys.executable, "-c", CHILD, str(self.stack), *job.words]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Wait; return whether it happened before the command ended."""
        while self.process.poll() is None:
            if happened():
                return True
            time.sleep(0.001)
        return False

    def begun(self) -> bool:
        """Wait for the progress bar."""
        return self.wait_until(lambda: BEGUN.search(self.output.read_bytes()) is not None)

    def doing(self) -> str:
        """Return what the command is doing, "other" if it is nothing that has a name here."""
        before = self.stack.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.001)
        stack = self.stack.read_bytes()[before:].decode(errors="replace")
        return next((phase for phase, marks in PHASES.items() if any(mark in stack for mark in marks)), "other")

    def lines(self) -> list[str]:
        """Wait for the end; return the lines that it printed, without progress bars."""
        self.process.wait()
        text = re.sub(r"\x1b\[\w", "", self.output.read_text("utf-8", errors="replace")).replace("\r", "\n")
        return [line.strip() for line in text.splitlines() if line.strip() and "%|" not in line]


def snapshot(folder: Path) -> dict[str, int]:
    """Return path → size of every file there is now."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                found[str(path.relative_to(folder))] = path.stat().st_size
            except OSError:
                continue  # gone already
    return found


def log_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a log without times."""
    return [{key: value for key, value in row.items() if not TIMES.search(key)} for row in rows]


def contents(folder: Path) -> dict[str, Any]:
    """Return name → what must be the same; every file's name is there."""
    found: dict[str, Any] = {}
    for name in sorted(snapshot(folder)):
        path = folder / name
        if path.suffix == ".parquet":
            found[name] = read_table(path).to_pylist()
        elif path.name == "trainer_state.json":
            found[name] = log_rows(json.loads(path.read_text("utf-8"))["log_history"])
        elif path.name == "log.json":
            found[name] = log_rows(json.loads(path.read_text("utf-8")))
        else:
            found[name] = path.read_bytes()
    return found


def differences(job: Job) -> tuple[list[str], int, int]:
    """Return the files that differ from the undisturbed run's, and how many log rows are doubled and lost."""
    found = contents(job.folder)
    different = [name for name in {**job.whole, **found} if found.get(name) != job.whole.get(name)]
    counts = [
        Counter((row["step"], "eval_loss" in row) for row in one.get("log.json", ())) for one in (found, job.whole)
    ]
    return different, (counts[0] - counts[1]).total(), (counts[1] - counts[0]).total()


def undisturbed(job: Job, work: Path) -> None:
    """Run a command once from start to end and note what it leaves."""
    child = Child(job, work)
    child.begun()
    begin = time.perf_counter()
    part = 0

    def ended() -> bool:
        nonlocal part
        part = max([part, *(size for name, size in snapshot(job.folder).items() if name.endswith("part.jsonl"))])
        return False

    child.wait_until(ended)
    lines = child.lines()
    if child.process.returncode:
        raise SystemExit("\n".join(lines[-20:]))
    job.seconds = time.perf_counter() - begin
    job.whole, job.size = contents(job.folder), sum(snapshot(job.folder).values())
    job.saved = re.compile(r"^log\.json$") if "log.json" in job.whole else FIRST_SAVED
    job.room = 2**16 if "log.json" in job.whole else -(-part // 4096) * 4096


def kill_one(job: Job, work: Path, rng: random.Random, aim: str) -> str | None:
    """Start a command and kill it, unless ``aim`` is "end"; return what it was doing, or None if it came to its end."""
    child = Child(job, work)
    if aim == "write" and rng.random() < 0.5:  # it may be killed while it writes down what it is made from
        child.wait_until(lambda: child.output.stat().st_size > 0)
    else:
        child.begun()
    moment = time.perf_counter() + (rng.uniform(0, 0.7 * job.seconds) if aim not in ("write", "end") else 0)
    phase = ""

    def is_time() -> bool:
        nonlocal phase
        phase = child.doing() if aim != "end" and time.perf_counter() > moment else ""
        return bool(phase) and aim in ("any", phase)

    if child.wait_until(is_time):
        child.process.kill()
        child.process.wait()
        return phase
    if child.process.returncode not in (0, -signal.SIGUSR1):  # at the very end nothing answers the signal any more
        raise SystemExit("\n".join([f"{job.name}: does not resume", *child.lines()[-20:]]))
    return None


def torture(job: Job, work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a command ``kills`` times in as many runs as that takes; return the table's row."""
    phases: Counter[str] = Counter()
    different: set[str] = set()
    runs = doubled = lost = 0
    aims = itertools.cycle(AIMS[job.name])  # the next one's turn also after a run in which none came: some are short
    while phases.total() < kills:
        shutil.rmtree(job.folder, ignore_errors=True)
        while phase := kill_one(job, work, rng, next(aims) if phases.total() < kills else "end"):
            phases[phase] += 1
            click.echo(f"{job.name}: kill {phases.total()} in {phase}")
        runs += 1
        files, more, less = differences(job)
        different, doubled, lost = different | {*files}, doubled + more, lost + less
        click.echo(f"{job.name}: run {runs} has ended; different: {', '.join(files) or 'nothing'}")
    return {
        **{"command": job.name, "kills": kills, "runs": runs, "phases": dict(phases.most_common())},
        **{"different": sorted(different), "doubled": doubled, "lost": lost},
    }


class Disk:
    """Where the runs lie while the disk is to fill up or to become read-only."""

    def __init__(self, folder: Path, is_mount: bool) -> None:
        self.folder, self.is_mount = folder, is_mount
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if is_mount:
            mount("-t", "tmpfs", "-o", "size=1g", "none", folder)

    def fill(self, child: Child, room: int) -> None:
        """Leave ``room`` bytes to a command that is running."""
        if self.is_mount:
            usage = shutil.disk_usage(self.folder)
            mount("-o", f"remount,size={usage.used + room}", self.folder)
        else:
            resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def make_read_only(self) -> None:
        """Take the right to write away."""
        if self.is_mount:
            mount("-o", "remount,ro", self.folder)
        else:
            subprocess.run(["chmod", "-R", "a-w", self.folder], check=True)

    def mend(self) -> None:
        """Make room again, and let write."""
        if self.is_mount:
            mount("-o", "remount,rw,size=1g", self.folder)
        else:
            subprocess.run(["chmod", "-R", "u+w", self.folder], check=True)

    def close(self) -> None:
        """Take the disk away."""
        if self.is_mount:
            subprocess.run(["umount", self.folder], check=True)


def mount(*words: str | Path) -> None:
    """Mount, or mount again; a disk on which something is being written is asked again."""
    for _ in range(200):
        result = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
        if not result.returncode:
            return
        time.sleep(0.02)
    raise SystemExit(result.stderr)


def fault(job: Job, work: Path, disk: Disk, name: str) -> str:
    """Let a command meet a fault; return what is wrong with how it ends, "" if nothing."""
    if name == "read-only at the start":
        disk.make_read_only()
        child = Child(job, work)
    else:
        child = Child(job, work)
        saved = job.saved if name == "full at the end" else FIRST_SAVED
        if not child.begun() or not child.wait_until(lambda: any(map(saved.search, snapshot(job.folder)))):
            return "ended before the fault"
        if name == "read-only":
            disk.make_read_only()
        else:
            child.process.send_signal(signal.SIGSTOP)
            disk.fill(child, job.room if name == "full at the end" else job.size // 4)
            child.process.send_signal(signal.SIGCONT)
    lines = child.lines()
    errors = [line for line in lines if line.startswith("Error: ")]
    click.echo(f"{job.name}, {name}: exit code {child.process.returncode}, {errors or lines[-3:]}")
    disk.mend()
    if child.process.returncode != 2 or errors != lines[-1:] or any("Traceback" in line for line in lines):
        return f"exit code {child.process.returncode}, not in one line"
    child = Child(job, work)
    lines = child.lines()
    if child.process.returncode:
        return f"does not resume: {lines[-1]}"
    return ", ".join(differences(job)[0])


def table(rows: Sequence[Mapping[str, Any]], way: str) -> str:
    """Return two Markdown tables: what the kills did, and the faults."""
    lines = ["| command | kills | runs | killed in | same files | log lines doubled / lost |", "|-" * 6 + "|"]
    for row in rows:
        phases = ", ".join(f"{phase} {count}" for phase, count in row["phases"].items())
        same = ", ".join(row["different"]) or "yes"
        counts = f"{row['doubled']} / {row['lost']}"
        lines.append(f"| {row['command']} | {row['kills']} | {row['runs']} | {phases} | {same} | {counts} |")
    lines += ["", f"Full disk and read-only folder: {way}.", "", f"| command | {' | '.join(FAULTS)} |", "|-" * 5 + "|"]
    for row in rows:
        cells = [row["faults"].get(name, "not run") or "one line, same files" for name in FAULTS]
        lines.append(f"| {row['command']} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(cls=Command)
@click.option("--command", "names", multiple=True, type=click.Choice(COMMANDS), default=COMMANDS, help="Only these.")
@click.option("--kills", default=10, show_default=True, type=click.IntRange(min=0))
@click.option("--seed", default=0, show_default=True)
@click.option("--faults/--no-faults", default=True, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/torture"), show_default=True)
def main(names: Sequence[str], kills: int, seed: int, faults: bool, output: Path) -> None:
    """Kill, fill the disk, forbid to write; write OUTPUT/torture.md and exit with 1 if anything is not as it should."""
    work = output.absolute()
    is_mount = os.environ.get("TORTURE") == "mounts"
    if not is_mount and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        os.environ["TORTURE"] = "mounts"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "benchmarks.torture", *sys.argv[1:]])
    (work / "disk").mkdir(parents=True, exist_ok=True)
    rows = []
    for job in jobs(work):
        if job.name not in names and (job.name != "sft" or "grpo" not in names or (work / "adapter").exists()):
            continue
        shutil.rmtree(job.folder, ignore_errors=True)
        undisturbed(job, work)
        if job.name == "sft":
            shutil.copytree(job.folder / "adapter", work / "adapter", dirs_exist_ok=True)
        if job.name not in names:
            continue
        row = torture(job, work, kills, random.Random(f"{seed} {job.name}"))
        row["faults"] = {}
        for name in FAULTS if faults else ():
            disk = Disk(job.folder.parent, is_mount)
            row["faults"][name] = fault(job, work, disk, name)
            disk.close()
        rows.append(row)
        way = (
            "a tmpfs (unshare -rm)"
            if is_mount
            else "files may not grow (RLIMIT_FSIZE), folders without write permission"
        )
        write_text(work / "torture.md", table(rows, way) + "\n")
    click.echo(table(rows, way))
    if any(row["different"] or row["doubled"] or row["lost"] or any(row["faults"].values()) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
