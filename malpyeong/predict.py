"""Answer every question of a file: ``python -m malpyeong.predict MODEL QUESTIONS -o PRED``.

Every finished answer is kept beside the output in ``.NAME.part.jsonl``; the same command resumes there after a
crash or a kill, to the same file. What is written is repaired last (``malpyeong.contest.repair``). What the answers are
made of stands beside them in ``NAME.manifest.json``, for ``python -m malpyeong.reproduce``.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from malpyeong.contest.records import Record, write_records
from malpyeong.decoding.answers import predict, repaired
from malpyeong.decoding.vote import ReasonScore, rouge_score
from malpyeong.errors import InputError, counted
from malpyeong.files import PartFile, check_writable, digest, write_text
from malpyeong.prompts.context import NO_CONTEXT, Context, load_contexts
from malpyeong.prompts.messages import Prompt, fit_prompts, left_out
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.tasks import grammar
from malpyeong.tasks.task import grammar_only, load, task_of
from malpyeong.terminal import Command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Options that name what the answers are made from.
INPUTS = ("model", "questions", "adapter", "context", "bertscore_model", "bleurt_model")


def file_digests(name: str) -> dict[str, str]:
    """Return the SHA-256 of each file of a model's or adapter's folder; {} of what is no folder here (a hub id)."""
    folder = Path(name)
    return {path.name: digest(path) for path in sorted(folder.glob("*")) if path.is_file()}


def digests(inputs: Mapping[str, str | None], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return what tells the inputs of a prediction from others, under whatever names.

    Of a model or adapter the digests of its files, of one on the hub its revision and a digest of its weights.

    Args:
        inputs: :data:`INPUTS` → file, folder or hub id, None where there is none.
        tokenizer: of the model, with the chat template that is used.
    """
    from malpyeong.models.adapter import adapter_folder
    from malpyeong.models.load import model_folder, weight_files_digest

    def of_model(name: str) -> dict[str, str | None]:
        if Path(name).is_dir():
            return {**file_digests(name)}
        folder = model_folder(name)
        return {"revision": folder.name if folder else None, "weights": weight_files_digest(name)}

    model, questions, adapter, context, *scorers = (inputs.get(name) for name in INPUTS)
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    return {
        "questions": questions and digest(Path(questions)),
        "model": model and of_model(model),
        "adapter": adapter and file_digests(str(adapter_folder(adapter))),
        "context": context and digest(Path(context)),
        **{name: scorer and of_model(scorer) for name, scorer in zip(INPUTS[4:], scorers, strict=True)},
        "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        "model_max_length": tokenizer.model_max_length,
    }


def environment() -> dict[str, Any]:
    """Return what else may change an answer's bits: versions, git revision, card, number of threads."""
    import torch

    from malpyeong.training.run import git_revision, versions

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**versions(), "git": git_revision(), "device": card, "threads": torch.get_num_threads()}


def fitted(
    tokenizer: "PreTrainedTokenizerBase", records: Sequence[Record], contexts: Sequence[Context], max_new_tokens: int
) -> list[Prompt]:
    """Return prompts with as much of each context as leaves room for the answer, as in training; say what is left out.

    Raises:
        InputError: a question does not fit even by itself.
    """
    room = tokenizer.model_max_length - max_new_tokens
    prompts = fit_prompts(tokenizer, records, contexts, [room] * len(records))
    limit = f"the model's {tokenizer.model_max_length} tokens"
    long = [(len(prompt.ids), prompt.record.id) for prompt in prompts if len(prompt.ids) > room]
    if long:
        longest, id_ = max(long)
        raise InputError(
            f"{len(long)} of {len(records)} questions do not fit {limit} with answers of {max_new_tokens} (the "
            f'longest, id "{id_}", has {longest}); lower --max-new-tokens, or train with a larger model.max_length'
        )
    if line := left_out(contexts, prompts, f"{limit} with answers of {max_new_tokens}"):
        click.echo(f"{line}; a lower --max-new-tokens leaves them more room")
    return prompts


