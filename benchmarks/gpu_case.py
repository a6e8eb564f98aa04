"""One case of benchmarks/gpu.py, in a process of its own: a recipe, run as it stands, with its trainer watched.

What a case changes beside the recipe's keys, because random weights never end an answer nor write a well-formed one:

- every completion has exactly the full length and then ends (otherwise its loss would be masked),
- rewards are computed over made-up answers: the gold one with some words replaced, each a different one.

Unsloth has to be imported before transformers, so nothing here imports transformers before the recipe does.
"""

import hashlib
import json
import os
import random
import runpy
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from malpyeong.files import write_text

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "unsloth", "unsloth_zoo", "xformers")
GIB = 2**30
_mem_get_info = torch.cuda.mem_get_info  # the real one: see cap_memory


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        key: part/shape/…, unique.
        script: ``grpo.py`` or ``sft.py`` of recipes/.
        arguments: of the script: a recipe file, overrides, ``--resume auto``.
        completion: tokens of every completion.
        cap_gib: what the process may allocate on the GPU.
        ascending: take the prompts from the shortest to the longest, one a step.
        gradients: file for the first step's gradients; completions are then given, not sampled.
        check: let the recipe look first whether it fits the card, by estimate; not where that is what is measured.
        kill_at: checkpoint folder on whose completion the process is killed.
        makes: folder without which a result from an earlier start does not count, as what follows needs it.
    """

    key: str
    script: str
    arguments: tuple[str, ...]
    completion: int = 0
    cap_gib: float | None = None
    ascending: bool = False
    gradients: str | None = None
    check: bool = True
    kill_at: str | None = None
    makes: str | None = None


def cap_memory(gib: float) -> None:
    """Let this process allocate ``gib`` on the GPU at most, and make the GPU look that small.

    Unsloth sizes its batches by the memory that is free, which on a large card is more than the process may have.
    """
    properties = torch.cuda.get_device_properties(0)
    cap = int(gib * GIB)
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / properties.total_memory))
    names = [name for name in dir(properties) if not name.startswith("_")]
    small = types.SimpleNamespace(**{name: getattr(properties, name) for name in names})
    small.total_memory = min(cap, properties.total_memory)

    def mem_get_info(device: Any = None) -> tuple[int, int]:  # noqa: ANN401 -- as in torch
        free, total = _mem_get_info(device)
        return min(free, max(0, cap - torch.cuda.memory_reserved(device))), min(total, cap)

    torch.cuda.mem_get_info = mem_get_info
    torch.cuda.get_device_properties = lambda device=None: small


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it was raised from, says that the GPU's memory does not suffice."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def synchronised() -> float:
    """Return the time at which all that was asked of the GPU is done, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Watch:
    """Times and memory of a GRPO trainer's steps.

    Attributes:
        figures: what was measured before the first step, and ``steps``: a row for each.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self.figures: dict[str, Any] = {"steps": []}
        self._row: dict[str, Any] = {}

    def attach(self, trainer: Any) -> None:  # noqa: ANN401 -- a transformers Trainer
        """Watch a trainer that is about to train."""
        self.figures |= memory("loaded")
        if self._case.script == "grpo.py":
            self._attach_to_generation(trainer)
        if self._case.ascending:
            lengths = [len(prompt[-1]["content"]) for prompt in trainer.train_dataset["prompt"]]
            order = sorted(range(len(lengths)), key=lengths.__getitem__)
            trainer.train_dataset = trainer.train_dataset.select(order)
        trainer.add_callback(self._callback())

    def _attach_to_generation(self, trainer: Any) -> None:  # noqa: ANN401 -- a GRPOTrainer
        ends = {
            "min_new_tokens": self._case.completion - 1,
            "forced_eos_token_id": trainer.processing_class.eos_token_id,
        }
        trainer.generation_config.update(**ends)
        trainer.generation_kwargs.update(ends)
        trainer.reward_funcs = [_on_made_up_answers(function) for function in trainer.reward_funcs]
        vocabulary = trainer.model.config.vocab_size
        generate = trainer._generate_single_turn

        def watched(prompt_ids: list[list[int]], *others: Any, **options: Any) -> Any:  # noqa: ANN401 -- as in TRL
            if self._case.gradients:
                rng = random.Random(0)
                eos = trainer.processing_class.eos_token_id
                given = [rng.choices(range(3, vocabulary), k=self._case.completion - 1) for _ in prompt_ids]
                return [[*ids, eos] for ids in given], None
            start = synchronised()
            found = generate(prompt_ids, *others, **options)
            self._add("generate_seconds", synchronised() - start)
            self._add("completion_tokens", sum(map(len, found[0])))
            self._row["prompt_tokens"] = max(map(len, prompt_ids))
            return found

        trainer._generate_single_turn = watched
        calculate = trainer._calculate_rewards

        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 -- as in TRL
            start = synchronised()
            found = calculate(*arguments, **options)
            self._add("reward_seconds", synchronised() - start)
            return found

        trainer._calculate_rewards = timed

    def _add(self, name: str, value: float) -> None:
        self._row[name] = self._row.get(name, 0) + value

    def _callback(self) -> Any:  # noqa: ANN401 -- a transformers TrainerCallback
        from transformers import TrainerCallback

        watch = self

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
                watch._row = {}
                if torch.cuda.is_available():
                    if watch._case.ascending:  # blocks of the last length do not fit this one
                        torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                self._start = synchronised()

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:  # noqa: ANN401
                if watch._case.gradients and not watch.figures["steps"]:
                    watch.figures["weights_sha256"] = save_gradients(model, Path(watch._case.gradients))

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
                row = watch._row
                row["step_seconds"] = synchronised() - self._start
                known = row.get("generate_seconds", 0) + row.get("reward_seconds", 0)
                row["update_seconds"] = row["step_seconds"] - known
                watch.figures["steps"].append(row | memory("peak"))

        return Steps()


def memory(name: str) -> dict[str, float]:
    """Return GiB allocated and reserved at most since the last reset, and what the GPU holds beside (its context)."""
    if not torch.cuda.is_available():
        return {}
    free, total = _mem_get_info()
    return {
        f"{name}_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        f"{name}_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "beside_gib": max(0.0, (total - free - torch.cuda.memory_reserved()) / GIB),
    }


def save_gradients(model: Any, path: Path) -> str:  # noqa: ANN401 -- a PeftModel
    """Write the gradients of all weights that are trained; return a digest of some of the 4-bit weights."""
    from safetensors.torch import save_file

    gradients = {
        name: parameter.grad.detach().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    save_file(gradients, path)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8 and ".q_proj." in name:
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _on_made_up_answers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a reward function well-formed answers in place of what random weights wrote."""

    def call(completions: list[Any], reference: list[str], trainer_state: Any, **columns: Any) -> Any:  # noqa: ANN401
        made = made_up_answers(reference, trainer_state.global_step)
        return function(
            completions=[[{"role": "assistant", "content": answer}] for answer in made],
            reference=reference,
            trainer_state=trainer_state,
            **columns,
        )

    call.__name__ = function.__name__
    return call


