"""Contest files: what is loaded comes back unchanged, and every defect is one clear line and exit code 2."""

import json
import os
import shlex
import stat
import unicodedata

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.errors import InputError
from malpyeong.evaluate import main as evaluate_main
from malpyeong.submit import main as submit_main


def record(id_="1", kind="선택형", question="질문", answer='"가."가 옳다. 이유다.', **changes):
    body = {"id": id_, "input": {"question_type": kind, "question": question}, "output": {"answer": answer}}
    return {**body, **changes}


def as_json(*records):
    return json.dumps(list(records), ensure_ascii=False).encode()


GOOD = record()
DEEP = b"[" * 100_000

# content of the file, what the message must name
BROKEN = {
    "empty": (b"", "is empty"),
    "white space only": (b" \n\t", "is empty"),
    "byte order mark only": (b"\xef\xbb\xbf", "is empty"),
    "cut off": (as_json(GOOD)[:-3], "line 1, column"),
    "cut off within a character": (as_json(GOOD)[:-13], "is the file cut off?"),
    "trailing comma": (b'[{"id": "1",}]', "line 1, column"),
    "not JSON": (b"id,question\n1,what", "not valid JSON"),
    "JSONL line cut off": (as_json(GOOD)[1:-1] + b'\n{"id": "2", "inp', "line 2: not valid JSON"),
    "nested too deeply": (DEEP, "nested too deeply"),
    "huge integer": (b'[{"id": ' + b"1" * 5000 + b"}]", "not valid JSON"),
    "CP949": (json.dumps([GOOD], ensure_ascii=False).encode("cp949"), "not UTF-8"),
    "UTF-16": (json.dumps([GOOD]).encode("utf-16"), "UTF-16"),
    "zip or docx": (b"PK\x03\x04....", "zip"),
    "gzip": (b"\x1f\x8b....", "gzip"),
    "empty list": (b"[]", "empty list"),
    "wrapped in an object": (b'{"data": []}', 'no "id" (its keys: data)'),
    "one indented object": (json.dumps({"data": [GOOD]}, indent=2).encode(), "top level is one object"),
    "record is a string": (b'["1"]', "record 1: is a string"),
    "record is null": (b"[null]", "record 1: is null"),
    "JSONL of numbers": (b"1\n2\n", "line 1: is a number"),
    "no id": (as_json({"input": {}}), 'has no "id"'),
    "id is a number": (as_json(record(id_=1)), 'write it as a string, like "id": "1"'),
    "id is true": (as_json(record(id_=True)), '"id" is true/false'),
    "id is empty": (as_json(record(id_=" ")), '"id" is empty'),
    "id twice": (as_json(GOOD, record(id_="2"), GOOD), 'id "1" is already used by record 1'),
    "key twice": (b'[{"id": "1", "id": "2"}]', 'the key "id" stands twice'),
    "no input": (as_json({"id": "7"}), 'record 1 (id "7"): "input" is missing'),
    "input is a list": (as_json(record(input=[])), '"input" is a list'),
    "no question_type": (as_json(record(input={"question": "질문"})), '"input.question_type" is missing'),
    "unknown question_type": (as_json(record(kind="논술형")), 'is "논술형"; expected 선택형 or 교정형'),
    "no question": (as_json(record(input={"question_type": "선택형"})), '"input.question" is missing'),
    "question is null": (as_json(record(question=None)), '"input.question" is null'),
    "question is empty": (as_json(record(question="  ")), "input.question is empty"),
    "no output": (as_json({k: v for k, v in GOOD.items() if k != "output"}), '"output" is missing'),
    "output is a string": (as_json(record(output="답")), '"output" is a string'),
    "no answer": (as_json(record(output={})), '"output.answer" is missing'),
    "answer is a list": (as_json(record(answer=["가"])), '"output.answer" is a list'),
    "answer is NaN": (b'[{"id": "1", "input": {"question_type": "\xec\x84\xa0\xed\x83\x9d\xed\x98\x95",'
                      b' "question": "q"}, "output": {"answer": NaN}}]', "NaN or infinity"),
    "gold answer is empty": (as_json(record(answer=" ")), "output.answer is empty"),
    "half a surrogate pair": (b'[{"id": "1\\ud800", "input": {}}]', "surrogate"),
    "half a surrogate pair in a field that is not ours": (
        as_json(record()).replace(b'{"id"', b'{"note": "\\ud800", "id"'), "half a surrogate pair",
    ),
    "NaN in a field that is not ours": (as_json(record()).replace(b'{"id"', b'{"note": NaN, "id"'), "NaN"),
    "NUL in an answer": (as_json(record(answer="가\0")), "NUL"),
    "ten megabytes of answer": (as_json(record(answer="가" * 3_500_000)), "has 3,500,000 characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line_and_exit_code_2(case, tmp_path):
    content, message = BROKEN[case]
    bad, good = tmp_path / "고장 난 파일.json", tmp_path / "good.json"
    bad.write_bytes(content)
    good.write_bytes(as_json(GOOD))
    result = CliRunner().invoke(evaluate_main, [str(bad), str(good)])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert str(bad) in result.stderr
    assert message in result.stderr


def nfd(text):
    return unicodedata.normalize("NFD", text)


IN_PIECES = {
    "question_type": record(kind=nfd("선택형")),
    "question": record(question=nfd("할 수 있다에 대해 설명하세요.")),
    "answer": record(answer=nfd('"할 수 있다."가 옳다. 의존 명사는 띄어 쓴다.')),
}


@pytest.mark.parametrize("field", IN_PIECES)
def test_text_in_pieces_is_named_and_put_together(field, tmp_path, run_module):
    path, whole = tmp_path / "mac.json", tmp_path / "whole.json"
    path.write_bytes(as_json(GOOD, IN_PIECES[field] | {"id": "2"}))
    with pytest.raises(InputError, match=rf'id "2".*\.{field} is in decomposed form \(NFD.*malpyeong\.nfd'):
        load_records(path, answers="gold")
    result = run_module("-m", "malpyeong.nfd", path, "-o", whole)
    assert result.returncode == 0, result.stderr
    assert [one.answer is not None for one in load_records(whole, answers="gold")] == [True, True]


@pytest.mark.parametrize("escaped", [False, True])
def test_only_modern_syllables_change(escaped, tmp_path, run_module):
    kept = "'ㄹ'과 ᄅ, ᄒᆞᆫ글, ᄀᆞᄅᆞᆷ, ᄡᅳᆯ, 가ᇫ, 樂 é \\u1112 [ʃ]\t"
    text = '"낙원에 살다."가 옳다. ' + kept
    item = record(question=kept + "한글", answer=nfd('"낙원에 살다."가 옳다. ') + kept)
    path = tmp_path / "mac.jsonl"
    path.write_text(json.dumps(item, ensure_ascii=escaped) + "\r\n", "utf-8", newline="")
    result = run_module("-m", "malpyeong.nfd", path, "-o", tmp_path / "whole.jsonl")
    assert ": 8 syllables put together" in result.stdout, result.stderr
    written = (tmp_path / "whole.jsonl").read_bytes().decode()
    assert json.loads(written) == record(question=kept + "한글", answer=text)
    if not escaped:
        assert written == json.dumps(record(question=kept + "한글", answer=text), ensure_ascii=False) + "\r\n"


def test_a_single_syllable_in_pieces_may_be_meant(tmp_path):
    question = f"첫소리와 가운뎃소리를 모아 쓴 {nfd('가')}에 대해 설명하세요."
    (tmp_path / "gold.json").write_bytes(as_json(record(question=question)))
    assert load_records(tmp_path / "gold.json")[0].question == question


def test_a_name_in_the_other_form_is_found(tmp_path, run_module):
    folder = tmp_path / nfd("대회 자료")
    folder.mkdir()
    (folder / nfd("훈련.json")).write_bytes(as_json(GOOD))
    path = tmp_path / "대회 자료" / "훈련.json"
    with pytest.raises(InputError, match=r"no such file; one of this name in decomposed form.*malpyeong\.nfd") as error:
        load_records(path)
    command = shlex.split(str(error.value).split("is there: ")[1].split(" writes it")[0])
    assert command[0] == "python"
    assert run_module(*command[1:]).returncode == 0
    assert len(load_records(path)) == 1


@pytest.mark.parametrize("place", ["missing.json", ""])
def test_a_path_that_is_no_file(place, tmp_path):
    with pytest.raises(InputError, match=r"no such file|is a folder"):
        load_records(tmp_path / place)


# predictions against a gold file of ids 1, 2, 3
MISMATCHED = {
    "a record is missing": (["1", "3"], 'missing, first id "2"'),
    "another split": (["1", "2", "3", "4"], 'first id "4"'),
    "another order": (["1", "3", "2"], 'record 2 has id "3"'),
}


@pytest.mark.parametrize("case", MISMATCHED)
@pytest.mark.parametrize("command", ["evaluate", "submit"])
def test_predictions_must_hold_the_same_ids_in_the_same_order(case, command, tmp_path):
    ids, message = MISMATCHED[case]
    gold, prediction, output = tmp_path / "gold.json", tmp_path / "pred.jsonl", tmp_path / "out.json"
    gold.write_bytes(as_json(*(record(id_=id_) for id_ in "123")))
    prediction.write_bytes(b"\n".join(as_json(record(id_=id_))[1:-1] for id_ in ids))
    if command == "evaluate":
        result = CliRunner().invoke(evaluate_main, [str(gold), str(prediction)])
    else:
        result = CliRunner().invoke(submit_main, [str(gold), str(prediction), "-o", str(output)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not output.exists()


TEXT = st.text(alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=40)


@given(
    st.lists(
        st.tuples(st.sampled_from(["선택형", "교정형"]), TEXT.filter(str.strip), st.none() | TEXT),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([".json", ".jsonl"]),
)
def test_what_is_written_is_loaded_again(tmp_path_factory, rows, suffix):
    records = [Record(str(number), *row) for number, row in enumerate(rows)]
    path = tmp_path_factory.mktemp("records") / f"기록{suffix}"
    write_records(path, records)
    assert load_records(path) == records


def test_unknown_fields_are_kept(tmp_path):
    path = tmp_path / "in.json"
    path.write_bytes(as_json(record(source="시험", input={"question_type": "선택형", "question": "질문", "hint": 1})))
    (loaded,) = load_records(path)
    write_records(tmp_path / "out.json", [loaded.with_answer("새 답")])
    (written,) = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert written == {
        "id": "1",
        "source": "시험",
        "input": {"question_type": "선택형", "question": "질문", "hint": 1},
        "output": {"answer": "새 답"},
    }


def test_text_is_never_normalised(tmp_path):
    text = "ㄹ ㆍ \u1112\u1161\u11ab e\u0301 \u00a0“가”\u3000"
    write_records(tmp_path / "a.json", [Record("1", "교정형", text, text)])
    (loaded,) = load_records(tmp_path / "a.json")
    assert (loaded.question, loaded.answer) == (text, text)


def test_bom_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + as_json(GOOD)[1:-1] + b"\r\n\r\n" + as_json(record(id_="2"))[1:-1] + b"\r\n")
    assert [loaded.id for loaded in load_records(path)] == ["1", "2"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.json"
    write_records(path, [Record("1", "선택형", "질문", "답")])
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_records(path, [Record("1", "선택형", "\ud800", "답")])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, run_module):
    gold = tmp_path / "gold.json"
    gold.write_bytes(as_json(GOOD))
    (tmp_path / "a file").write_text("")
    result = run_module("-m", "malpyeong.submit", gold, gold, "-o", tmp_path / "a file" / "out.json")
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr


def test_written_files_can_be_read_by_others(tmp_path):
    write_records(tmp_path / "a.json", [Record("1", "선택형", "질문", "답")])
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask
