"""The contest's score of the dev questions while training runs, so that the best adapter is kept, not the last.

The model in memory answers every question as prediction does by default, greedily and repaired, but without
constraints: it generates as rollouts do, on whatever backend, and what it does to the form shows. Randomness is put
back afterwards: no later step of training is another than without.
"""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from malpyeong.contest.answer import contest_split
from malpyeong.decoding.answers import predict, repaired
from malpyeong.decoding.engines import Decoding, TransformersEngine
from malpyeong.files import write_text
from malpyeong.metrics.aggregate import METRICS
from malpyeong.models.environment import is_main_process
from malpyeong.prompts.messages import fit_prompts, left_out
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.tasks import grammar
from malpyeong.training.data import Questions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from malpyeong.metrics.pairs import PairScorer

# What decides: the contest's final score, or the mean of EM and ROUGE-1 where a scorer is missing.
METRIC = "eval_score"
COLUMNS = (*METRICS.values(), "final", "format_rate", "reason_median_chars", "score")


class DevScores(TrainerCallback):
    """Scores dev for a trainer, and keeps the scores in the run's folder.

    ``scores.json`` has a row for each evaluation: ``step``, the contest's metrics and its ``final`` score (null where
    the scorer is not loaded), of the answers as the model gave them ``format_rate`` and ``reason_median_chars``, and
    ``score``, which decides.
    ``best.json`` says which step's adapter is kept, and by what.

    Args:
        tokenizer: of the model.
        questions: of dev, with their contexts.
        max_length: limit of prompt and answer together, in tokens.
        max_new_tokens: limit of an answer.
        batch_size: answers that are generated at once.
        scorers: the loaded models of ``bertscore`` and ``bleurt``, as far as there are.
        output: the run's folder.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        questions: Questions,
        max_length: int,
        max_new_tokens: int,
        batch_size: int,
        scorers: Mapping[str, "PairScorer"],
        output: Path,
    ) -> None:
        self._tokenizer, self._records, self._scorers, self._output = tokenizer, questions.records, scorers, output
        self._batch_size, self._decoding = batch_size, Decoding(max_new_tokens=max_new_tokens)
        room = [max_length - max_new_tokens] * len(self._records)
        self._prompts = fit_prompts(tokenizer, self._records, questions.asked_with, room)
        if line := left_out(questions.asked_with, self._prompts, "model.max_length"):
            click.echo(f"data.dev: {line}")
        self._start: dict[str, Any] = {}
        if (output / "scores.json").exists():  # of a run that is resumed
            first = json.loads((output / "scores.json").read_text("utf-8"))[:1]
            self._start = next((row for row in first if row["step"] == 0), {})
        self._tagged, self._task = questions.mode == "choose_rule", questions.task
        self._columns: tuple[str, ...] = COLUMNS  # of grammar; of another task, what it scores

    def score_start(self, model: Any) -> None:  # noqa: ANN401 -- a PeftModel
        """Score the model before the first step of a run."""
        self._start = {"step": 0, **self.scores(model)}
        self._write([])
        click.echo(f"before training: {self.name} on dev {self._start['score']:.4f}")

    def evaluate(self, model: Any) -> EvalLoopOutput:  # noqa: ANN401 -- a PeftModel
        """Return what a trainer's ``evaluation_loop`` returns."""
        scores = {f"eval_{key}": value for key, value in self.scores(model).items()}
        return EvalLoopOutput(np.empty(0), None, scores, len(self._records))

    def scores(self, model: Any) -> dict[str, float]:  # noqa: ANN401 -- a PeftModel
        """Answer and score."""
        with _answering(model):
            engine = TransformersEngine(model, self._tokenizer, self._decoding)
            answers = dict(predict(engine, self._prompts, self._batch_size))  # several processes: all of it in each
        if self._tagged:
            answers = {row: split_choice(answer)[1] for row, answer in answers.items()}
        given = [record.with_answer(answers[row]) for row, record in enumerate(self._records)]
        final = repaired(given)[0] if self._task is grammar else given
        row = self._task.scores(self._records, [record.answer or "" for record in final], self._scorers)
        score = row.pop("score")
        problems = [self._task.format_problem(record.question_type, record.answer or "") for record in given]
        row["format_rate"] = problems.count(None) / len(given)
        if self._task is grammar:
            reasons = [len(contest_split(record.answer or "")[1]) for record in given]
            row["reason_median_chars"] = float(median(reasons))
        else:
            self._columns = (*row, "score")
        row["score"] = score
        return dict(broadcast_object_list([row])[0])  # all processes decide by the same

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Let the last step be scored too."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Write ``scores.json``."""
        rows = [row for row in state.log_history if METRIC in row]
        self._write([{key.removeprefix("eval_"): value for key, value in row.items()} for row in rows])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Write ``best.json``."""
        if not is_main_process():
            return
        best = {"step": state.best_global_step, "score": state.best_metric, "by": self.name}
        best["start"] = self._start.get("score")
        write_text(self._output / "best.json", json.dumps(best, ensure_ascii=False, indent=1) + "\n")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not is_main_process():
            return
        rows = [row for row in (self._start, *rows) if row]
        shown = [{key: row.get(key) for key in ("step", *self._columns)} for row in rows]
        write_text(self._output / "scores.json", json.dumps(shown, indent=1) + "\n")

    @property
    def name(self) -> str:
        """What the score is."""
        return "final score" if {"bertscore", "bleurt"} <= self._scorers.keys() else self._task.STAND_IN

    def line(self, state: Any) -> str:  # noqa: ANN401 -- a TrainerState
        """Return one line that says which adapter is kept."""
        best = json.loads((self._output / "best.json").read_text("utf-8"))
        line = f"best {best['by']} on dev {best['score']:.4f} at step {best['step']} of {state.global_step}"
        if best["start"] is not None and best["start"] >= best["score"]:
            line += f"; before training it was {best['start']:.4f}: nothing was gained"
        return line


@contextmanager
def _answering(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Put a model that is being trained into evaluation for a while, and leave all randomness as it was."""
    import torch

    unsloth = getattr(model, "for_inference", None), getattr(model, "for_training", None)
    states, was_training = (random.getstate(), np.random.get_state()), model.training
    with torch.random.fork_rng():
        if unsloth[0]:
            unsloth[0]()
        model.eval()
        try:
            yield
        finally:
            if unsloth[1]:
                unsloth[1]()
            model.train(was_training)
            random.setstate(states[0])
            np.random.set_state(states[1])
