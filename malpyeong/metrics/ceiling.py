"""The ceiling of constrained decoding: how many gold answers it could write at all, and default repair would keep."""

from collections.abc import Sequence
from dataclasses import dataclass

from malpyeong.contest.answer import format_problem, parse_answer, quote
from malpyeong.contest.grammar import answer_grammar
from malpyeong.contest.question import options, verdicts
from malpyeong.contest.records import Record
from malpyeong.contest.repair import finish, repair
from malpyeong.metrics.exact_match import exact_match, normalise

_REASON = " 이유다."  # any will do: only the verdict is compared


@dataclass(frozen=True, slots=True)
class Reach:
    """How far constrained decoding gets towards one gold answer.

    Attributes:
        record: with its gold answer.
        literal: a well-formed answer to a 선택형 question whose sentences are literally among its options.
        sentence: the gold sentence is offered, or the grammar lets it through.
        verdict: so is the whole verdict, with its particle: Exact Match can be 1.
        kept: and repair leaves it so.
    """

    record: Record
    literal: bool
    sentence: bool
    verdict: bool
    kept: bool


def ceiling(records: Sequence[Record]) -> list[Reach]:
    """Return how far constrained decoding gets towards each gold answer."""
    import llguidance

    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher(tokenizer, answer_grammar())

    def accepts(answer: str) -> bool:
        matcher, tokens = grammar.deep_copy(), tokenizer.tokenize_str(answer)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    reached = []
    for record in records:
        gold = record.answer or ""
        parsed, offered = parse_answer(gold), options(record)
        sentences = _normalised(gold)
        answers = [verdict + _REASON for verdict in verdicts(record)]
        if not offered:
            # Exact Match is blind to quotes, so that the sentence may as well be written without any in it.
            plain = tuple(sentence.replace('"', "").strip() for sentence in parsed.sentences)
            written = [
                f"{quote(each, parsed.joiner)}{particle} 옳다.{_REASON}"
                for each in (parsed.sentences, plain)
                for particle in "가이"
            ]
            answers = list(filter(accepts, written))
        answers = [finish(answer, record.question) for answer in answers]
        verdict = any(exact_match(answer, gold) for answer in answers)
        reached.append(
            Reach(
                record,
                literal=bool(offered)
                and set(parsed.sentences) <= set(offered)
                and format_problem(gold) is None
                and record.question_type == "선택형",
                sentence=any(_normalised(answer) == sentences for answer in answers),
                verdict=verdict,
                kept=verdict and bool(exact_match(repair(gold, record.question)[0], gold)),
            )
        )
    return reached


def _normalised(answer: str) -> tuple[str, ...]:
    return tuple(map(normalise, parse_answer(answer).sentences))
