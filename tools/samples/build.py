"""Build the sample splits and the rule book from the item bank: ``python -m tools.samples.build``.

Every item has five sentence frames. One frame of each item is kept out of ``train``, for ``explore``, ``dev`` or
``test``, so that those splits ask known norms in sentences that SFT never saw. ``explore`` is what GRPO trains on: on
questions that SFT knows by heart the completions hardly differ and there is little to learn. It asks every item, in a
sixth sentence that is there only: what GRPO never asks, it forgets. One item in nine is kept out of training
altogether and makes the ``unseen`` split. The rare forms (``specials.yaml``) have one sentence each, which the other
splits ask with other words in its slots. ``contest_like`` stands in for the contest's own files (see
:mod:`tools.samples.contest_like`). The result depends on nothing but the bank.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from malpyeong.contest.answer import write_answer
from malpyeong.contest.particles import subject_particle
from malpyeong.contest.records import Record, write_records
from malpyeong.errors import InputError
from malpyeong.files import write_text
from malpyeong.samples import DATA
from malpyeong.terminal import Command
from tools.samples.contest_like import build_records
from tools.samples.items import Item, attach, draw_words, fill, load_items, load_rules, load_specials

SPLITS = ("train", "explore", "dev", "test", "unseen")
UNSEEN_EVERY = 9
UNSEEN_FRAMES = 1
# Of the frames that are kept out of training.
SHARES = {"explore": 0.4, "dev": 0.2, "test": 0.4}
FILLS_OF_A_SPECIAL = {"train": 6, "explore": 1, "dev": 1, "test": 1}

CHOOSE = "가운데 올바른 것을 선택하고, 그 이유를 설명하세요."
CORRECT = "다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요."
OTHER_CORRECT = (
    "다음 문장에서 틀린 표현을 찾아 바르게 고치고, 그 이유를 설명하세요.",
    "다음 문장을 어문 규범에 맞게 고쳐 쓰고, 그 이유를 설명하세요.",
    "다음 문장의 잘못된 표기를 찾아 고치고, 그 이유를 설명하세요.",
)
WHICH_LINE = "다음 중 어문 규범에 맞는 문장을 선택하고, 그 이유를 설명하세요."

# How a reason ends; {r} is the right form in quotes, {w} the wrong one, (…) a particle after it.
CONCLUSIONS = (
    "따라서 {r}(으로) 적는 것이 옳다.",
    "따라서 {w}(이) 아니라 {r}(으로) 적어야 한다.",
    "그러므로 {r}(이) 옳다.",
    "그러므로 {w}(은) 잘못된 표기이고 {r}(이) 바른 표기이다.",
    "따라서 {w}(을) {r}(으로) 고쳐야 한다.",
    "그래서 {w}(이라고) 쓰지 않고 {r}(이라고) 쓴다.",
)
JOINERS = ("혹은", "또는")  # of two right sentences
_PARTICLE = re.compile(r"\{([rw])\}\(([가-힣]+)\)")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A record with what it was made from."""

    record: Record
    item: str
    rule: str
    category: str


