"""What the recipes share: datasets from records, number formats, and the run from start to end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from malpyeong.config.recipe import GRPORecipe, Mode, PromptData, SFTRecipe, TrainingData
from malpyeong.contest.leaks import shared_questions
from malpyeong.contest.records import Record, load_records
from malpyeong.errors import InputError, printable
from malpyeong.models.environment import keep_compiled_code
from malpyeong.models.load import adapter_folder, check_adapter, pick_dtype
from malpyeong.models.memory import Backend
from malpyeong.prompts.context import Context, load_contexts
from malpyeong.prompts.messages import (
    Message,
    completion_ids,
    context_messages,
    fit_contexts,
    left_out,
    prompt_ids,
)
from malpyeong.prompts.rule_choice import NONE, Labels, is_readable, load_labels, tag
from malpyeong.training.run import (
    Inputs,
    best_checkpoint,
    check_run,
    finish_run,
    is_last,
    logged,
    run_has_ended,
    start_run,
    trained_weights,
    weights_digest,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Questions:
    """Training questions, and what stands in their prompts.

    Attributes:
        records: with gold answers.
        mode: ``data.mode`` of the recipe.
        contexts: rules and examples of each record; in modes plain and recall_rule there are none in any.
        labels: of each record, in modes choose_rule and recall_rule.
    """

    records: Sequence[Record]
    mode: Mode = "plain"
    contexts: Sequence[Context] = ()
    labels: Sequence[Labels] = ()

    @property
    def asked_with(self) -> Sequence[Context]:
        """What belongs to each record's prompt: its context, or none at all."""
        return self.contexts or [Context(choose=self.mode == "recall_rule")] * len(self.records)

    def answer_lengths(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the tokens of each gold answer, with the longest tag that may stand before it, or of a tag alone."""
        if self.mode == "recall_rule":
            return [len(completion_ids(tokenizer, tag(one.best_of_all or NONE))) - 1 for one in self.labels]
        lengths = [len(completion_ids(tokenizer, record.answer or "")) for record in self.records]
        if self.mode == "choose_rule":
            names = {NONE, *(rule.id for context in self.contexts for rule in context.rules)}
            tokens = {name: len(completion_ids(tokenizer, tag(name))) - 1 for name in names}
            for place, context in enumerate(self.contexts):
                lengths[place] += max(tokens[name] for name in (NONE, *(rule.id for rule in context.rules)))
        return lengths


def load_train(data: TrainingData) -> list[Record]:
    """Read the questions of ``data.train``, without those of ``data.dev`` where ``data.drop_leaks`` says so.

    Raises:
        InputError: a file is defective, or no question is left.
    """
    records = load_records(data.train, answers="gold")
    if data.drop_leaks and data.dev:
        leaked = {record.id for record in shared_questions(records, load_records(data.dev))}
        records = [record for record in records if record.id not in leaked]
        if not records:
            raise InputError(f"{data.train}: every question is in {data.dev} too; name another data.train or data.dev")
    return records


def load_questions(path: str, data: PromptData) -> Questions:
    """Read a file of questions; see :func:`with_prompt_data`."""
    return with_prompt_data(load_records(path, answers="gold"), data)


def with_prompt_data(records: Sequence[Record], data: PromptData) -> Questions:
    """Return records with what belongs to them in the files that ``data`` names.

    Raises:
        InputError: a file is defective, or has nothing for one of the records.
    """
    contexts = load_contexts(data.context, records, choose=data.mode == "choose_rule") if data.context else []
    if data.labels is None:
        return Questions(records, data.mode, contexts)
    labels = load_labels(data.labels, records)
    if data.mode == "recall_rule":
        for record, one in zip(records, labels, strict=True):
            if one.best_of_all and not is_readable(one.best_of_all):
                name = printable(one.best_of_all, 40)
                raise InputError(
                    f'{data.labels}: id "{printable(record.id, 40)}": its rule "{name}" cannot be named in a tag; give '
                    "it an id of at most 100 characters without brackets"
                )
        return Questions(records, data.mode, labels=labels)
    for record, context, one in zip(records, contexts, labels, strict=True):
        untried = [rule.id for rule in context.rules if one.mined and rule.id not in one.gains]
        if untried:
            raise InputError(
                f'{data.labels}: id "{printable(record.id, 40)}": it is not known whether the rule '
                f'"{printable(untried[0], 40)}" of its context helps; mine again with data.context={data.context} and '
                f"mining.top_k of at least {len(context.rules)}"
            )
    return Questions(records, data.mode, contexts, labels)


def open_run(recipe: SFTRecipe | GRPORecipe, resume: bool) -> tuple[Inputs, Path | None] | None:
    """Look at the run's folder before anything is loaded.

    Returns:
        (what the run is made from, the checkpoint to go on from or None), or None if the run has ended, which is said
        on the screen.

    Raises:
        InputError: see :func:`malpyeong.training.run.check_run`; or the recipe's adapter is none.
    """
    output = Path(recipe.training.output)
    files = {name: getattr(recipe.data, name, None) for name in ("train", "dev", "context", "labels")}
    inputs: dict[str, Path | list[Path] | str] = {f"data.{name}": Path(path) for name, path in files.items() if path}
    if recipe.model.adapter:
        check_adapter(recipe.model.adapter)
        inputs["model.adapter"] = adapter_folder(recipe.model.adapter) / "adapter_model.safetensors"
    inputs["model.name"] = recipe.model.name
    scorers = getattr(recipe.data, "scorers", None)
    for name in ("bertscore", "bleurt"):
        if scorer := getattr(scorers, name, None):
            inputs[f"data.scorers.{name}"] = scorer
    checkpoint = check_run(output, recipe, inputs, resume)
    if run_has_ended(output, recipe):
        click.echo(f"{output / 'adapter'}: this run has ended already")
        return None
    return inputs, checkpoint


def sft_dataset(tokenizer: "PreTrainedTokenizerBase", questions: Questions, max_length: int) -> "Dataset":
    """Return ``input_ids`` and ``labels`` (-100 on the prompt: the loss is on the answer and its end) for each record.

    Rules and examples that do not fit are left out, and counted on the screen. Where the model chooses, its answer
    begins with the tag of the rule that helps most; in mode recall_rule that tag, of all rules, is all that is learnt.

    Raises:
        InputError: a record has more than ``max_length`` tokens.
    """
    from datasets import Dataset

    records, answers = questions.records, [record.answer or "" for record in questions.records]
    asked = _messages(tokenizer, questions, [max_length - length for length in questions.answer_lengths(tokenizer)])
    if questions.mode == "recall_rule":
        answers = [tag(labels.best_of_all or NONE) for labels in questions.labels]
    elif questions.mode == "choose_rule":
        named = [labels.best(shown.rules) for labels, (_, shown) in zip(questions.labels, asked, strict=True)]
        answers = [tag(name) + answer for name, answer in zip(named, answers, strict=True)]
    rows = []
    for (messages, _), answer in zip(asked, answers, strict=True):
        prompt, completion = prompt_ids(tokenizer, messages), completion_ids(tokenizer, answer)
        if questions.mode == "recall_rule":
            completion = completion[:-1]  # the turn does not end with the tag
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    check_lengths(records, [len(row["input_ids"]) for row in rows], max_length)
    return Dataset.from_list(rows)


def grpo_dataset(
    tokenizer: "PreTrainedTokenizerBase",
    questions: Questions,
    max_length: int,
    max_completion_length: int,
    prompts: int,
    seed: int,
) -> "Dataset":
    """Return ``prompt`` (chat messages), ``reference`` (the gold answer) and ``record_id``, in training order; where
    the model chooses, also ``candidates`` and ``gains``: the rules of the prompt and how much each helps.

    Rules and examples that do not fit are left out, and counted on the screen. The order is drawn here for the whole
    run, pass after pass over the records, because TRL's sampler starts its first pass again when a run is resumed in a
    later one.

    Args:
        tokenizer: to count tokens.
        questions: what is asked.
        max_length: limit of prompt and completion together, in tokens.
        max_completion_length: tokens that a completion may have.
        prompts: how many prompts the run uses.
        seed: of the order.

    Raises:
        InputError: a prompt and a completion of full length have more than ``max_length`` tokens together.
    """
    from datasets import Dataset

    records = questions.records
    asked = _messages(tokenizer, questions, [max_length - max_completion_length] * len(records))
    rows: list[dict[str, Any]] = [
        {"prompt": messages, "reference": record.answer, "record_id": record.id}
        for (messages, _), record in zip(asked, records, strict=True)
    ]
    if questions.mode == "choose_rule":
        for row, labels, (_, shown) in zip(rows, questions.labels, asked, strict=True):
            row |= {"candidates": [rule.id for rule in shown.rules], "gains": labels.of(shown.rules)}
    lengths = [len(prompt_ids(tokenizer, messages)) + max_completion_length for messages, _ in asked]
    check_lengths(records, lengths, max_length)
    rng = random.Random(seed)
    order: list[dict[str, Any]] = []
    while len(order) < prompts:
        order += rng.sample(rows, len(rows))
    return Dataset.from_list(order[:prompts])


def keep_adapter_in_float32(model: Any) -> None:  # noqa: ANN401 -- a PeftModel
    """Hold the weights that are trained in float32 again.

    TRL casts them to bfloat16 where the base is 4-bit. A GRPO update is smaller than bfloat16 can add to a weight,
    and a resumed run loads them as float32, so that it would not go on to the same result.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train(
    trainer: Any,  # noqa: ANN401 -- a transformers Trainer
    tokenizer: "PreTrainedTokenizerBase",
    recipe: SFTRecipe | GRPORecipe,
    backend: Backend,
    inputs: Inputs,
    checkpoint: Path | None,
) -> None:
    """Train, and leave a complete run's folder.

    Args:
        trainer: an SFTTrainer or GRPOTrainer.
        tokenizer: saved beside the adapter, with ``model.max_length`` for its ``model_max_length``.
        recipe: written down in the run's folder.
        backend: that the model was loaded with.
        inputs: what the run is made from.
        checkpoint: where to go on from; one that was written at the very end is only loaded.

    Raises:
        TrainingStoppedError: going on is pointless (see ``malpyeong.training.callbacks``), nothing was learnt, or the
            GPU's memory does not suffice.
    """
    from transformers import TrainerState

    from malpyeong.training.callbacks import Guards, check_learnt, explain_out_of_memory

    output = Path(recipe.training.output)
    keep_adapter_in_float32(trainer.model)
    show_progress(trainer)
    keep_to_arguments(trainer)
    trainer.add_callback(Guards())
    before = weights_digest(trained_weights(trainer.model))
    start_run(output, recipe, inputs)
    if checkpoint is not None:
        click.echo(f"going on from {checkpoint}")
    if checkpoint is not None and is_last(checkpoint, getattr(recipe.training, "max_steps", None)):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(best_checkpoint(checkpoint)))
    else:
        if backend == "unsloth":
            folder = keep_compiled_code()
            click.echo(
                f"the first step compiles, which may take a minute; {folder} keeps the result for the next start"
            )
        with explain_out_of_memory(recipe, backend):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log = trainer.state.log_history
    check_learnt(trained_weights(trainer.model), before, log)
    tokenizer.model_max_length = recipe.model.max_length  # of prompt and answer: prediction keeps to it
    finish_run(output, trainer.model, tokenizer, recipe.model.name, log)


