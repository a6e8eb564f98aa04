"""Constrained decoding, samples and resume, on real models: the sample base (untrained for this) and a random one."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from malpyeong.contest.answer import FormatProblem, format_problem, parse_answer, write_answer
from malpyeong.contest.grammar import answer_grammar, reason_grammar
from malpyeong.contest.question import options, verdicts
from malpyeong.contest.records import load_records, write_records
from malpyeong.contest.repair import finish
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.decoding.constrain import MIN_CONSTRAINED_TOKENS, AnswerFormat, GrammarMask, token_ids
from malpyeong.decoding.engines import (
    BatchEngine,
    Decoding,
    Request,
    TransformersEngine,
    VLLMEngine,
    log_likelihood_of_end,
)
from malpyeong.decoding.likelihood import TreeScorer, can_score_trees, log_likelihoods
from malpyeong.decoding.vote import choose
from malpyeong.errors import InputError
from malpyeong.files import PartFile
from malpyeong.models.load import load_for_prediction, tokenizer_for_prediction
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.predict import fitted, main, predict
from malpyeong.prompts.context import Context, write_contexts
from malpyeong.prompts.messages import build_messages, prompt_ids, render
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.samples import DATA, TINY_BASE
from tests.conftest import ROOT

GOLD = load_records(DATA / "test.json", "gold")
HANGUL = re.compile("[가-힣]")
QUESTIONS = [record for record in GOLD if record.question_type == "선택형"][:4] + [
    record for record in GOLD if record.question_type == "교정형"
][:4]


def plain(engine, records):
    """The prompts of questions alone."""
    return [render(engine.tokenizer, record) for record in records]


@pytest.fixture(scope="module")
def tiny():
    return load_for_prediction(str(TINY_BASE), dtype="float32")


@pytest.fixture(scope="module")
def bpe():
    """A random model over a byte-level BPE tokenizer of the kind that Qwen, Kanana and others have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_500,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{record.question} {record.answer}" for record in GOLD), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    # Padded beyond the tokenizer's size, as real models are.
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=1_536, num_key_value_heads=1, head_dim=16, eos_token_id=1, pad_token_id=0, **shape)
    return Qwen3ForCausalLM(config).eval(), wrapped


def matcher(loaded, grammar):
    import llguidance.hf

    model, tokenizer = loaded
    compiled = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer, n_vocab=model.config.vocab_size), grammar)
    assert compiled.get_error() == ""
    return compiled


def accepts(loaded, compiled, text):
    ids = loaded[1](text, add_special_tokens=False)["input_ids"]
    fresh = compiled.deep_copy()
    return fresh.try_consume_tokens(ids) == len(ids) and fresh.is_accepting()


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_the_grammar_takes_every_gold_answer(name, request):
    loaded = request.getfixturevalue(name)
    whole = matcher(loaded, answer_grammar())
    assert [record.answer for record in GOLD if not accepts(loaded, whole, record.answer)] == []
    for record in GOLD[:40]:
        offered = verdicts(record)
        if offered:
            assert accepts(loaded, matcher(loaded, answer_grammar(offered)), record.answer)
            verdict = next(it for it in offered if record.answer.startswith(it))
            assert accepts(loaded, matcher(loaded, reason_grammar(verdict)), record.answer.removeprefix(verdict))


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_the_grammar_keeps_to_the_default_limits_at_every_step(name, request):
    """As vLLM has it, which does not let them be set; what is costly is the mask over all tokens."""
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    model, tokenizer = loaded = request.getfixturevalue(name)
    compiled = matcher(loaded, answer_grammar())
    mask = allocate_token_bitmask(1, model.config.vocab_size)
    for text in (GOLD[0].answer, '"네가 "혹은 갔다."가 옳다. 나다.', '"이것이 옳다고 함."이 옳다.'):
        fresh = compiled.deep_copy()
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            fill_next_token_bitmask(fresh, mask)
            if not fresh.try_consume_tokens([token]):
                break
        assert fresh.get_error() == "", text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            '"가."가 옳다.',
            '"가."가 옳다. ',
            '"가."가 옳다. 이유다',
            '"가."가 옳다.\n이유다.',
            '"가."가 옳다.  이유다.',
        ),
        *("“가.”가 옳다. 이유다.", '정답: "가."가 옳다. 이유다.', ' "가."가 옳다. 이유다.', '"가. "가 옳다. 이유다.'),
        *('""가 옳다. 이유다.', '"가."으가 옳다. 이유다.', '"가."로 고쳐 쓴다. 이유다.', '"가."가 옳다. .'),
        *(
            "\"감.\"이 옳다. '나'가 옳다.",
            '"네가 옳다고 했다."가 옳다. 이유다.',
            '<think></think>"가."가 옳다. 이유다.',
        ),
        *('"가."가 옳다. ```이유다.', '"\u202e가."가 옳다. 이유다.', '"가."가 옳다. \u1100\u1161다.'),
    ],
)
def test_the_grammar_refuses_what_has_a_problem(text, bpe):
    assert not accepts(bpe, matcher(bpe, answer_grammar()), text)


