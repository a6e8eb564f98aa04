"""Look whether a recipe will run, fit and learn, before hours of a GPU go into it.

Every finding is one line with its cure. Both training scripts look first, without loading a model (:func:`check`); the
doctor also loads it and samples groups of completions, to see that rewards differ within a group.
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from malpyeong.config.gpu import USABLE_GIB, nearest
from malpyeong.config.recipe import GRPORecipe, GRPOTraining, SFTRecipe
from malpyeong.contest.leaks import answer_problems, ids, shared_questions
from malpyeong.contest.records import Record
from malpyeong.errors import InputError, counted
from malpyeong.models.environment import processes, version_problems
from malpyeong.models.memory import (
    GIB,
    RESERVE,
    VLLM_SHARE,
    Backend,
    ModelShape,
    estimate_recipe,
    lever_text,
    shape_of,
    with_values,
)
from malpyeong.prompts.context import NO_CONTEXT, Context
from malpyeong.tasks.task import gold_problem, load, task_of
from malpyeong.training.data import (
    Questions,
    check_lengths,
    labelled_share,
    load_train,
    recalled_share,
    with_prompt_data,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from malpyeong.prompts.messages import Prompt

Level = Literal["ok", "warning", "error"]
AnyRecipe = SFTRecipe | GRPORecipe

NF4_ROWS = 16  # completions that Unsloth samples from NF4 weights in float16 without dequantising them for each token

# What a tokenizer must give back as it was: compatibility jamo, old Hangul, hanja, IPA, quotes and dashes.
SAMPLES = (
    "\"어머니께서 'ㄹ' 받침과 'ㅡ'를 쓰셨다.\"가 옳다. 용언의 어간 끝 ‘ㅡ’는 ‘-아/-어’ 앞에서 줄어든다.",
    '"“내일 만나자.”라고 말했다."가 옳다. 대화는 큰따옴표(“ ”)로, 마음속의 말은 작은따옴표(‘ ’)로 적는다.',
    '"낙원(樂園)에서 쉬다."가 옳다. 한자음 ‘라, 래, 로, 뇌, 루, 르’가 단어의 첫머리에 올 때는 ‘나, 내, 노’로 적는다. ',
    '"ᄒᆞᆫ글 ― 훈민정음 [ʃ]…"가 옳다.  옛 글자와 줄표, 말줄임표는 그대로 둔다.',
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``; ``warning``: it runs, but maybe not as meant; ``error``: it will not run or not learn.
        text: what was found.
        cure: what to do, empty where all is well or the text says it.
    """

    level: Level
    text: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.level:7} {self.text}" + (f"; {self.cure}" if self.cure else "")


def check(recipe: AnyRecipe, backend: Backend) -> None:
    """Look at everything that needs no model, show what may be wrong, and stop where something is.

    Raises:
        InputError: the first error that was found.
    """
    errors = []
    for finding in examine(recipe, backend):
        if finding.level == "error":
            errors.append(finding)
        elif finding.level == "warning":
            click.echo(str(finding), err=True)
    for finding in errors[1:]:
        click.echo(str(finding), err=True)
    if errors:
        raise InputError(errors[0].text + (f"; {errors[0].cure}" if errors[0].cure else ""))


