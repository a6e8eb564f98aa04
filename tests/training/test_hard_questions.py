"""The hardest questions of a GRPO recipe: those that perplexity, by its definition, ranks first."""

import json

import pytest

from malpyeong.contest.records import load_records, write_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.models.load import load_for_prediction
from malpyeong.prompts.context import Context, load_contexts, write_contexts
from malpyeong.prompts.messages import completion_ids, fit_prompts
from malpyeong.prompts.rule_choice import tag
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.training.perplexity import perplexity

RECIPE = ("recipes/hard_questions.py", "recipes/tiny/grpo.yaml", "model.adapter=null")
RECORDS = load_records(DATA / "dev.json", answers="gold")[:20]


def hardest(contexts, answers, count):
    model, tokenizer = load_for_prediction(str(TINY_BASE), dtype="float32")
    prompts = [prompt.ids for prompt in fit_prompts(tokenizer, RECORDS, contexts, [2048] * len(RECORDS))]
    ppl = [
        perplexity(model, prompt, completion_ids(tokenizer, answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    ranked = sorted(range(len(ppl)), key=lambda place: -ppl[place])
    return [RECORDS[place] for place in sorted(ranked[:count])], RECORDS[ranked[0]]


def test_writes_the_share_with_the_highest_perplexity_in_the_order_of_the_file(tmp_path, run_module):
    write_records(tmp_path / "train.json", RECORDS)
    output = tmp_path / "어려운 문제.json"
    result = run_module(*RECIPE, f"data.train={tmp_path / 'train.json'}", "-o", output, "--share", "0.3")
    assert result.returncode == 0, result.stderr
    expected, first = hardest([Context()] * len(RECORDS), [record.answer for record in RECORDS], 6)
    assert load_records(output, answers="gold") == expected
    assert f"id {first.id}:" in result.stdout.splitlines()[0]
    assert "the 6 hardest of 20 questions" in result.stdout


@pytest.mark.slow
def test_prompts_are_those_of_training(tmp_path, run_module):
    labels = json.loads((DATA / "labels.json").read_text("utf-8"))
    rules = {rule.id: rule for rule in load_rule_book(DATA / "rules.json")}
    named = [labels[record.id]["rule"] for record in RECORDS]
    other = next(iter(rules.values()))
    write_records(tmp_path / "train.json", RECORDS)
    context = tmp_path / "context.jsonl"
    shown = [[(1.0, rules[name])] + ([(0.5, other)] if name != other.id else []) for name in named]
    write_contexts(context, RECORDS, shown, [[] for _ in RECORDS])
    files = [f"data.train={tmp_path / 'train.json'}", f"data.context={context}", f"data.labels={DATA / 'labels.json'}"]
    result = run_module(*RECIPE, *files, "model.max_length=2048", "-o", tmp_path / "hard.json", "--share", "0.5")
    assert result.returncode == 0, result.stderr
    contexts = load_contexts(context, RECORDS, choose=True)
    plain = hardest([Context()] * len(RECORDS), [record.answer for record in RECORDS], 10)[0]
    answers = [tag(name) + record.answer for name, record in zip(named, RECORDS, strict=True)]
    assert load_records(tmp_path / "hard.json", answers="gold") == hardest(contexts, answers, 10)[0] != plain


def test_mistakes_are_one_line_before_a_model_is_loaded(tmp_path, run_module):
    train = tmp_path / "train.json"
    write_records(train, RECORDS)
    before = train.read_bytes()
    for arguments, line in (
        ([f"data.train={tmp_path / 'no.json'}", "-o", tmp_path / "a.json"], "no.json"),
        ([f"data.train={train}", "-o", train / "a.json"], "a.json"),
        ([f"data.train={train}", "-o", train], "would overwrite"),
        ([f"data.train={train}", "model.adapter=no", "-o", tmp_path / "a.json"], "no: holds no adapter"),
        ([f"data.train={train}", "model.name=no", "-o", tmp_path / "a.json"], "no: cannot be loaded as a model"),
    ):
        result = run_module(*RECIPE, *arguments)
        assert result.returncode == 2
        (said,) = result.stderr.splitlines()
        assert line in said
    assert run_module(*RECIPE, f"data.train={train}", "-o", tmp_path / "a.json", "--share", "0").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    assert train.read_bytes() == before


def rates(tmp_path, *arguments):
    files = (f"data.train={tmp_path / 'train.json'}", "-o", tmp_path / "band.json")
    return (*RECIPE, *files, "--samples", "2", "training.max_completion_length=4", "--pass-rate", *arguments)


def test_pass_rates_are_measured_once_kept_and_gone_on_with(tmp_path, run_module):
    write_records(tmp_path / "train.json", RECORDS)
    file = tmp_path / "band.rates.jsonl"
    assert run_module(*rates(tmp_path, 0.1, 0.9)).returncode == 2  # of the base, which never answers well
    whole = file.read_text("utf-8")
    header, *pieces = map(json.loads, whole.splitlines())
    assert header["samples"] == 2
    assert {piece["id"]: piece["right"] for piece in pieces} == {record.id: 0 for record in RECORDS}

    file.write_text("\n".join(whole.splitlines()[:6]) + '\n{"id": "to', "utf-8")  # as a kill leaves it
    assert run_module(*rates(tmp_path, 0, 0)).returncode == 0
    assert sorted(file.read_text("utf-8").splitlines()) == sorted(whole.splitlines())
    assert load_records(tmp_path / "band.json", answers="gold") == RECORDS

    result = run_module(*rates(tmp_path, 0, 0), "training.temperature=0.5")
    assert result.returncode == 2
    assert "temperature" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_band_leaves_out_what_is_always_and_what_is_never_right(tmp_path, run_module):
    write_records(tmp_path / "train.json", RECORDS)
    assert run_module(*rates(tmp_path, 0, 0)).returncode == 0
    file = tmp_path / "band.rates.jsonl"
    header = file.read_text("utf-8").splitlines()[0]
    right = {record.id: row % 3 for row, record in enumerate(RECORDS)}
    pieces = [json.dumps({"id": id_, "right": count}) for id_, count in right.items()]
    file.write_text("\n".join([header, *pieces]) + "\n", "utf-8")

    assert run_module(*rates(tmp_path, 0.1, 0.9)).returncode == 0
    kept = [record.id for record in load_records(tmp_path / "band.json", answers="gold")]
    assert kept == [record.id for record in RECORDS if right[record.id] == 1]
    result = run_module(*rates(tmp_path, 0.5, 1), "--easy-first")
    assert result.returncode == 0, result.stderr
    kept = [record.id for record in load_records(tmp_path / "band.json", answers="gold")]
    assert [right[id_] for id_ in kept] == sorted((count for count in right.values() if count), reverse=True)
    assert run_module(*RECIPE, "-o", tmp_path / "a.json", "--easy-first").returncode == 2