# What format, split and parser trip over, to be put together by chance.
AWKWARD = (
    *('"', "'", "“", "”", "‘", "’", " ", "\u00a0", "\n", "#", "```", "``", "<think>", "</th", "ink>", "\u202e"),
    *(
        "가 옳다",
        "이 옳다",
        "으가 옳다",
        "옳다",
        "으로 고쳐 쓴다",
        "로 바꿔 써야 한다",
        '"가 옳다. ',
        '"이 옳다. ',
        "가",
        "이",
    ),
    *(
        "혹은",
        "또는",
        '" 혹은 "',
        "' 또는 “",
        "갔다.",
        "감",
        "ㄹ",
        "ㅋㅋ",
        "…",
        "!",
        ". ",
        "a",
        "1",
        "가" * 7,
        " 가 가 가",
    ),
    *("\u1100", "\u1161"),
)


BEYOND_THE_GRAMMAR = (FormatProblem.REASON_REPEATS, FormatProblem.REASON_JAMO, FormatProblem.EMPTY_SENTENCE)


def test_what_the_grammar_lets_through_is_well_formed_and_nothing_else_is(bpe):
    compiled, chance = matcher(bpe, answer_grammar()), random.Random(0)
    accepted = 0
    for _ in range(10_000):
        head, tail = ("".join(chance.choices(AWKWARD, k=chance.randint(1, 6))) for _ in range(2))
        text = f'"{head}"{chance.choice("가이")} 옳다. {tail}{chance.choice([".", "!”", "…", ""])}'
        problem = format_problem(text)
        if accepts(bpe, compiled, text):
            accepted += 1
            assert problem in (None, *BEYOND_THE_GRAMMAR), text
            assert format_problem(finish(text)) is None, text
        elif problem is None:
            # Only what the grammar's docstring names.
            reason = text.partition(" 옳다. ")[2] if head.count("옳다") == 0 else "."
            hidden = any(mark in text for mark in ("  ", "\u00a0 ", " \u00a0", "\u00a0\u00a0", "\u202e", "\n"))
            odd_reason = reason[0] in "., " or " " in text[-3:-1].replace("\u00a0", " ") or not HANGUL.search(reason)
            assert hidden or odd_reason, text
    assert accepted > 1_000


class ChanceEngine(BatchEngine):
    """Chance in the place of a model, with a liking for what is awkward."""

    def __init__(self, model, tokenizer, limit):
        super().__init__(tokenizer, [], model.config.vocab_size, Decoding(True, max_new_tokens=limit))
        self._width, self._chance = model.config.vocab_size, random.Random(limit)
        self._fragments = [token_ids(tokenizer, text) for text in AWKWARD]

    def score(self, prompts, candidates):
        return [[self._chance.random() for _ in some] for some in candidates]

    def generate(self, requests):
        mask = GrammarMask(self._format, [request.grammar for request in requests], 0)
        wanted = [[] for _ in requests]
        ids = torch.empty(len(requests), 0, dtype=torch.long)
        for _ in range(max(request.max_tokens for request in requests)):
            scores = torch.randn(len(requests), self._width)
            for row, fragment in enumerate(wanted):
                if not fragment and self._chance.random() < 0.7:
                    fragment += self._chance.choice(self._fragments)
                if fragment:
                    scores[row, fragment.pop(0)] += 20
            ids = torch.cat([ids, mask(ids, scores).argmax(1, keepdim=True)], 1)
        ended = [[*row, self.tokenizer.eos_token_id] for row in ids.tolist()]
        return [row[: row.index(self.tokenizer.eos_token_id)] for row in ended]