def examine(recipe: AnyRecipe, backend: Backend) -> Iterator[Finding]:
    """Yield what can be found out without loading the model.

    Raises:
        InputError: a data file cannot be read.
    """
    from malpyeong.models.load import check_vllm
    from malpyeong.models.tokenizer import tokenizer_of

    yield from _versions()
    yield from _card(recipe)
    records = load_train(recipe.data)
    train = len(records)
    if isinstance(recipe, SFTRecipe):
        records += load(recipe.data.dev, answers="gold")
    yield from _data(recipe)
    yield from _batches(recipe, len(records))
    yield from _warm_up(recipe, train)
    shape = shape_of(recipe.model.name)
    yield from _memory(recipe, shape, backend)
    yield from _disk(recipe, shape)
    if isinstance(recipe, GRPORecipe):
        yield from _scorers(recipe)
        try:
            check_vllm(recipe.model, recipe.training.use_vllm)
        except InputError as error:
            yield Finding("error", error.message)
        if recipe.training.use_vllm and _reference_is_in_vllms_way(recipe, backend):
            yield Finding(
                "error",
                "training.beta: Unsloth hands vLLM all of the adapters, the reference too, which vLLM cannot load",
                "set training.beta=0, or leave training.use_vllm out",
            )
    model = recipe.model
    try:
        tokenizer = tokenizer_of(model)
    except InputError as error:
        yield Finding("error", error.message)
        return
    questions = Questions(records)
    try:
        questions = with_prompt_data(records, recipe.data)
    except InputError as error:
        yield Finding("error", error.message)
    yield from examine_tokenizer(tokenizer, records, questions.asked_with[0])
    yield from _lengths(recipe, tokenizer, questions)


def _versions() -> Iterator[Finding]:
    problems = [Finding("warning", line) for line in version_problems("malpyeong")]
    yield from problems or [Finding("ok", "package versions are those that were tested together")]


def _card(recipe: AnyRecipe) -> Iterator[Finding]:
    import torch

    dtype, gpu = recipe.model.dtype, recipe.gpu
    if not torch.cuda.is_available():
        if gpu:
            yield Finding("warning", f"no GPU here; the recipe is looked at for gpu={gpu}")
        else:
            yield Finding("ok", f"no GPU here; the recipe computes in {dtype} on the CPU")
        return
    card = torch.cuda.get_device_properties(0)
    size = card.total_memory / GIB
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not bf16:
        yield Finding("error", f"{card.name} does not compute in bfloat16", "set gpu=t4, or model.dtype=float16")
    elif gpu and size < 0.95 * USABLE_GIB[gpu]:
        fitting = nearest(size, bf16)
        cure = f"set gpu={fitting}" if fitting else "set gpu=t4 and a smaller model"
        yield Finding("error", f"gpu is {gpu}, but {card.name} has {size:.1f} GiB", cure)
    else:
        yield Finding("ok", f"{card.name}, {size:.1f} GiB; the recipe computes in {dtype}")


def _data(recipe: AnyRecipe) -> Iterator[Finding]:
    data = recipe.data
    splits = {name: load(path) for name in ("train", "dev", "test") if (path := getattr(data, name))}
    tasks = {name: task_of(records[0]).NAME for name, records in splits.items()}
    if len({*tasks.values()}) > 1:
        raise InputError(", ".join(f"data.{name} is of the task {task}" for name, task in tasks.items()))
    problems = []
    for (name, records), (other_name, others) in itertools.combinations(splits.items(), 2):
        shared = shared_questions(records, others)
        if shared:
            text = f"{len(shared)} of {len(records)} questions of data.{name} are in data.{other_name} ({ids(shared)})"
            if (name, other_name) != ("train", "dev"):
                problems.append(Finding("warning", text))
            elif data.drop_leaks:
                problems.append(Finding("warning", f"{text} and are left out"))
            else:
                problems.append(Finding("warning", text, "leave them out with --drop-leaks"))
    for name, records in splits.items():
        problems += [Finding("warning", f"data.{name}: {one}") for one in answer_problems(records, gold_problem)]
    yield from problems or [
        Finding("ok", f"{', '.join(splits)}: no question stands in two files or with two answers, all answers in form")
    ]


def _batches(recipe: AnyRecipe, records: int) -> Iterator[Finding]:
    training = recipe.training
    rollouts = training.effective_batch_size
    if isinstance(recipe, SFTRecipe):
        yield Finding("ok", f"{counted(records, 'record')}, {counted(rollouts, 'answer')} a step")
        return
    group, questions = recipe.training.num_generations, recipe.training.groups
    passes = recipe.training.max_steps * questions / records
    text = f"{counted(records, 'question')}; a step samples {questions} × {group} = {rollouts} completions"
    yield Finding("ok", f"{text}; {recipe.training.max_steps} steps ask each question {passes:.1f} times")


