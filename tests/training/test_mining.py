"""PPL mining: equal to its definition on real models, and the same file after a kill."""

import json
import math
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.contest.rulebook import Rule, load_rule_book
from malpyeong.errors import InputError
from malpyeong.files import PartFile
from malpyeong.models.load import load_for_prediction
from malpyeong.prompts.messages import build_messages, completion_ids, prompt_ids
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.candidates import named_rules, promising
from malpyeong.training.mining import make_plan, mine, ranked, weights_digest
from malpyeong.training.perplexity import Row, perplexities, perplexity, shared_prefix

ROOT = Path(__file__).parents[2]
DEV = load_records(DATA / "dev.json", answers="gold")
RULES = load_rule_book(DATA / "rules.json")

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tiny():
    return load_for_prediction(str(TINY_BASE), dtype="float32")


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def llama_with_lora():
    model = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    return model.eval()


def random_ids(length, seed):
    return torch.randint(1, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [
    Row(random_ids(size, size), random_ids(answer, 50 + size)) for size, answer in ((5, 9), (1, 1), (12, 3), (2, 30))
]


@pytest.mark.parametrize("make", [llama, llama_with_lora])
def test_batches_after_a_shared_prefix_equal_the_definition(make):
    model, head = make(), random_ids(40, 1)
    prefix = shared_prefix(model, head)
    expected = [perplexity(model, head + row.prompt_end, row.answer) for row in ROWS]
    for rows, values in ((ROWS, expected), (ROWS[1:2], expected[1:2]), (ROWS, expected)):  # the prefix is not used up
        assert perplexities(model, prefix, rows, pad=0) == pytest.approx(values, rel=1e-4)
    assert len({round(value, 2) for value in expected}) == len(ROWS)


def test_perplexity_is_the_mean_over_the_answer_alone():
    model, prompt, answer = llama(), random_ids(7, 1), random_ids(4, 2)
    with torch.inference_mode():
        probabilities = model(torch.tensor([prompt + answer])).logits[0].softmax(-1)
    likelihood = math.prod(float(probabilities[6 + place, token]) for place, token in enumerate(answer))
    assert perplexity(model, prompt, answer) == pytest.approx(likelihood ** (-1 / 4), rel=1e-4)


def llama_with_lora_head():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    return model.eval()


def llama_with_biased_head():
    model = llama()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    return model


def llama_without_most_words():
    model = llama_with_biased_head()
    answered = [token for row in ROWS for token in row.answer]
    kept = model.lm_head.bias.detach()[answered]
    torch.nn.init.constant_(model.lm_head.bias, -math.inf)
    model.lm_head.bias.data[answered] = kept
    return model


@pytest.mark.parametrize("limit", [1, 130, 500, 10_000])
@pytest.mark.parametrize("make", [llama, llama_with_lora_head, llama_with_biased_head, llama_without_most_words])
def test_logits_are_computed_in_pieces(monkeypatch, make, limit):
    model, head = make(), random_ids(10, 3)
    positions, vocabulary = sum(len(row.answer) for row in ROWS), model.config.vocab_size
    sizes = []

    def linear(*given):
        made = torch.nn.functional.linear(*given)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr("malpyeong.training.perplexity.MAX_LOGITS", {"cpu": limit, "cuda": limit})
    monkeypatch.setattr("malpyeong.training.perplexity.linear", linear)
    with model.get_output_embeddings().register_forward_hook(lambda _, __, made: sizes.append(made.numel())):
        found = perplexities(model, shared_prefix(model, head), ROWS, pad=0)
    assert max(sizes) <= max(limit, vocabulary if make is llama_with_lora_head else positions)
    assert sum(sizes) in (positions * vocabulary, (positions + 1) * vocabulary)
    assert found == pytest.approx([perplexity(model, head + row.prompt_end, row.answer) for row in ROWS], rel=1e-4)


@pytest.mark.parametrize("row", [Row([], [1]), Row([1], [])])
def test_an_empty_row_is_refused(row):
    model = llama()
    with pytest.raises(ValueError, match="at least one"):
        perplexities(model, shared_prefix(model, [1, 2]), [row], pad=0)


def mined(model, plan, pad, part, pairs=None):
    """Return (batches, perplexities) of some pairs, or of all."""
    batches = plan.batches(plan.all_pairs() if pairs is None else pairs)
    return batches, list(mine(model, plan, batches, pad, part))


def by_pair(batches, values):
    return {
        (b.context, row): ppl
        for b, ppls in zip(batches, values, strict=True)
        for row, ppl in zip(b.rows, ppls, strict=True)
    }


@pytest.fixture
def part(tmp_path):
    return PartFile(tmp_path / "part.jsonl", {})


def test_mined_values_equal_the_formulas(tiny, part):
    model, tokenizer = tiny
    records, rules = DEV[:6], RULES[:5]
    plan = make_plan(tokenizer, records, rules, 1024, 1024)
    ppls = by_pair(*mined(model, plan, tokenizer.pad_token_id, part))
    rows = ranked(plan, records, rules, ppls, top_k=5)
    assert [row["id"] for row in rows] == [record.id for record in records]

    def ppl(record, context, answer):
        prompt = prompt_ids(tokenizer, build_messages(record, rules=[context] if context else ()))
        return perplexity(model, prompt, completion_ids(tokenizer, answer)[:-1])

    texts = {rule.id: rule for rule in rules}
    for record, row in zip(records, rows, strict=True):
        alone = ppl(record, None, record.answer)
        assert row["ppl_question"] == pytest.approx(alone, rel=1e-4)
        assert {candidate["rule"] for candidate in row["candidates"]} == set(texts)
        deltas = [candidate["delta"] for candidate in row["candidates"]]
        assert deltas == sorted(deltas, reverse=True)
        for candidate in row["candidates"]:
            value = ppl(record, texts[candidate["rule"]], record.answer)
            assert candidate["ppl"] == pytest.approx(value, rel=1e-4)
            assert candidate["delta"] == pytest.approx(alone - value, abs=1e-3)
            assert candidate["improvement_ratio"] == pytest.approx((alone - value) / alone, abs=1e-3)
        for option in row["options"]:
            assert option["ppl"] == pytest.approx(ppl(record, None, _verdict(option["sentence"])), rel=1e-4)
    assert any(row["options"] for row in rows)


def _verdict(sentence):
    from malpyeong.contest.particles import subject_particle

    return f'"{sentence}"{subject_particle(sentence)} 옳다.'


def test_what_a_plan_reads_is_the_prompt(tiny):
    _, tokenizer = tiny
    plan = make_plan(tokenizer, DEV[:8], RULES[:3], 1024, 700)
    for number, rule in enumerate(RULES[:3], 1):
        for record, row in zip(DEV[:8], plan.rows, strict=False):
            whole = prompt_ids(tokenizer, build_messages(record, rules=[rule]))
            assert plan.heads[number] + row.prompt_end == whole
    pairs = plan.all_pairs()
    for batch in plan.batches(pairs):
        longest = max(len(plan.rows[row]) for row in batch.rows)
        assert len(batch.rows) == 1 or len(batch.rows) * (len(plan.heads[batch.context]) + longest) <= 700
    assert sorted((batch.context, row) for batch in plan.batches(pairs) for row in batch.rows) == pairs
    assert plan.tokens(pairs) < plan.naive_tokens(pairs)
    assert len(pairs) == 8 * 4 + sum(map(len, plan.options))


@pytest.mark.parametrize("records", [DEV[:1], [DEV[0], DEV[0]]])
def test_one_question_or_equal_ones(tiny, records, part):
    model, tokenizer = tiny
    plan = make_plan(tokenizer, records, RULES[:1], 1024, 2048)
    whole = prompt_ids(tokenizer, build_messages(records[0], rules=[RULES[0]]))
    assert plan.heads[1] + plan.rows[0].prompt_end == whole
    assert all(map(math.isfinite, by_pair(*mined(model, plan, tokenizer.pad_token_id, part)).values()))


def test_rules_of_equal_delta_stand_in_the_order_of_the_rule_book(tiny):
    _, tokenizer = tiny
    rules = [Rule(id_, "분류", "같은 규칙") for id_ in ("나", "가", "다")]
    plan = make_plan(tokenizer, DEV[:1], rules, 1024, 2048)
    ppls = {(context, row): 2.0 if context else 3.0 for context, row in plan.all_pairs()}
    row = ranked(plan, DEV[:1], rules, ppls, top_k=2)[0]
    assert [candidate["rule"] for candidate in row["candidates"]] == ["나", "가"]
    assert row["candidates"][0]["improvement_ratio"] == pytest.approx(1 / 3, rel=1e-5)


def test_what_does_not_fit_is_an_error_that_says_how_much_would(tiny):
    _, tokenizer = tiny
    with pytest.raises(InputError, match=r"model\.max_length=200") as error:
        make_plan(tokenizer, DEV[:3], RULES[:3], 200, 2048)
    needed = int(error.value.message.split("raise it to ")[1].split()[0])
    make_plan(tokenizer, DEV[:3], RULES[:3], needed, 2048)


def test_a_model_whose_logits_are_changed_after_its_head_is_refused(tiny, part):
    _, tokenizer = tiny
    torch.manual_seed(0)
    config = Gemma2Config(
        **{**SHAPE, "vocab_size": len(tokenizer), "head_dim": 8}, final_logit_softcapping=0.05, sliding_window=4096
    )
    plan = make_plan(tokenizer, DEV[:2], RULES[:1], 1024, 2048)
    with pytest.raises(InputError, match="differ from those of whole sequences"):
        mined(Gemma2ForCausalLM(config).eval(), plan, tokenizer.pad_token_id, part)


def test_a_window_shorter_than_the_prompt_is_refused(tiny, part):
    _, tokenizer = tiny
    torch.manual_seed(0)
    config = MistralConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, sliding_window=32)
    plan = make_plan(tokenizer, DEV[:2], RULES[:1], 1024, 2048)
    with pytest.raises(InputError, match="differ from those of whole sequences"):
        mined(MistralForCausalLM(config).eval(), plan, tokenizer.pad_token_id, part)