@pytest.mark.parametrize("name", ["tiny", "bpe"])
@pytest.mark.parametrize("limit", [MIN_CONSTRAINED_TOKENS, 200])
def test_whatever_the_logits_the_answer_is_well_formed(name, limit, request):
    """Every answer ends within its limit: sentences and reasons that go on and on are cut back and closed."""
    engine = ChanceEngine(*request.getfixturevalue(name), limit)
    torch.manual_seed(limit)
    for verdict in ("", "", "", '"감."이 옳다.'):
        requests = [Request([], limit, engine._format.grammar(verdict))] * 16
        closed = engine._closed(engine._format, requests, engine.generate(requests), [verdict] * 16)
        assert max(map(len, closed)) <= limit
        for text in engine.tokenizer.batch_decode(closed):
            assert format_problem(finish(verdict + text)) is None, text
    for record, [answer] in zip(QUESTIONS, engine.answers(plain(engine, QUESTIONS)), strict=True):
        assert format_problem(answer) is None, answer
        if options(record):
            assert set(parse_answer(answer).sentences) <= set(options(record))


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_constrained_answers_are_well_formed_whatever_the_model(name, request):
    """Drawn hot, so that the models ramble; the shortest limit that is allowed; a batch of both question types."""
    engine = TransformersEngine(
        *request.getfixturevalue(name), Decoding(True, 4, temperature=1.5, max_new_tokens=MIN_CONSTRAINED_TOKENS)
    )
    for record, answers in zip(QUESTIONS, engine.answers(plain(engine, QUESTIONS)), strict=True):
        assert len(answers) == 4
        for answer in answers:
            assert format_problem(answer) is None, answer
            if options(record):
                assert set(parse_answer(answer).sentences) <= set(options(record))


@pytest.fixture(scope="module")
def asked(tiny):
    """Prompts of both question types, and the candidates of those that offer options."""
    mixed = [record for pair in zip(QUESTIONS[:4], QUESTIONS[4:], strict=True) for record in pair]
    texts = [verdicts(record) for record in mixed]
    return [render(tiny[1], record).ids for record in mixed], [
        [token_ids(tiny[1], text) for text in some] for some in texts
    ]


def test_the_likelihood_is_the_models(tiny, asked):
    """One pass with a shared cache against one plain forward pass per candidate."""
    model, (prompts, candidates) = tiny[0], asked
    scores = log_likelihoods(model, prompts[0], candidates[0])
    for ids, score in zip(candidates[0], scores, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompts[0] + ids])).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(prompts[0]) - 1 + place, token]) for place, token in enumerate(ids))
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_batch_is_scored_as_its_questions_are_one_by_one(tiny, asked):
    """Candidates of a prompt that cannot be the likeliest may have a bound; alone each of them has its own score."""
    model, (prompts, candidates) = tiny[0], asked
    unlikely = [*candidates[0][0][:-1], *[1] * 40]  # the start of a turn, within a sentence
    candidates = [[*candidates[0], unlikely], *candidates[1:]]
    trees = TreeScorer(model, 0)
    every = [(prompt, ids) for prompt, some in zip(prompts, candidates, strict=True) for ids in some]
    alone = trees.score([prompt for prompt, _ in every], [[ids] for _, ids in every])
    pairs = zip(prompts, candidates, strict=True)
    plain = [log_likelihoods(model, prompt, some) if some else [] for prompt, some in pairs]
    assert [score for [score] in alone] == pytest.approx([score for some in plain for score in some], abs=1e-4)
    together = trees.score(prompts, candidates)
    bounded = 0
    for scores, expected in zip(together, plain, strict=True):
        assert len(scores) == len(expected)
        if not expected:
            continue
        assert scores.index(max(scores)) == expected.index(max(expected))
        assert max(scores) == pytest.approx(max(expected), abs=1e-4)
        for score, value in zip(scores, expected, strict=True):
            assert score == pytest.approx(value, abs=1e-4) or value < score < max(scores)
            bounded += score != pytest.approx(value, abs=1e-4)
    assert 0 < bounded < len(every)


