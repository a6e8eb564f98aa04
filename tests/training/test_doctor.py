"""The doctor finds what would spoil a run, names the cure, and ends with the right exit code."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.contest.records import load_records, write_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.errors import InputError
from malpyeong.export import export
from malpyeong.models.load import check_vllm, load_for_prediction, load_for_training
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.context import Context, write_contexts
from malpyeong.prompts.messages import build_messages, fit_prompts, prompt_ids, render
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.callbacks import TrainingStoppedError, explain_out_of_memory
from malpyeong.training.preflight import SAMPLES, check, examine, examine_groups, examine_tokenizer

RECORDS = load_records(DATA / "train.json", answers="gold")
TRAIN, DEV = RECORDS[:40], RECORDS[40:48]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "자료 폴더"
    folder.mkdir()
    write_records(folder / "train.json", TRAIN)
    write_records(folder / "dev.json", DEV)
    return folder / "train.json"


def sft(data, *overrides):
    files = [f"data.train={data}", f"data.dev={data.with_name('dev.json')}"]
    return load_recipe("recipes/tiny/sft.yaml", [*files, *overrides], SFTRecipe)


def grpo(data, *overrides):
    return load_recipe("recipes/tiny/grpo.yaml", [f"data.train={data}", "model.adapter=null", *overrides], GRPORecipe)


def found(recipe, level):
    return [str(finding) for finding in examine(recipe, "hf") if finding.level == level]


def saved(tokenizer, folder, **changes):
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_tiny_recipes_are_well(data, capsys):
    for recipe in (sft(data), grpo(data)):
        assert found(recipe, "error") == []
        assert found(recipe, "warning") == []
        check(recipe, "hf")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.max_length=300"], "do not fit model.max_length=300"),
        (["model.name=없음"], "cannot be loaded as a model"),
        (["model.eos_token=<|fin|>"], "model.eos_token <|fin|> is not a token of this model; its special tokens: <|"),
        (["data.rewards={bleurt: 1}", "data.scorers={bleurt: 없음}"], "data.scorers.bleurt: 없음"),
    ],
)
def test_what_would_not_run_is_an_error_before_anything_is_loaded(overrides, message, data):
    recipe = grpo(data, *overrides)
    (error, *_) = found(recipe, "error")
    assert message in error
    with pytest.raises(InputError) as raised:
        check(recipe, "hf")
    assert message in raised.value.message


def test_answers_longer_than_a_completion_may_be_are_a_warning(data):
    (warning,) = found(grpo(data, "training.max_completion_length=40"), "warning")
    assert "longest answer" in warning
    assert "raise it to" in warning


def test_prompts_are_measured_with_what_training_puts_into_them(data, tmp_path):
    """Every figure against the prompts that the training set has."""
    tokenizer = load_tokenizer(str(TINY_BASE))
    rules, path = load_rule_book(DATA / "rules.json")[:1], tmp_path / "근거.jsonl"
    wholes = [Context(tuple(rules), (TRAIN[place - 1], TRAIN[place - 2])) for place in range(len(TRAIN))]
    shown = [[(1.0, one) for one in whole.examples] for whole in wholes]
    write_contexts(path, TRAIN, [[(1.0, rules[0])]] * len(TRAIN), shown)
    alone = max(len(render(tokenizer, record, Context()).ids) for record in TRAIN)
    answer = max(len(tokenizer(record.answer)["input_ids"]) + 1 for record in TRAIN)
    whole = max(len(render(tokenizer, *pair).ids) for pair in zip(TRAIN, wholes, strict=True))

    def lines(recipe):
        return [
            finding for finding in examine(recipe, "hf") if "solved examples" in finding.text or "alone" in finding.text
        ]

    for recipe in (grpo, sft):
        context, lengths = lines(recipe(data, f"data.dev={data}", f"data.context={path}", "model.max_length=5000"))
        assert context.level == lengths.level == "ok"
        times = 2 if recipe is sft else 1  # train and dev
        assert f"{40 * times} rules and {80 * times} solved examples" in context.text
        assert context.text.endswith("all of them fit")
        assert f"alone {alone} tokens, longest prompt {whole} tokens, longest answer {answer};" in lengths.text

    limit = alone + 200  # a completion may have 200 tokens: room for the longest question and nothing else
    context, lengths = lines(grpo(data, f"data.context={path}", f"model.max_length={limit}"))
    fitted = [one.context for one in fit_prompts(tokenizer, TRAIN, wholes, [alone] * len(TRAIN))]
    assert (context.level, lengths.level) == ("warning", "ok")
    assert (
        f"{120 - sum(map(len, fitted))} of 120 rules and examples do not fit model.max_length={limit}" in context.text
    )
    assert f"{sum(not kept for kept in fitted)} questions keep none" in context.text
    assert "--rules-k" in context.cure
    short = grpo(data, f"data.context={path}", f"model.max_length={limit - 1}")
    assert any(f"needs {limit} tokens" in error for error in found(short, "error"))

    write_contexts(path, TRAIN[1:], [[]] * 39, [[]] * 39)
    (error,) = found(grpo(data, f"data.context={path}"), "error")
    assert f'1 of 40 questions have no line (the first: id "{TRAIN[0].id}")' in error


def test_groups_are_sampled_from_the_prompts_of_training(data, tmp_path, monkeypatch):
    rule, path = load_rule_book(DATA / "rules.json")[0], tmp_path / "근거.jsonl"
    write_contexts(path, TRAIN, [[(1.0, rule)]] * len(TRAIN), [[]] * len(TRAIN))
    size = (
        "training.gold_advantage=0",
        "training.num_generations=2",
        "training.batch_size=2",
        "training.max_completion_length=2",
    )
    recipe = grpo(data, f"data.context={path}", *size)
    asked, model, tokenizer = [], *load_for_training(recipe.model, 0, False)
    generate = model.generate

    def watched(input_ids, **options):
        asked.append(input_ids[0].tolist())
        return generate(input_ids=input_ids, **options)

    model.generate = watched
    monkeypatch.setattr("malpyeong.models.load.load_for_training", lambda *_: (model, tokenizer))
    assert len(list(examine_groups(recipe, "hf"))) == 3
    assert asked == [prompt_ids(tokenizer, build_messages(record, rules=[rule])) for record in TRAIN[:2]]


def test_a_card_that_is_too_small_is_named_with_the_lever(data):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and its own memory counts")
    large = ("training.batch_size=256", "training.gradient_accumulation_steps=1", "model.max_length=2048")
    (error,) = [text for text in found(grpo(data, "gpu=t4", *large), "error") if "estimated peak" in text]
    assert "of 14.5" in error
    assert "training.batch_size=" in error


@pytest.mark.parametrize(
    ("model", "gpu", "vllm", "overrides", "level", "advice"),
    [
        ("qwen", "40gb", False, (), "ok", "model.load_in_4bit=false (model.load_in_4bit in both stages)"),
        ("qwen", "40gb", False, ("model.load_in_4bit=false",), None, None),
        ("qwen", "80gb", True, (), "ok", "model.load_in_4bit=false training.use_vllm=true"),
        ("qwen-8b", "80gb", False, (), None, None),
        ("qwen-8b", "24gb", True, (), "ok", "  training.use_vllm=true should"),
        ("qwen-8b", "24gb", True, ("training.beta=0.04",), None, None),
        ("qwen", "24gb", True, ("model.load_in_4bit=false", "training.use_vllm=true"), "warning", "load_in_4bit=true"),
        ("qwen", "t4", False, (), None, None),
        ("qwen", "t4", False, ("training.gradient_accumulation_steps=16",), "warning", "gradient_accumulation_steps=8"),
    ],
)
def test_sampling_advice_is_for_the_card_and_the_model(model, gpu, vllm, overrides, level, advice, data, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and it decides")
    if vllm:  # as where it is installed, on a card that it runs on
        monkeypatch.setattr("malpyeong.models.load.check_vllm", lambda *_: None)
    files = [f"recipes/models/{model}.yaml", f"data.train={data}", f"gpu={gpu}", *overrides]
    findings = examine(load_recipe("recipes/grpo.yaml", files, GRPORecipe), "unsloth")
    signs = ("sample quicker", "sampled together", "share of the card")
    given = [finding for finding in findings if any(sign in finding.text for sign in signs)]
    assert [finding.level for finding in given] == [level] * bool(level)
    assert all(advice in str(finding) for finding in given)


def test_a_full_disk_is_an_error(data, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    (error,) = found(sft(data), "error")
    assert "0.0 GiB free" in error
    assert "training.output=" in error


def messages_of(tokenizer, level):
    return [str(finding) for finding in examine_tokenizer(tokenizer, TRAIN) if finding.level == level]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{- '<|im_start|>assistant\\n' }}", "", "does not open the assistant's turn"),
        ("message['content'] +", "message['content'][:20] +", "drops the instruction or the question"),
        ("'<think>\\n\\n</think>\\n\\n'", "'<think>\\n'", "ends in an open <think>"),
    ],
)
def test_a_chat_template_that_spoils_prompts_is_an_error(old, new, message):
    tokenizer = load_tokenizer(str(TINY_BASE))
    assert messages_of(tokenizer, "error") == []
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    if not new:  # nothing at all is added where an answer begins
        tokenizer.chat_template = tokenizer.chat_template.partition("{%- if add_generation_prompt %}")[0]
    assert any(message in error for error in messages_of(tokenizer, "error"))


def test_todays_date_is_frozen_when_a_tokenizer_is_loaded(tmp_path):
    tokenizer = load_tokenizer(str(TINY_BASE))
    dated = "{%- if strftime_now is defined %}{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}{%- endif %}"
    tokenizer.chat_template = dated + tokenizer.chat_template
    assert any("today's date" in error for error in messages_of(tokenizer, "error"))
    tokenizer.save_pretrained(tmp_path / "dated")

    frozen = load_tokenizer(str(tmp_path / "dated"))
    assert messages_of(frozen, "error") == []
    text = frozen.apply_chat_template([{"role": "user", "content": "물음"}], tokenize=False)
    assert text.startswith("Today: 01 Jan 2025\n")
    # It stays so in what is saved beside an adapter, and is not frozen twice.
    frozen.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path / "adapter")).chat_template == frozen.chat_template


def test_whoever_renders_a_saved_template_sees_the_prompt_of_training(tmp_path):
    """Servers do not pass the template's options: Qwen3 would think, and some templates have a date of their own."""
    tokenizer = load_tokenizer(str(TINY_BASE))
    dated = "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{{- date_string }}"
    tokenizer.chat_template = dated + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")

    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    messages = build_messages(RECORDS[0])
    assert saved.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt_ids(saved, messages)
    thinking = saved.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert "<think>" not in thinking
    assert load_tokenizer(str(tmp_path / "adapter")).chat_template == saved.chat_template