@pytest.mark.parametrize("form", [{"dtype": "bfloat16"}, {"dtype": "float32", "load_in_4bit": True}])
def test_other_dtypes_agree_with_the_definition(form, part):
    model, tokenizer = load_for_prediction(str(TINY_BASE), **form)
    plan = make_plan(tokenizer, DEV[:2], RULES[:1], 1024, 2048)
    for (context, row), ppl in by_pair(*mined(model, plan, tokenizer.pad_token_id, part)).items():
        prompt = plan.heads[context] + plan.rows[row].prompt_end
        assert ppl == pytest.approx(perplexity(model, prompt, plan.rows[row].answer), rel=5e-2)


def test_a_template_that_mixes_rule_and_question_is_refused():
    _, tokenizer = load_for_prediction(str(TINY_BASE), dtype="float32")
    length_first = "(message['content'] | length | string) + message['content'] +"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", length_first)
    with pytest.raises(InputError, match="choose another model"):
        make_plan(tokenizer, DEV[:3], RULES[:2], 1024, 2048)


def test_a_perplexity_that_is_no_number_stops_the_run(tiny, part):
    _, tokenizer = tiny
    model = load_for_prediction(str(TINY_BASE), dtype="float32")[0]
    plan = make_plan(tokenizer, DEV[:2], RULES[:1], 1024, 2048)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"model\.dtype"):
        mined(model, plan, tokenizer.pad_token_id, part)