def test_generation_goes_on_from_what_was_scored(tiny, asked):
    """The prompt with the likeliest verdict behind it, twice, and a prompt without one: as if read anew."""
    model, (prompts, candidates) = tiny[0], asked
    trees = TreeScorer(model, 0)
    scores = trees.score(prompts, candidates)
    verdict = candidates[0][scores[0].index(max(scores[0]))]
    sequences = [prompts[1], prompts[0] + verdict, prompts[0] + verdict, prompts[2]]
    known, fresh = trees.begin(sequences), TreeScorer(model, 0).begin(sequences)
    assert torch.equal(known.ids, fresh.ids)
    with torch.inference_mode():
        first, second = (
            model(
                input_ids=batch.ids[:, -1:],
                attention_mask=batch.mask,
                position_ids=batch.mask.sum(1, keepdim=True) - 1,
                past_key_values=batch.cache,
            ).logits
            for batch in (known, fresh)
        )
    assert torch.allclose(first, second, atol=1e-4)
    assert not torch.allclose(first[0], first[1], atol=1e-2)


@pytest.mark.parametrize("kind", ["window", "scaled"])
def test_other_architectures_are_scored_question_by_question(kind, bpe):
    """Layers that see a window of tokens only, and logits that are not what the output layer gives."""
    from transformers import AutoModelForCausalLM, GraniteConfig, Qwen3Config

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 1_536, "num_key_value_heads": 1, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    config = Qwen3Config(**shape, **window) if kind == "window" else GraniteConfig(**shape, logits_scaling=8.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_score_trees(model, token_ids(bpe[1], '"나무가 크다."가 옳다.'))
    assert can_score_trees(*[bpe[0], token_ids(bpe[1], '"나무가 크다."가 옳다.')])
    engine = TransformersEngine(model, bpe[1], Decoding(True, max_new_tokens=MIN_CONSTRAINED_TOKENS))
    for [answer] in engine.answers(plain(engine, QUESTIONS[3:5])):
        assert format_problem(answer) is None, answer


class PlainEngine(BatchEngine):
    """The definition: one sequence at a time, the whole of it again for every token; grammars with default limits.

    As the vLLM engine it shares with the transformers engine what an answer is made of, and nothing else.
    """

    def __init__(self, model, tokenizer, decoding):
        ends = model.generation_config.eos_token_id
        super().__init__(tokenizer, ends if isinstance(ends, list) else [ends], 0, decoding)
        self._model = model

    def _logs(self, ids):
        with torch.no_grad():
            return self._model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    def score(self, prompts, candidates):
        found = []
        for prompt, some in zip(prompts, candidates, strict=True):
            logs = [self._logs(prompt + ids)[len(prompt) - 1 : -1] for ids in some]
            found.append(
                [float(one.gather(1, torch.tensor([ids]).T).sum()) for one, ids in zip(logs, some, strict=True)]
            )
        return found

    def generate(self, requests):
        return [self._generate(request) for request in requests]

    def _generate(self, request):
        import llguidance
        import llguidance.hf

        tokens = llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=self._model.config.vocab_size)
        state, ids = llguidance.LLMatcher(tokens, request.grammar), []
        while len(ids) < request.max_tokens:
            scores = self._logs(request.prompt + ids)[-1]
            allowed = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")
            scores[torch.from_numpy(allowed[: len(scores)]) == 0] = -torch.inf
            token = int(scores.argmax())
            if token in self._ends:
                break
            assert state.consume_token(token)
            ids.append(token)
        return ids


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_engines_give_the_same_answers(name, request):
    """Rules are named, verdicts chosen, runaway sentences and reasons closed: all as by the definition, no tie here."""
    loaded = request.getfixturevalue(name)
    rules = tuple(load_rule_book(DATA / "rules.json")[:2])
    contexts = [Context(rules=rules, choose=True) if record in QUESTIONS[3:5] else Context() for record in QUESTIONS]
    prompts = [render(loaded[1], record, context) for record, context in zip(QUESTIONS, contexts, strict=True)]
    decoding = Decoding(True, max_new_tokens=MIN_CONSTRAINED_TOKENS)
    expected = PlainEngine(*loaded, decoding).answers(prompts)
    assert TransformersEngine(*loaded, decoding).answers(prompts) == expected
    for context, [answer] in zip(contexts, expected, strict=True):
        named, answer = split_choice(answer)
        assert (named is not None) == context.choose
        assert format_problem(answer) is None, answer