def build_splits() -> dict[str, list[Labelled]]:
    """Return the splits; ids are strings of integers, unique over all of them."""
    splits: dict[str, list[Labelled]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    for item, split, frame in split_frames():
        rng = random.Random(f"malpyeong {item.id} {frame}")
        _add(splits[split], seen, _records_of_frame(item, frame, rng), item.id, item.rule)
    for special in load_specials():
        rng = random.Random(f"malpyeong {special['id']}")
        for split, fills in FILLS_OF_A_SPECIAL.items():
            made = (_special_record(special, draw_words(rng)) for _ in range(100))
            fresh = (record for record in made if record.question not in seen)
            for _ in range(fills):
                _add(splits[split], seen, iter([next(fresh)]), special["id"], special["rule"])
    next_id = 1
    for name in SPLITS:
        random.Random(f"malpyeong {name}").shuffle(splits[name])
        for place, entry in enumerate(splits[name]):
            splits[name][place] = replace(entry, record=replace(entry.record, id=str(next_id)))
            next_id += 1
    return splits


def split_frames() -> list[tuple[Item, str, str]]:
    """Return (item, split, frame) for every sentence frame that is used."""
    frames = []
    for number, item in enumerate(load_items()):
        rng = random.Random(f"malpyeong {item.id}")
        held_out = rng.randrange(len(item.sentences))
        held_out_split = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if number % UNSEEN_EVERY == UNSEEN_EVERY // 2:
            frames += [(item, "unseen", frame) for frame in item.sentences[:UNSEEN_FRAMES]]
        else:
            frames += [
                (item, held_out_split if index == held_out else "train", frame)
                for index, frame in enumerate(item.sentences)
            ]
            if not item.explore:
                raise InputError(f'item bank: "{item.id}" has no explore sentence, which every trained item needs')
            frames.append((item, "explore", item.explore))
    # A sentence that two items share must not be asked in training about one and held out for the other.
    first: dict[str, str] = {}
    for name in SPLITS:
        for _, split, frame in frames:
            if split == name:
                first.setdefault(frame, name)
    return [(item, split, frame) for item, split, frame in frames if first[frame] == split]


def _add(split: list[Labelled], seen: set[str], records: Iterator[Record], item: str, rule: str) -> None:
    category = next(entry["category"] for entry in load_rules() if entry["id"] == rule)
    for record in records:
        if record.question not in seen:
            seen.add(record.question)
            split.append(Labelled(record, item, rule, category))


def _records_of_frame(item: Item, frame: str, rng: random.Random) -> Iterator[Record]:
    """Yield a 선택형 and a 교정형 question of one frame, each with its own words in the slots."""
    for kind in ("선택형", "교정형"):
        sentence = fill(frame, draw_words(rng))
        question = _choice(item, sentence, rng) if kind == "선택형" else _correction(item, sentence, rng)
        if item.only not in ("", kind):
            continue
        right = [form for form in (item.right, item.also_right) if form]
        sentences = tuple(sentence.replace("[]", form) for form in right)
        reason = f"{item.reason} {conclusion(item, sentences[-1], rng)}"
        yield Record("", kind, question, write_answer(sentences, reason, rng.choice(JOINERS)))


def _choice(item: Item, sentence: str, rng: random.Random) -> str:
    options = [form for form in (item.right, item.wrong, item.wrong2, item.also_right) if form]
    rng.shuffle(options)
    roll = rng.random()
    if roll < 0.03 and not item.also_right:  # stray spaces, as in the contest
        options = [rng.choice((f" {option}", f"{option} ", option)) for option in options]
    if 0.03 <= roll < 0.07 or item.also_right:  # braces have one right alternative
        lines = "\n".join(f'"{sentence.replace("[]", option)}"' for option in options)
        return f"{WHICH_LINE}\n{lines}"
    return f'"{sentence.replace("[]", "{" + "/".join(options) + "}")}" {CHOOSE}'


def _correction(item: Item, sentence: str, rng: random.Random) -> str:
    wrong = sentence.replace("[]", rng.choice([form for form in (item.wrong, item.wrong2) if form]))
    roll = rng.random()
    ask = rng.choice(OTHER_CORRECT) if roll < 0.06 else CORRECT
    if 0.06 <= roll < 0.10:
        return f"{ask}\n{rng.choice('―ㅡ')} {wrong}"
    return f'{ask}\n"{wrong}"'


def conclusion(item: Item, sentence: str, rng: random.Random) -> str:
    """Return how the reason of an item ends, naming the right form; ``sentence`` is the one called right."""
    while True:
        drawn = named(item, rng.choice(CONCLUSIONS))
        if fits(sentence, drawn):
            return drawn


def named(item: Item, form: str) -> str:
    """Return one of :data:`CONCLUSIONS` with the item's forms in it."""

    def name(match: re.Match[str]) -> str:
        form = item.right if match[1] == "r" else item.wrong
        quote = '"' if "'" in form else "'"
        word = attach(form, match[2])
        # The particle belongs after the closing quote.
        return f"{quote}{form}{quote}{word[len(form) :]}"

    return _PARTICLE.sub(name, form)


def fits(sentence: str, conclusion: str) -> bool:
    """Return whether the contest splits an answer with this sentence and conclusion where it should.

    After a verdict with 이 it would split at a later 가 옳다.
    """
    return subject_particle(sentence) == "가" or "가 옳다" not in conclusion


def _special_record(special: dict[str, Any], words: dict[str, str]) -> Record:
    after = special["after"]
    right = tuple(fill(line, words) for line in ([after] if isinstance(after, str) else after))
    if "choice" in special:
        question = f'"{fill(special["choice"], words)}" {CHOOSE}'
    else:
        before = special["before"]
        lines = [fill(line, words) for line in ([before] if isinstance(before, str) else before)]
        question = "\n".join([special["ask"], *(f'"{line}"' for line in lines)])
    answer = write_answer(right, special["reason"], special.get("joiner", "혹은"))
    return Record("", special["type"], question, answer)


def contest_like() -> list[Labelled]:
    """Return the stand-in for the contest's files; its ids follow those of the splits."""
    first = 1 + sum(map(len, build_splits().values()))
    category = {rule["id"]: rule["category"] for rule in load_rules()}
    return [
        Labelled(replace(record, id=str(id_)), f"contest-like-{id_}", rule, category[rule])
        for id_, (record, rule) in enumerate(build_records(), first)
    ]


def write_splits(folder: Path) -> None:
    """Write ``{split}.json``, the questions alone of test and unseen, ``labels.json`` and ``rules.json``."""
    splits = build_splits() | {"contest_like": contest_like()}
    for name, entries in splits.items():
        write_records(folder / f"{name}.json", [entry.record for entry in entries])
    for name in ("test", "unseen"):
        questions = [replace(entry.record, answer=None) for entry in splits[name]]
        write_records(folder / f"{name}_questions.json", questions)
    labels = {
        entry.record.id: {"split": name, "item": entry.item, "rule": entry.rule, "category": entry.category}
        for name, entries in splits.items()
        for entry in entries
    }
    lines = ",\n".join(f"  {json.dumps(id_)}: {json.dumps(label, ensure_ascii=False)}" for id_, label in labels.items())
    write_text(folder / "labels.json", f"{{\n{lines}\n}}\n")
    write_text(folder / "rules.json", json.dumps(load_rules(), ensure_ascii=False, indent=2) + "\n")


@click.command(cls=Command)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=DATA, help="Folder to write to.")
def main(output: Path) -> None:
    """Build the sample data from the item bank."""
    write_splits(output)
    for name, entries in (build_splits() | {"contest_like": contest_like()}).items():
        click.echo(f"{name}: {len(entries)} records, {len({entry.item for entry in entries})} items")


if __name__ == "__main__":
    main()