def _warm_up(recipe: AnyRecipe, records: int) -> Iterator[Finding]:
    training = recipe.training
    if isinstance(training, GRPOTraining):
        steps = training.max_steps
    else:
        batches = math.ceil(records / training.batch_size)
        steps = math.ceil(training.epochs * math.ceil(batches / training.gradient_accumulation_steps))
    if steps == 1 and training.warmup_steps:
        yield Finding(
            "error",
            "the run has one step, at which warm-up makes the learning rate 0: nothing would be learnt",
            "set training.warmup_steps=0, or train longer",
        )


def _memory(recipe: AnyRecipe, shape: ModelShape | None, backend: Backend) -> Iterator[Finding]:
    import torch

    if shape is None:
        yield Finding(
            "warning",
            f"{recipe.model.name}: its shape cannot be read, so that memory is not estimated",
            "go online, or name a folder with config.json",
        )
        return
    limit = USABLE_GIB[recipe.gpu] if recipe.gpu else None
    if torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory / GIB
    estimated = estimate_recipe(recipe, shape, backend, limit)
    text = f"estimated peak {estimated.peak / GIB:.1f} GiB with backend {backend} ({estimated.table()})"
    if limit is None:
        yield Finding("ok", text)
        return
    if isinstance(recipe, GRPORecipe):
        yield from _sampling(recipe, shape, backend, limit)
    if estimated.fits(limit):
        yield Finding("ok", f"{text}, of {limit:.1f}")
        return
    yield Finding(
        # Several processes may hold a part of the weights each, which the estimate does not know.
        "error" if estimated.peak > limit * GIB and processes() == 1 else "warning",
        f"{text}, of {limit:.1f} less {RESERVE:.0%} to spare",
        lever_text(recipe, shape, backend, limit),
    )


def _sampling(recipe: GRPORecipe, shape: ModelShape, backend: Backend, gib: float) -> Iterator[Finding]:
    """Yield what should sample quicker; docs/gpu.md says what of it is measured and what only read."""
    from malpyeong.models.load import check_vllm

    model, training = recipe.model, recipe.training
    completions = training.effective_batch_size
    if backend == "unsloth" and model.load_in_4bit and model.dtype == "float16" and completions > NF4_ROWS:
        yield Finding(
            "warning",
            f"{completions} completions are sampled together; above {NF4_ROWS} Unsloth dequantises the weights for "
            "each token",
            f"set training.gradient_accumulation_steps={max(1, NF4_ROWS // training.batch_size)}",
        )
    if training.use_vllm and _cached(recipe, shape, gib) < completions / 2:
        yield Finding(
            "warning",
            f"vLLM's share of the card holds caches for {_cached(recipe, shape, gib)} of {completions} completions",
            "leave training.use_vllm out" if model.load_in_4bit else "set model.load_in_4bit=true",
        )
    small = shape.block_parameters + shape.other_parameters <= 4.5e9
    roomy = gib >= 0.95 * USABLE_GIB["24gb"]
    sixteen = {"model.load_in_4bit": False} if model.load_in_4bit and small and roomy else {}
    tried = training.use_vllm or _reference_is_in_vllms_way(recipe, backend)
    vllm = {} if tried else {"training.use_vllm": True}
    for values in filter(None, ({**sixteen, **vllm}, sixteen, vllm)):
        changed = with_values(recipe, values)
        try:
            check_vllm(changed.model, changed.training.use_vllm)
        except InputError:
            continue
        then = estimate_recipe(changed, shape, backend, gib)
        hold = not changed.training.use_vllm or _cached(changed, shape, gib) >= completions / 2
        if then.fits(gib) and hold:
            overrides = " ".join(f"{name}={str(value).lower()}" for name, value in values.items())
            stages = " (model.load_in_4bit in both stages)" if "model.load_in_4bit" in values else ""
            text = f"{overrides}{stages} should sample quicker, with {then.peak / GIB:.1f} GiB by the estimate"
            yield Finding("ok", f"{text}; not measured yet (docs/gpu.md)")
            return