def test_every_end_token_may_end_an_answer(tiny):
    """As a grammar says it, since that is all that vLLM takes."""
    import llguidance
    import llguidance.hf

    tokenizer = tiny[1]
    assert tokenizer.eos_token_id == 2
    both = AnswerFormat(tokenizer, [0, 2])
    direct = llguidance.LLMatcher(llguidance.hf.from_tokenizer(tokenizer, eos_token=[0, 2]), answer_grammar())
    state = both.matcher(both.grammar())
    for token in token_ids(tokenizer, GOLD[0].answer):
        assert state.compute_bitmask() == direct.compute_bitmask()
        assert state.consume_token(token)
        assert direct.consume_token(token)
    assert state.compute_bitmask() == direct.compute_bitmask()
    assert AnswerFormat(tokenizer, [2]).grammar() == answer_grammar()
    verdict = '"감."이 옳다.'
    assert AnswerFormat(tokenizer, [2]).grammar(verdict) == reason_grammar(verdict)


def test_what_vllm_reports_of_a_prompt_is_summed_over_the_candidate():
    """Its form, from its documentation: for every prompt token but the first the log-probability by token id."""
    reported = [None, *({token: SimpleNamespace(logprob=-token / 10)} for token in (3, 4, 5))]
    assert log_likelihood_of_end(reported, [9, 3, 4, 5], 2) == pytest.approx(-0.9)


def test_samples_depend_on_the_record_and_not_on_the_batch(tiny):
    decoding = Decoding(samples=3, temperature=1.0, max_new_tokens=24)
    engine = TransformersEngine(*tiny, decoding)
    prompts = plain(engine, QUESTIONS[:3])
    together = engine.answers(prompts)
    assert together == [engine.answers([prompt])[0] for prompt in prompts]
    greedy = TransformersEngine(*tiny, Decoding(max_new_tokens=24)).answers(prompts)
    assert [answers[0] for answers in together] == [answers[0] for answers in greedy]
    assert any(len(set(answers)) > 1 for answers in together)
    other = TransformersEngine(*tiny, Decoding(samples=3, temperature=1.0, seed=1, max_new_tokens=24))
    assert other.answers(prompts) != together


def test_the_vote():
    near, far = "의존 명사는 앞말과 띄어 쓴다.", "이것은 아주 다른 이야기이다."
    a = [write_answer("갑이다.", reason) for reason in (far, near, near)]
    b = [write_answer("을이다.", reason) for reason in (near, near)]
    assert choose([*b, *a]) == a[1]
    assert choose([*a[:2], *b]) == a[0]  # a tie goes to the earlier sentence, and to the earlier reason
    assert choose(["모르겠다.", "모르겠다.", a[0]]) == a[0]  # what is malformed has no vote
    assert choose(["모르겠다.", "음", "음"]) == "음"
    assert choose(["음"]) == "음"
    with pytest.raises(ValueError, match="no answers"):
        choose([])


def test_what_cannot_be_asked_for():
    with pytest.raises(InputError, match="need room"):
        Decoding(constrained=True, max_new_tokens=10)
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="vLLM is not installed"):
            VLLMEngine(str(TINY_BASE), None, "auto", Decoding())
    with pytest.raises(InputError, match="transformers engine"):
        VLLMEngine(str(TINY_BASE), None, "auto", Decoding(samples=2))


def test_done_batches_are_skipped_and_others_kept_whole(tiny):
    engine = TransformersEngine(*tiny, Decoding(max_new_tokens=4))
    prompts = plain(engine, QUESTIONS)
    every = list(predict(engine, prompts, batch_size=3))
    first, second = dict(every[:3]), dict(every[3:6])
    assert sorted(place for place, _ in every) == list(range(len(QUESTIONS)))
    rest = list(predict(engine, prompts, batch_size=3, done={*first, next(iter(second))}))
    assert rest == every[3:]  # a batch that was cut off is answered again, whole


COMMAND = ("-m", "malpyeong.predict", TINY_BASE, "QUESTIONS", "--batch-size", "2", "--max-new-tokens", "64", "-o")


@pytest.fixture
def command(tmp_path):
    questions = tmp_path / "질문 파일.json"
    write_records(questions, GOLD[:12])
    return [str(questions) if word == "QUESTIONS" else str(word) for word in COMMAND]