def test_a_tokenizer_that_changes_text_is_an_error():
    from tokenizers import normalizers

    tokenizer = load_tokenizer(str(TINY_BASE))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()  # ㄹ becomes another character
    (error,) = [text for text in messages_of(tokenizer, "error") if "changed" in text]
    assert "model.tokenizer_json=true" in error
    assert any("ㄹ" in text for text in SAMPLES)
    assert any("樂" in text for text in SAMPLES)


def test_the_models_own_tokenizer_json_is_read_where_transformers_has_another(tmp_path):
    """As with A.X-4.0-Light: config.json says qwen2, whose tokenizer class brings a pre-tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["1234 5678 90123 " * 20, *(record.answer for record in TRAIN)], trainer)
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings["chat_template"] = load_tokenizer(str(TINY_BASE)).chat_template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    text = "번호 1234 5678"
    numbered = [record.with_answer(f"{record.answer} {text}") for record in TRAIN]
    default = load_tokenizer(str(tmp_path), "<|im_end|>")
    as_is = load_tokenizer(str(tmp_path), "<|im_end|>", tokenizer_json=True)
    assert as_is(text)["input_ids"] == raw.encode(text).ids
    assert default(text)["input_ids"] != raw.encode(text).ids, "transformers reads it right: the key can go"
    errors = [finding for finding in examine_tokenizer(default, numbered) if finding.level == "error"]
    assert [finding.cure for finding in errors] == ["set model.tokenizer_json=true"]
    assert [finding for finding in examine_tokenizer(as_is, numbered) if finding.level != "ok"] == []
    assert (as_is.eos_token, as_is.pad_token) == ("<|im_end|>", "<|endoftext|>")
    # A merged model's folder, with its own config.json, is read in the same way without being told.
    as_is.save_pretrained(tmp_path / "merged")
    shutil.copy(tmp_path / "config.json", tmp_path / "merged")
    merged = load_tokenizer(str(tmp_path / "merged"))
    assert (merged(text)["input_ids"], merged.eos_token) == (raw.encode(text).ids, "<|im_end|>")


def test_a_stated_eos_is_known_to_the_template(tmp_path):
    name = saved(
        load_tokenizer(str(TINY_BASE)), tmp_path / "wrong", eos_token="<|endoftext|>", pad_token="<|im_start|>"
    )
    tokenizer = load_tokenizer(name)
    (warning,) = [text for text in messages_of(tokenizer, "warning") if "ends an answer with" in text]
    assert "model.eos_token" in warning
    tokenizer = load_tokenizer(name, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert messages_of(tokenizer, "warning") == messages_of(tokenizer, "error") == []


def test_the_exported_model_stops_at_the_stated_eos(tmp_path):
    """As with A.X-4.0-Light, whose own files name another token."""
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((base / name).read_text("utf-8"))
        (base / name).write_text(json.dumps({**settings, "eos_token_id": 0}), "utf-8")
    saved(load_tokenizer(str(TINY_BASE)), base, eos_token="<|endoftext|>", pad_token="<|im_start|>")

    overrides = [f"model.name={base}", "model.eos_token=<|im_end|>", "model.pad_token=<|endoftext|>"]
    block = load_recipe("recipes/tiny/sft.yaml", overrides, SFTRecipe).model
    model, tokenizer = load_for_training(block, 0, False)
    assert model.generation_config.eos_token_id == [2, 0]
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")

    export(tmp_path / "adapter", tmp_path / "merged", check=TRAIN[:1], max_new_tokens=8, dtype="float32")
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text("utf-8"))
    assert (settings["eos_token_id"], settings["pad_token_id"]) == ([2, 0], 0)
    _, merged = load_for_prediction(str(tmp_path / "merged"))
    _, adapter = load_for_prediction(str(base), str(tmp_path / "adapter"))
    assert merged.eos_token == adapter.eos_token == "<|im_end|>"


def test_groups_are_sampled_and_dead_ones_found(data):
    size = ("training.num_generations=4", "training.batch_size=4", "training.max_completion_length=8")
    size += ("model.load_in_4bit=true", "training.gradient_checkpointing=true")  # as on a GPU
    (first, second, verdict) = examine_groups(grpo(data, *size), "hf")
    assert "rewards of 4 completions: format 0.00–0.00" in first.text
    assert second.level == "ok"
    assert verdict.level == "error"
    assert "nothing can be learnt" in verdict.text


def test_the_command_ends_with_1_for_an_error_and_2_for_bad_input(data, run_module, tmp_path):
    files = (f"data.train={data}", f"data.dev={data.with_name('dev.json')}")
    result = run_module("-m", "malpyeong.doctor", "recipes/tiny/sft.yaml", *files)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("ok ") for line in result.stdout.splitlines())
    result = run_module("-m", "malpyeong.doctor", "recipes/tiny/sft.yaml", *files, "model.max_length=60")
    assert result.returncode == 1
    assert "error   " in result.stdout
    for wrong in ("recipes/tiny/none.yaml", tmp_path):
        result = run_module("-m", "malpyeong.doctor", wrong)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
    result = run_module("-m", "malpyeong.doctor", "recipes/tiny/sft.yaml", f"data.train={tmp_path / 'none.json'}")
    assert result.returncode == 2
    assert "none.json" in result.stderr


def test_vllm_is_refused_with_a_cure_where_it_cannot_run(data):
    recipe = grpo(data)
    check_vllm(recipe.model, False)
    with pytest.raises(InputError, match=r"leave training\.use_vllm out"):
        check_vllm(recipe.model, True)
    assert any("training.use_vllm" in error for error in found(grpo(data, "training.use_vllm=true"), "error"))


def test_a_reference_adapter_is_kept_from_vllm_under_unsloth(data):
    both = grpo(data, "training.use_vllm=true", "training.beta=0.04")
    errors = {
        backend: [each.text for each in examine(both, backend) if each.level == "error"]
        for backend in ("unsloth", "hf")
    }
    assert any(text.startswith("training.beta: ") for text in errors["unsloth"])
    assert not any(text.startswith("training.beta: ") for text in errors["hf"])


def test_out_of_memory_names_the_peak_and_the_lever(data, monkeypatch):
    recipe = load_recipe("recipes/grpo.yaml", ["recipes/models/qwen.yaml", "gpu=24gb"], GRPORecipe)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 4 * 2**30))
    with pytest.raises(TrainingStoppedError) as stopped, explain_out_of_memory(recipe, "hf"):
        raise torch.OutOfMemoryError
    assert "peak 3.0 GiB of 4.0" in stopped.value.message
    assert any(lever in stopped.value.message for lever in ("training.", "data.scorers.device=cpu"))