def test_weights_digest_sees_the_adapter():
    base, tuned = llama(), llama_with_lora()
    assert weights_digest(base) == weights_digest(llama())
    with torch.no_grad():
        before = weights_digest(tuned)
        next(p for name, p in tuned.named_parameters() if "lora_B" in name).add_(1)
    assert weights_digest(tuned) != before


# ---- the part file


@pytest.mark.parametrize(
    "piece",
    [
        [],
        {"rule": 0, "rows": [0]},
        {"rule": 0, "rows": [0], "ppl": 3},
        {"rule": 0, "rows": [0], "ppl": []},
        {"rule": 0, "rows": [0], "ppl": ["가"]},
        {"rule": 0, "rows": [1], "ppl": [1.0]},
        {"rule": 1, "rows": [0], "ppl": [1.0]},
    ],
)
def test_a_part_file_whose_batches_are_not_the_plans_is_refused(piece, tiny, part):
    model, tokenizer = tiny
    plan = make_plan(tokenizer, DEV[:1], RULES[:1], 1024, 1)
    batches = plan.batches([(0, 0), (1, 0)])
    part.add({"rule": 0, "rows": [0], "ppl": [1.5]})
    kept = PartFile(part.path, {})
    values = list(mine(model, plan, batches, tokenizer.pad_token_id, kept))
    assert values[0] == [1.5]
    assert PartFile(part.path, {}).pieces[1] == {"rule": 1, "rows": [0], "ppl": values[1]}
    other = PartFile(part.path.with_name("other"), {})
    other.add(piece)
    with pytest.raises(InputError, match="is damaged; remove it"):
        list(mine(model, plan, batches, tokenizer.pad_token_id, PartFile(other.path, {})))


# ---- which pairs are tried


