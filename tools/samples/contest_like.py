"""The stand-in for the contest's files: invented questions with the statistics of the real ones.

``bank/contest_like.yaml`` holds the questions, with a short notation for what is right in each;
:mod:`tools.samples.build` makes ``data/contest_like.json`` from it. The particle of an answer is decided here and
not by the package, which is measured against it.
"""

import random
import re
from typing import Any

import yaml

from malpyeong.contest.particles import has_final_consonant
from malpyeong.contest.records import Record
from tools.samples import BANK
from tools.samples.items import attach

_CHOOSE = '"%s" 가운데 올바른 것을 선택하고, 그 이유를 설명하세요.'
_CORRECT = "다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요."

_GROUP = re.compile(r"\{([^{}]*\*[^{}]*)\}")
_CHANGE = re.compile(r"<(?P<wrong>[^<>→]*)→(?P<right>[^<>→]*)>")
_CLOSED_SENTENCE = re.compile(r"(?P<letter>[가-힣])[.?][\"'”’)\]」』]*\Z")


def build_records() -> list[tuple[Record, str]]:
    """Return the questions with their answers, and the id of each one's rule; ids are left empty."""
    bank: dict[str, Any] = yaml.safe_load((BANK / "contest_like.yaml").read_text("utf-8"))
    made = []
    for group in bank["groups"]:
        for number, item in enumerate(group["items"]):
            why = group["why"][item.get("why", number % len(group["why"]))]
            if "more" in group and number % 5 == 1:
                item = {**item, "r": f"{item['r']} {group['more']}"}
            made.append((_record(item, why, bank["asks"]), item.get("rule", group["rule"])))
    random.Random("contest-like").shuffle(made)
    return made


def _record(item: dict[str, Any], why: str, asks: dict[str, str]) -> Record:
    kind = item.get("type", "선택형" if "c" in item else "교정형")
    if "c" in item:
        question = _CHOOSE % _GROUP.sub(_shuffled, item["c"])
        right = _GROUP.sub(lambda group: _right_option(group[1]), item["c"])
        form = _right_option(_GROUP.findall(item["c"])[0])
    elif "f" in item:
        ask = item.get("ask", _CORRECT)
        wrong = _CHANGE.sub(lambda change: change["wrong"], item["f"])
        ask, dash = asks.get(ask, ask), item.get("dash")
        shown = f"{dash} {wrong}" if dash else f'"{wrong}"'
        question = ask % wrong if "%s" in ask else f"{ask}\n{shown}"
        right = _CHANGE.sub(lambda change: change["right"], item["f"])
        form = next((change["right"] for change in _CHANGE.finditer(item["f"])), "")
    else:
        lines = [line.removeprefix("*") for line in item["lines"]]
        dash = item.get("dash")
        shown = "\n".join(f"{dash} {line}" if dash else f'"{line}"' for line in lines)
        question = f"{asks[item.get('ask', 'lines')]}\n{shown}"
        right = next(line[1:] for line in item["lines"] if line.startswith("*"))
        form = item.get("at", "")
    gold = item.get("gold", right)
    space = item.get("space", " ")
    sentences = [gold] if isinstance(gold, str) else gold
    quoted = f"{space}{item.get('joiner')}{space}".join(f'"{sentence}"' for sentence in sentences)
    head = item.get("head", f"{quoted}{_particle(sentences[-1])} 옳다.")
    named = f"'{form}'"
    reason = item["r"].replace("§", why)
    reason = reason.replace("@", f"{attach(named, '이')} 옳다.").replace("^", f"{attach(named, '으로')} 적는다.")
    return Record("", kind, question, f"{head} {reason}")


def _shuffled(group: re.Match[str]) -> str:
    """Return the options of a group, the right one first in three of five, as in the contest's files."""
    options = group[1].split("/")
    rng = random.Random(group[1])
    rng.shuffle(options)
    options.sort(key=lambda option: "*" in option, reverse=rng.random() < 0.6)
    return f"{{{'/'.join(options).replace('*', '')}}}"


def _right_option(group: str) -> str:
    return next(option.strip().removeprefix("*") for option in group.split("/") if "*" in option)


def _particle(sentence: str) -> str:
    """Return the particle of the contest's answers: 이 only after a final consonant that a full stop or ? follows."""
    closed = _CLOSED_SENTENCE.search(sentence)
    return "이" if closed and has_final_consonant(closed["letter"]) else "가"