def _reference_is_in_vllms_way(recipe: GRPORecipe, backend: Backend) -> bool:
    """Tell whether Unsloth would hand vLLM the KL penalty's reference, as it does all adapters (read, not run)."""
    return backend == "unsloth" and recipe.training.beta > 0


def _cached(recipe: GRPORecipe, shape: ModelShape, gib: float) -> int:
    """Return for how many completions of full length vLLM's share of the card holds keys and values."""
    room = VLLM_SHARE * gib * GIB - estimate_recipe(recipe, shape, "unsloth", gib).weights
    return max(0, int(room / (4 * shape.kv_heads * shape.head_dim * shape.layers * recipe.model.max_length)))


def _disk(recipe: AnyRecipe, shape: ModelShape | None) -> Iterator[Finding]:
    place = Path(recipe.training.output).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    lora = recipe.model.lora
    # Three checkpoints at most at one moment (the last, the best, and the one being written), each with the optimizer's
    # state and GRPO's reference, and the adapter.
    reference = isinstance(recipe, GRPORecipe) and recipe.training.beta > 0
    adapter = 4 * shape.lora_parameters(lora.r, lora.target_modules) / GIB if shape else 1.0
    needed = 3 * (3 + reference) * adapter + adapter
    text = f"{free:.1f} GiB free in {place}, checkpoints and adapter take up to {needed:.1f}"
    if not os.access(place, os.W_OK):
        yield Finding("error", f"{place}: cannot be written", "choose another folder with training.output=…")
    elif free < needed:
        yield Finding("error", text, "make room, or choose another disk with training.output=…")
    else:
        yield Finding("ok", text)


def _scorers(recipe: GRPORecipe) -> Iterator[Finding]:
    from malpyeong.metrics.pairs import model_file
    from malpyeong.metrics.rouge import load_dictionary

    for name in recipe.data.scorer_models:
        model = getattr(recipe.data.scorers, name)
        try:
            model_file(model, "config.json")
            model_file(model, "model.safetensors", "pytorch_model.bin")
        except click.ClickException as error:
            yield Finding("error", f"data.scorers.{name}: {error.message}")
        else:
            yield Finding("ok", f"{name}: {model} is here")
    if {"rouge_1", "official"} & recipe.data.rewards.keys():
        try:
            load_dictionary()
        except InputError as error:
            yield Finding("error", error.message)