def test_the_named_rules_are_those_of_question_and_gold_answer():
    rules = [
        Rule("가", "분류", "고양이는 밤에 운다"),
        Rule("나", "분류", "강아지는 낮에 짖는다"),
        Rule("다", "분류", "소는 풀을 먹는다"),
    ]
    records = [Record("1", "교정형", "다음을 고치시오.", '"강아지가 짖는다."가 옳다. 강아지는 짖는다.'), DEV[0]]
    named = named_rules(records, rules, 2)
    assert named.sum(1).tolist() == [2, 2]
    assert named[0, 1]


def test_what_is_promising_finds_the_best_of_a_table_of_low_rank():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(120, 3)) @ rng.normal(size=(3, 60)) + rng.normal(size=(120, 60)) * 0.1
    tried = np.argsort(rng.random(table.shape), axis=1) < 8
    for left in range(4, 0, -1):
        chosen = promising(np.where(tried, table, np.nan), (20 * 120 - int(tried.sum())) // left)
        assert not (chosen & tried).any()
        tried |= chosen
    assert tried.sum() == 20 * 120
    best = np.where(tried, table, -np.inf).argmax(1) == table.argmax(1)
    assert best.mean() > 0.95  # a random third would have a third


def test_no_more_pairs_are_promised_than_are_left():
    gains = np.array([[0.1, np.nan], [0.2, 0.3]])
    assert promising(gains, 5).tolist() == [[False, True], [False, False]]
    assert not promising(np.zeros((2, 2)), 3).any()


# ---- the recipe


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "자료 폴더"
    folder.mkdir()
    write_records(folder / "q.json", DEV[:16])
    rules = json.loads((DATA / "rules.json").read_text("utf-8"))[:10]
    (folder / "rules.json").write_text(json.dumps(rules, ensure_ascii=False), "utf-8")
    return folder


def arguments(folder, output, *more):
    return [
        "recipes/tiny/mine.yaml",
        f"data.questions={folder / 'q.json'}",
        f"data.rules={folder / 'rules.json'}",
        f"mining.output={folder / output}",
        "mining.batch_tokens=600",
        *more,
    ]


@pytest.fixture(scope="module")
def recipe():
    """Run the recipe in this process and return click's result."""
    command = runpy.run_path(str(ROOT / "recipes" / "mine.py"))["main"]
    return lambda *given: CliRunner().invoke(command, arguments(*given))


def test_killed_and_started_again_gives_the_same_file(folder, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert recipe(folder, "whole").exit_code == 0
    part, result = (folder / "killed" / name for name in ("contexts.part.jsonl", "contexts.jsonl"))
    process = subprocess.Popen(
        [sys.executable, "recipes/mine.py", *arguments(folder, "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 5):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = part.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") > 5
    assert not result.exists()
    refused = recipe(folder, "killed")
    assert refused.exit_code == 2
    assert "--resume auto" in refused.output

    # What was computed is believed, not computed again: a changed number comes through to the result.
    header, first, *lines = kept.decode().splitlines(keepends=True)
    piece = json.loads(first)
    changed = json.dumps({**piece, "ppl": [1.25, *piece["ppl"][1:]]}) + "\n"
    part.write_text("".join([header, changed, *lines]))
    assert recipe(folder, "killed", "--resume", "auto").exit_code == 0
    assert result.read_text("utf-8").count('"ppl_question": 1.25,') == 1
    result.unlink()

    part.write_bytes(kept + b'{"rule": 6, "rows": [1')
    assert recipe(folder, "killed", "--resume", "auto").exit_code == 0
    for name in ("contexts.jsonl", "mining.json"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not part.exists()
    assert "ended already" in recipe(folder, "killed", "--resume", "auto").output


def test_estimate_computes_nothing(folder, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = recipe(folder, "none", "--estimate")
    assert result.exit_code == 0
    assert "tokens to compute" in result.output
    assert not (folder / "none").exists()


def test_a_third_of_the_pairs_is_tried_or_all(folder, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = {}
    for name, options, share in (("third", (), 0.33), ("whole", ("--all",), 1.0)):
        result = recipe(folder, name, "mining.top_k=10", *options)
        assert result.exit_code == 0
        rows = [json.loads(line) for line in (folder / name / "contexts.jsonl").read_text("utf-8").splitlines()]
        assert sum(len(row["candidates"]) for row in rows) == int(share * 160)
        lines[name] = {row["id"]: {one["rule"]: one["delta"] for one in row["candidates"]} for row in rows}
    for id_, tried in lines["third"].items():
        assert tried == pytest.approx({rule: lines["whole"][id_][rule] for rule in tried}, abs=1e-3)