def made_up_answers(references: list[str], step: int) -> list[str]:
    """Return an answer in the contest's form for each gold one; every third has another sentence."""
    from malpyeong.contest.answer import contest_split

    answers = []
    for place, gold in enumerate(references):
        rng = random.Random(f"{step} {place}")
        verdict, reason = contest_split(gold)
        words = reason.rstrip(".").split()
        # A number tells each word from all others.
        words = [
            word if rng.random() < 0.8 else f"{rng.choice(words).strip('.')}{rng.randrange(1_000)}" for word in words
        ]
        if place % 3 == 0:
            verdict = verdict.replace('"', '"다른 ', 1)
        answers.append(f"{verdict}. {' '.join(words)}.")
    return answers


def run(case: Case, watch: Watch) -> None:
    """Run the case's recipe in this process."""
    import malpyeong.doctor
    import malpyeong.training.data

    train = malpyeong.training.data.train

    def watched(trainer: Any, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 -- as the original
        watch.attach(trainer)
        train(trainer, *arguments, **options)

    malpyeong.training.data.train = watched
    if not case.check:
        malpyeong.doctor.check = lambda *_: None
    assert "transformers" not in sys.modules, "Unsloth must be imported before transformers"
    recipe = runpy.run_path(str(ROOT / "recipes" / case.script))["main"]
    recipe.main(list(case.arguments), standalone_mode=False)


def environment() -> dict[str, Any]:
    """Return the card and the versions that a figure depends on."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name(0)
    return found


def main(text: str, result: Path) -> None:
    """Run the case that ``text`` describes and write its result; running out of memory is a result."""
    case = Case(**json.loads(text))
    watch = Watch(case)
    found = {"status": "ok", "environment": environment()}
    try:
        if case.cap_gib is not None and torch.cuda.is_available():
            cap_memory(case.cap_gib)
        run(case, watch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found["status"] = "out of memory"
        print(error, file=sys.stderr)
    reserved = max((step.get("peak_reserved_gib", 0) for step in watch.figures["steps"]), default=0)
    if case.cap_gib is not None and reserved > 1.01 * case.cap_gib:
        raise RuntimeError(f"{reserved:.2f} GiB were reserved under a cap of {case.cap_gib} GiB")
    found["figures"] = watch.figures
    write_text(result, json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    main(sys.argv[1], Path(sys.argv[2]))