def examine_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", records: Sequence[Record], context: Context = NO_CONTEXT
) -> Iterator[Finding]:
    """Yield whether prompts and answers become tokens, and text again, as training and the contest need it.

    Args:
        tokenizer: from :func:`malpyeong.models.tokenizer.load_tokenizer`.
        records: with answers; the first hundred are tried.
        context: of the first record, whose prompt is looked at.
    """
    from malpyeong.prompts.messages import TEMPLATE_OPTIONS, completion_ids, context_messages

    record = records[0]
    messages: Any = context_messages(record, context)

    def render(more: Sequence[dict[str, str]] = (), header: bool = True, **options: Any) -> str:  # noqa: ANN401
        text = tokenizer.apply_chat_template(
            [*messages, *more], add_generation_prompt=header, tokenize=False, **{**TEMPLATE_OPTIONS, **options}
        )
        return str(text)

    prompt, bare = render(), render(header=False)
    eos, end = str(tokenizer.eos_token), tokenizer.eos_token_id
    problems = []
    if prompt == bare:
        problems.append(
            Finding("error", "the chat template does not open the assistant's turn", "use the instruct version")
        )
    if any(message["content"] not in prompt for message in messages):
        problems.append(
            Finding("error", "the chat template drops the instruction or the question", "use another model's template")
        )
    if prompt.rfind("<think>") > prompt.rfind("</think>"):
        problems.append(
            Finding(
                "error", "the prompt ends in an open <think>: answers would begin with thoughts", "mend the template"
            )
        )
    # As on two days: the template asks for the date by this function.
    if render(strftime_now=lambda _: "1999") != render(strftime_now=lambda _: "2001"):
        problems.append(
            Finding("error", "the chat template writes today's date into the prompt", "set a fixed one in the template")
        )
    answer = record.answer or SAMPLES[0]
    after = render([{"role": "assistant", "content": answer}], header=False).rpartition(answer)[2].lstrip()
    if after and not after.startswith(eos):
        ends = next((token for token in tokenizer.all_special_tokens if after.startswith(token)), after[:20])
        problems.append(
            Finding(
                "warning",
                f"the chat template ends an answer with {ends!r}, here answers end with {eos!r}",
                "state model.eos_token if that is not meant",
            )
        )
    if completion_ids(tokenizer, answer)[-1] != end or tokenizer.pad_token_id == end:
        problems.append(
            Finding("error", "answers do not end with eos, or pad is eos", "state model.eos_token and pad_token")
        )
    yield from problems or [
        Finding("ok", f"prompts open the assistant's turn, without thinking or today's date; answers end with {eos!r}")
    ]
    texts = [*SAMPLES, *(one.answer or "" for one in records[:100])]
    lossy = [text for text in texts if _there_and_back(tokenizer, text) != text]
    if lossy:
        yield Finding(
            "error",
            f"{len(lossy)} of {len(texts)} texts come back from the tokenizer changed, first: {lossy[0][:60]!r}",
            "try model.tokenizer_json=true, or take another model: the contest scores every character",
        )
    else:
        yield Finding("ok", f"{len(texts)} texts come back from the tokenizer as they were")
    if _reads_otherwise(tokenizer, texts):
        yield Finding(
            "error",
            "transformers splits text otherwise than the model's tokenizer.json does",
            "set model.tokenizer_json=true",
        )


def _there_and_back(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True))