# What a step's line shows, in this order; everything else is in log.json.
_SHOWN = {
    "loss": "loss",
    "eval_loss": "dev loss",
    "reward": "reward",
    "dead_groups": "dead groups",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off",
    "grad_norm": "gradient",
    "step_seconds": "seconds",
    "generate_seconds": "sampling",
    "reward_seconds": "rewards",
}


def show_progress(trainer: Any) -> None:  # noqa: ANN401 -- a transformers Trainer
    """Replace the trainer's printout (some thirty numbers a step) by one short line under the progress bar."""
    from transformers import ProgressCallback

    class ShortProgress(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
            line = progress_line(state.global_step, logs or {})
            if self.training_bar is not None and line:
                self.training_bar.write(line)

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShortProgress)


def keep_to_arguments(trainer: Any) -> None:  # noqa: ANN401 -- a transformers Trainer
    """Let a resumed run save and log as often as its own arguments say, not as the checkpoint's said."""
    from transformers import TrainerCallback

    class OwnArguments(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
            state.compute_steps(args, state.max_steps)

    trainer.add_callback(OwnArguments())


def progress_line(step: int, logs: dict[str, Any]) -> str:
    """Return one line of the numbers that tell whether training goes well, or "" if there are none."""
    rewards = {key: key.split("/")[1] for key in logs if key.startswith("rewards/") and key.endswith("/mean")}
    numbers = {name: logged(logs, key) for key, name in {**_SHOWN, **rewards}.items()}
    parts = [f"{name} {number:.4g}" for name, number in numbers.items() if number is not None]
    return f"step {step}: {', '.join(parts)}" if parts else ""


def precision(dtype: str) -> dict[str, Any]:
    """Return the trainer's number format: mixed precision in the dtype of the weights, none for float32."""
    import torch

    chosen = pick_dtype(dtype)
    # Without use_cpu the trainer refuses bf16 where there is no GPU.
    return {
        "bf16": chosen == torch.bfloat16,
        "fp16": chosen == torch.float16,
        "use_cpu": not torch.accelerator.is_available(),
    }


def _messages(
    tokenizer: "PreTrainedTokenizerBase", questions: Questions, limits: Sequence[int]
) -> list[tuple[list[Message], Context]]:
    """Return each record's prompt and the context in it: as much as leaves at most ``limits`` tokens."""
    records, fitted = questions.records, questions.asked_with
    if questions.contexts:
        fitted = fit_contexts(tokenizer, records, questions.contexts, limits)
        if line := left_out(questions.contexts, fitted, "model.max_length"):
            click.echo(line)
    if questions.mode == "recall_rule":
        click.echo(recalled_share(questions.labels))
    elif questions.mode == "choose_rule":
        click.echo(labelled_share(questions.labels, fitted))
    return [(context_messages(record, context), context) for record, context in zip(records, fitted, strict=True)]


def labelled_share(labels: Sequence[Labels], shown: Sequence[Context]) -> str:
    """Return one line that says in how many questions a rule that helps is among the candidates.

    Raises:
        InputError: in none.
    """
    helped = sum(any(one.of(context.rules)) for one, context in zip(labels, shown, strict=True))
    if not helped:
        raise InputError(
            "data.labels: no rule that helps is among the candidates of any question; make data.labels and "
            "data.context from the same rule book"
        )
    return f"a rule that helps is among the candidates of {helped} of {len(labels)} questions"


def recalled_share(labels: Sequence[Labels]) -> str:
    """Return one line that says how many questions have a rule to recall, and how many rules these are.

    Raises:
        InputError: none has.
    """
    best = [one.best_of_all for one in labels if one.best_of_all]
    if not best:
        raise InputError("data.labels: no rule helps with any question: none to recall; see docs/mining.md")
    return f"{len(best)} of {len(labels)} questions have a rule to recall, one of {len(set(best))}"


def check_lengths(records: Sequence[Record], lengths: Sequence[int], limit: int) -> None:
    """Make sure that every record fits, so that nothing is ever cut.

    Raises:
        InputError: some do not; names the longest.
    """
    long = [(length, record.id) for length, record in zip(lengths, records, strict=True) if length > limit]
    if long:
        longest, id_ = max(long)
        raise InputError(
            f'{len(long)} of {len(records)} records do not fit model.max_length={limit} (the longest, id "{id_}", '
            f"needs {longest} tokens); raise model.max_length to {longest} or remove them"
        )