@pytest.mark.slow
def test_a_killed_prediction_goes_on_to_the_same_file(command, run_module, tmp_path):
    whole, output = tmp_path / "whole.json", tmp_path / "답 파일.json"
    assert run_module(*command, whole).returncode == 0
    part = tmp_path / ".답 파일.json.part.jsonl"
    for answers in (1, 7):
        process = subprocess.Popen(
            [sys.executable, *command, output], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 1 + answers):
            time.sleep(0.005)
        assert process.poll() is None, "finished before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not output.exists()
    with part.open("ab") as file:
        file.write('{"id": "1", "answer": "\\"가'.encode())
    refused = run_module(*command, output, "--seed", "1")
    assert refused.returncode == 2
    assert "another seed" in refused.stderr
    assert "remove the file" in refused.stderr
    assert "Traceback" not in refused.stderr
    result = run_module(*command, output)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_a_part_file_cut_anywhere_is_read(tmp_path):
    made_of = {"질문": "abc", "settings": {"seed": 0, "sizes": (1, 2)}}
    pieces = [{"id": record.id, "answer": f"{record.answer}\r\u2028"} for record in GOLD[:3]]
    part = PartFile(tmp_path / "이어 하기.jsonl", made_of)
    assert not part.path.exists()
    for piece in pieces:
        part.add(piece)
    data = part.path.read_bytes()
    for cut in [0, 1, 25, *random.Random(0).sample(range(len(data)), 60), len(data)]:
        part.path.write_bytes(data[:cut])
        again = PartFile(part.path, made_of)
        assert again.pieces == pieces[: max(0, data[:cut].count(b"\n") - 1)]
        for piece in pieces[len(again.pieces) :]:
            again.add(piece)
        assert part.path.read_bytes() == data
    again.remove()
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_part_file_of_other_work_is_refused(tmp_path):
    part = PartFile(tmp_path / "part.jsonl", {"weights": "a", "rules": "b", "context": "c"})
    part.add([1])
    for other, named in (
        ({"weights": "a", "rules": "x", "context": None}, "another rules and context;"),
        ({"weights": "a", "rules": "b"}, "another context;"),
        ({"weights": "a", "rules": "b", "context": "c", "seed": 1}, "another seed;"),
    ):
        with pytest.raises(InputError, match=named) as error:
            PartFile(part.path, other)
        assert "remove the file to start again" in error.value.message
    for damaged in ("[]\n3\n", "null\n", "kaputt\n", '{"weights": "a"}\nkaputt\n{}\n', "\xff\n"):
        part.path.write_text(damaged, encoding="latin-1")
        with pytest.raises(InputError, match="is damaged; remove it"):
            PartFile(part.path, {"weights": "a"})


def test_a_part_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(.*\); make room"):
        PartFile(tmp_path / "none" / "part.jsonl", {}).add(1)