def _reads_otherwise(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> bool:
    from tokenizers import Tokenizer
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(tokenizer.name_or_path, "tokenizer.json")
        raw = Tokenizer.from_file(str(path))
    except Exception:  # none there, or one that the library cannot read: then nothing is to compare
        return False
    return any(
        raw.encode(text, add_special_tokens=False).ids != list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in texts
    )


def _lengths(recipe: AnyRecipe, tokenizer: "PreTrainedTokenizerBase", questions: Questions) -> Iterator[Finding]:
    from malpyeong.prompts.messages import fit_prompts, render

    records, contexts = questions.records, questions.asked_with
    answers = questions.answer_lengths(tokenizer)
    room = [recipe.training.max_completion_length] * len(records) if isinstance(recipe, GRPORecipe) else answers
    limit = recipe.model.max_length
    prompts = fit_prompts(tokenizer, records, contexts, [limit - tokens for tokens in room])
    try:
        check_lengths(records, [len(prompt.ids) + answer for prompt, answer in zip(prompts, room, strict=True)], limit)
    except InputError as error:
        yield Finding("error", error.message)
    longest, longest_prompt = max(answers), max(len(prompt.ids) for prompt in prompts)
    text = f"longest prompt {longest_prompt} tokens, longest answer {longest}; model.max_length is {limit}"
    if questions.mode == "recall_rule":
        yield from _share(recalled_share, questions.labels)
    if any(contexts):
        yield from _context(contexts, prompts, limit)
        if questions.mode == "choose_rule":
            yield from _share(labelled_share, questions.labels, prompts)
        alone = max(len(render(tokenizer, record).ids) for record in records)
        text = f"longest question alone {alone} tokens, {text}"
    if isinstance(recipe, GRPORecipe) and longest > recipe.training.max_completion_length:
        yield Finding(
            "warning",
            f"{text}, training.max_completion_length {recipe.training.max_completion_length}",
            f"raise it to {longest}: longer answers are cut off and earn nothing",
        )
    else:
        yield Finding("ok", text)


def _context(contexts: Sequence[Context], prompts: Sequence["Prompt"], limit: int) -> Iterator[Finding]:
    from malpyeong.prompts.messages import left_out

    rules, examples = (sum(len(getattr(one, kind)) for one in contexts) for kind in ("rules", "examples"))
    shown = (
        f"prompts with {counted(rules, 'rule')} and {counted(examples, 'solved example')} for "
        f"{counted(len(contexts), 'question')}"
    )
    dropped = left_out(contexts, prompts, f"model.max_length={limit}")
    bare = sum(bool(context) and not prompt.context for context, prompt in zip(contexts, prompts, strict=True))
    if bare:
        cure = "raise model.max_length, or search again with fewer (--rules-k, --examples-k)"
        yield Finding("warning", f"{shown}; {dropped}; {bare} questions keep none of theirs", cure)
    else:
        yield Finding("ok", f"{shown}; {dropped or 'all of them fit'}")


def _share(share: Callable[..., str], *questions: Sequence[object]) -> Iterator[Finding]:
    try:
        yield Finding("ok", share(*questions))
    except InputError as error:
        yield Finding("error", error.message)


def examine_groups(recipe: GRPORecipe, backend: Backend, groups: int = 2) -> Iterator[Finding]:
    """Load the model, sample groups of completions as GRPO would, and yield whether their rewards differ.

    Raises:
        InputError: the model, the adapter or a scorer cannot be loaded.
    """
    import torch

    from malpyeong.models.load import load_for_training
    from malpyeong.prompts.messages import fit_prompts
    from malpyeong.training.rewards import RewardRun, functions_of, load_models

    training, weights = recipe.training, recipe.data.rewards
    questions = with_prompt_data(load_train(recipe.data), recipe.data)
    records = questions.records[:groups]
    contexts = questions.contexts[:groups] if questions.contexts else [NO_CONTEXT] * len(records)
    run = RewardRun(
        weights,
        training.num_generations,
        load_models(recipe.data.scorer_models, recipe.data.scorers),
        training.min_group_std,
        functions_of(questions.task, recipe.data),
    )
    model, tokenizer = load_for_training(recipe.model, training.seed, training.gradient_checkpointing)
    if torch.cuda.is_available() and not recipe.model.load_in_4bit:  # 4-bit weights are there already
        model = model.to("cuda")
    model.eval()
    room = recipe.model.max_length - training.max_completion_length
    prompts = fit_prompts(tokenizer, records, contexts, [room] * len(records))
    dead = 0.0
    for place, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        ids, rules = torch.tensor([prompt.ids], device=model.device), prompt.context.rules
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=training.temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=training.num_generations,
                max_new_tokens=training.max_completion_length,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        columns: dict[str, Any] = {
            "reference": [record.answer] * len(texts),
            "record_id": [record.id] * len(texts),
            "question_type": [record.question_type] * len(texts),
            "prompts": [prompt.messages] * len(texts),
        }
        if questions.mode == "choose_rule":
            columns["candidates"] = [[rule.id for rule in rules]] * len(texts)
            columns["gains"] = [questions.labels[place].of(rules)] * len(texts)
        logged: dict[str, float] = {}
        columns["log_metric"] = logged.__setitem__
        scores = [function(completions=texts, **columns) for function in run.functions]
        rewards = {name: values for name, values in zip(weights, scores, strict=True) if weights[name]}
        dead += logged["dead_groups"]  # of this one group: 0 or 1
        ranges = ", ".join(f"{name} {_range(values)}" for name, values in rewards.items())
        yield Finding("ok", f'id "{record.id}": rewards of {len(texts)} completions: {ranges}')
    if dead == len(records):
        yield Finding(
            "error",
            f"in all {len(records)} sampled groups all completions earn the same: nothing can be learnt",
            "raise training.temperature or training.num_generations, or start from an adapter that SFT has trained",
        )
    elif dead:
        yield Finding(
            "warning",
            f"in {dead:.0f} of {len(records)} groups all completions earn the same",
            "see training.temperature",
        )


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.2f}–{max(known):.2f}" if known else "does not apply"