def _score(bertscore: str | None, bleurt: str | None) -> ReasonScore:
    """Return the mean of ROUGE-1 and of the scores whose models are named."""
    from malpyeong.metrics.scorers import load_scorer

    models = {"bertscore": bertscore, "bleurt": bleurt}
    scorers = {name: load_scorer(name, model) for name, model in models.items() if model}

    def mean(candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        columns = [rouge_score(candidates, references)]
        columns += [list(scorer.score(candidates, references)) for scorer in scorers.values()]
        return [sum(row) / len(row) for row in zip(*columns, strict=True)]

    return mean


def _write_manifest(written: Sequence[Path], made_of: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write NAME.manifest.json beside the output; paths in it are relative to its folder."""
    output = written[0]

    def relative(name: str, value: Any) -> Any:  # noqa: ANN401 -- an option's value
        if name not in INPUTS or value is None or not Path(value).exists():
            return value
        path = Path(os.path.relpath(value, output.parent)).as_posix()
        return path if path.startswith(".") else f"./{path}"  # no hub id begins so

    manifest = {
        "sha256": {path.name: digest(path) for path in written},
        "options": {name: relative(name, value) for name, value in options.items() if name != "output"},
        "made_of": made_of,
        "environment": environment(),
    }
    write_text(manifest_of(output), json.dumps(manifest, ensure_ascii=False, indent=2) + "\n")


def manifest_of(output: Path) -> Path:
    """Return the path of a prediction's manifest."""
    return output.with_name(f"{output.stem}.manifest.json")


@click.command(cls=Command)
@click.argument("model")
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Prediction file to write.")
@click.option("--adapter", help="Folder or hub id of a LoRA adapter to put on MODEL.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--max-new-tokens",
    default=320,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest answer; rules and examples that do not fit the model's length beside it are left out.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
)
@click.option("--load-in-4bit", is_flag=True, help="Hold MODEL in 4-bit NF4.")
@click.option(
    "--decoding",
    "decoding_name",
    type=click.Choice(["constrained", "free"]),
    help="constrained: well-formed answers, and one of the options where a question offers some. Default: constrained "
    "for grammar, which alone has it, else free.",
)
@click.option(
    "--samples",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Answers per record; the sentence most agree on wins, with the reason nearest to the others'.",
)
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--seed", default=0, show_default=True, help="Of the samples.")
@click.option("--bertscore-model", help="Hub id or folder: compare samples' reasons by BERTScore too.")
@click.option("--bleurt-model", help="Hub id or folder: compare samples' reasons by BLEURT too.")
@click.option("--engine", "engine_name", default="transformers", type=click.Choice(["transformers", "vllm"]))
@click.option(
    "--context",
    type=click.Path(path_type=Path),
    help="Rules and examples for each question, as in training (data.context): python -m malpyeong.retrieval search.",
)
@click.option(
    "--choose",
    "choose_rule",
    is_flag=True,
    help="For a model that was trained to name one of the rules first (data.labels): which rule of --context it named "
    "is written beside the output, as NAME.choices.jsonl.",
)
@click.option("--no-repair", is_flag=True, help="Write the answers as the model gave them.")
def main(
    model: str,
    questions: Path,
    output: Path,
    adapter: str | None,
    batch_size: int,
    max_new_tokens: int,
    dtype: str,
    load_in_4bit: bool,
    decoding_name: str | None,
    samples: int,
    temperature: float,
    seed: int,
    bertscore_model: str | None,
    bleurt_model: str | None,
    engine_name: str,
    context: Path | None,
    choose_rule: bool,
    no_repair: bool,
) -> None:
    """Answer QUESTIONS (a contest file) with MODEL (a folder or hub id).

    A run that was killed resumes where it stopped when the same command is given again.
    """
    options = click.get_current_context().params
    records = load(questions)
    task = task_of(records[0])
    constrained, voted = decoding_name == "constrained", samples > 1
    grammar_only(task, {"--decoding constrained": constrained, "--samples": voted, "--context": context})
    if choose_rule and not context:
        raise InputError("--choose needs --context, the rules to choose among")
    contexts = load_contexts(context, records, choose_rule) if context else [NO_CONTEXT] * len(records)
    check_writable(output, questions, context)
    from tqdm import tqdm

    from malpyeong.decoding.engines import Decoding, load_engine
    from malpyeong.metrics.rouge import load_dictionary
    from malpyeong.models.load import tokenizer_for_prediction
    from malpyeong.models.memory import out_of_memory

    if samples > 1:
        load_dictionary()
    decoding = Decoding(decoding_name != "free" and task is grammar, samples, temperature, seed, max_new_tokens)
    tokenizer = tokenizer_for_prediction(model, adapter)
    prompts = fitted(tokenizer, records, contexts, max_new_tokens)
    made_of = {
        **digests({name: options[name] and str(options[name]) for name in INPUTS}, tokenizer),
        **asdict(decoding),
        **{"batch_size": batch_size, "dtype": dtype, "load_in_4bit": load_in_4bit, "engine": engine_name},
        "choose": choose_rule,
    }
    part = PartFile(output.with_name(f".{output.name}.part.jsonl"), made_of)
    try:
        answers = {piece["id"]: piece["answer"] for piece in part.pieces}
    except (KeyError, TypeError):
        raise part.damaged() from None
    done = {row for row, record in enumerate(records) if record.id in answers}
    seconds = 0.0
    if len(done) < len(records):
        if done:
            click.echo(f"resuming from {part.path}: {len(done)} of {len(records)} answers are there")
        smaller = "" if load_in_4bit else ", or add --load-in-4bit"
        with out_of_memory(f"lower --batch-size={batch_size}{smaller}; first remove {part.path}, if it is there"):
            engine = load_engine(engine_name, model, adapter, dtype, load_in_4bit, decoding)
            score = _score(bertscore_model, bleurt_model) if samples > 1 else rouge_score
            start = time.perf_counter()
            with tqdm(total=len(records), initial=len(done), desc="predict", unit="record") as bar:
                for row, answer in predict(engine, prompts, batch_size, done, score):
                    answers[records[row].id] = answer
                    part.add({"id": records[row].id, "answer": answer})
                    bar.update(row not in done)
            seconds = time.perf_counter() - start
    written = [output]
    if choose_rule:
        named, choices = [], output.with_name(f"{output.stem}.choices.jsonl")
        for prompt in prompts:
            id_, ids = prompt.record.id, [rule.id for rule in prompt.context.rules]
            name, answers[id_] = split_choice(answers[id_])
            named.append({"id": id_, "named": name, "rule": name if name in ids else None, "candidates": ids})
        written.append(choices)
        write_text(choices, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in named))
        click.echo(f"{choices}: {sum(row['rule'] is not None for row in named)} of {len(named)} answers name a rule")
    answered = [record.with_answer(answers[record.id]) for record in records]
    if not no_repair and task is grammar:
        answered, counts = repaired(answered)
        for kind, count in counts.most_common():
            click.echo(f"repaired: {kind}: {count}")
    write_records(output, answered)
    _write_manifest(written, made_of, options)
    part.remove()
    well_formed = sum(task.format_problem(record.question_type, record.answer or "") is None for record in answered)
    click.echo(f"{output}: {counted(len(records), 'answer')}, {well_formed} well formed; {seconds:.1f} s after loading")


if __name__ == "__main__":
    main()