@pytest.mark.slow
def test_repairs_are_counted_and_can_be_left_out(run_module, tmp_path, command):
    """The part file of a whole run is enough: what is left is to repair and write."""
    output = tmp_path / "out.json"
    assert run_module(*command, output, "--decoding", "free").returncode == 0
    assert not list(tmp_path.glob(".*"))
    process = run_module("-c", _HEADER, *command[2:], output, "--decoding", "free")
    assert process.returncode == 0, process.stderr
    part = tmp_path / ".out.json.part.jsonl"
    lines = [json.dumps({"id": record.id, "answer": f"정답: {record.answer}"}) for record in GOLD[:12]]
    part.write_text(process.stdout.splitlines()[-1] + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    kept = part.read_bytes()
    result = run_module(*command, output, "--decoding", "free")
    assert "repaired: text before: 12" in result.stdout, result.stderr
    assert [record.answer for record in load_records(output)] == [record.answer for record in GOLD[:12]]
    part.write_bytes(kept)
    assert run_module(*command, output, "--decoding", "free", "--no-repair").returncode == 0
    assert [record.answer for record in load_records(output)] == [f"정답: {record.answer}" for record in GOLD[:12]]


# Prints the header that the command would write, by stopping it at the first answer.
_HEADER = """
import json, sys
from malpyeong import predict
class Shown(predict.PartFile):
    def add(self, piece):
        print(self._header); sys.exit()
predict.PartFile = Shown
predict.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_prompts_carry_the_context_that_training_had(tiny, command, run_module, tmp_path):
    rule = load_rule_book(DATA / "rules.json")[0]
    contexts = [Context(rules=(rule,), examples=(GOLD[20],)), Context()]
    first, second = fitted(tiny[1], QUESTIONS[:2], contexts, 64)
    assert first.ids == prompt_ids(tiny[1], build_messages(QUESTIONS[0], [GOLD[20]], [rule]))
    assert second.ids == prompt_ids(tiny[1], build_messages(QUESTIONS[1]))

    asked, file, output = load_records(command[3]), tmp_path / "근거.jsonl", tmp_path / "답.json"
    write_contexts(file, asked[:11], [[(1.0, rule)]] * 11, [[]] * 11)
    result = run_module(*command, output, "--context", file)
    assert (result.returncode, output.exists()) == (2, False)
    assert f'1 of 12 questions have no line (the first: id "{asked[11].id}")' in result.stderr
    write_contexts(file, asked, [[(1.0, rule)]] * 12, [[]] * 12)
    assert run_module(*command, output, "--context", file).returncode == 0
    assert len(load_records(output, "prediction")) == 12


@pytest.mark.slow
def test_contexts_are_fitted_to_the_length_that_training_saved(command, run_module, tmp_path):
    """As training saves it beside the adapter and export in the merged folder: in the tokenizer."""
    rules = load_rule_book(DATA / "rules.json")[:2]
    tokenizer = load_tokenizer(str(TINY_BASE))
    asked = load_records(command[3])
    whole = Context(rules=tuple(rules))
    longest = max(len(render(tokenizer, record, whole).ids) for record in asked)
    model = tmp_path / "모형"
    shutil.copytree(TINY_BASE, model)
    context, output = tmp_path / "근거.jsonl", tmp_path / "답.json"
    write_contexts(context, asked, [[(1.0, rule) for rule in rules]] * 12, [[]] * 12)
    command[2] = str(model)
    arguments = (*command, output, "--context", context)

    def save(length):
        tokenizer.model_max_length = length
        tokenizer.save_pretrained(model)
        assert tokenizer_for_prediction(str(model)).model_max_length == length
        assert load_tokenizer(str(model), tokenizer_json=True).model_max_length == length

    save(longest + 63)  # one token too few for the longest
    short = sum(len(prompt.context) < 2 for prompt in fitted(tokenizer, asked, [whole] * 12, 64))
    assert 1 <= short < 12
    process = run_module("-c", _HEADER, *arguments[2:])
    assert json.loads(process.stdout.splitlines()[-1])["model_max_length"] == longest + 63
    line = f"{short} of 24 rules and examples do not fit the model's {longest + 63} tokens with answers of 64"
    assert process.stdout.count(line) == 1
    assert "sequence length" not in process.stderr  # transformers' warning

    save(longest + 64)
    part = tmp_path / ".답.json.part.jsonl"
    header = json.loads(process.stdout.splitlines()[-1])
    part.write_text(json.dumps(header) + "\n", "utf-8")
    refused = run_module(*arguments)  # the folder's digest tells it too
    assert "another model and model_max_length" in refused.stderr
    part.unlink()
    result = run_module("-c", _HEADER, *arguments[2:])
    assert "do not fit" not in result.stdout

    alone = max((len(render(tokenizer, record, Context()).ids), record.id) for record in asked)
    save(alone[0] + 63)
    result = run_module(*arguments)
    assert (result.returncode, output.exists()) == (2, False)
    assert f'the longest, id "{alone[1]}", has {alone[0]}); lower --max-new-tokens' in result.stderr

    tokenizer.model_max_length = VERY_LARGE_INTEGER  # what a tokenizer has whose files say nothing
    assert [prompt.context for prompt in fitted(tokenizer, asked, [whole] * 12, 64)] == [whole] * 12


def test_a_full_gpu_is_one_line_and_keeps_what_is_there(command, tmp_path, monkeypatch):
    """Raised here where a GPU would: there is none."""
    answers, left = TransformersEngine.answers, [2]

    def full(engine, prompts):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answers(engine, prompts)

    monkeypatch.setattr(TransformersEngine, "answers", full)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (0, 4 * 2**30))
    result = CliRunner().invoke(main, [*command[2:], str(tmp_path / "답.json")])
    assert result.exit_code == 2
    part = tmp_path / ".답.json.part.jsonl"
    assert f"lower --batch-size=2, or add --load-in-4bit; first remove {part}" in result.output
    assert len(part.read_text("utf-8").splitlines()) == 1 + 2 * 2
