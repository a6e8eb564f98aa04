"""A prediction is repeated from its manifest, from another place too; what has changed is named."""

import json
import shutil

import pytest
from click.testing import CliRunner

from malpyeong import predict, reproduce
from malpyeong.contest.records import load_records, write_records
from malpyeong.samples import DATA, TINY_BASE

ASKED = load_records(DATA / "test_questions.json")[:3]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a model, questions and a prediction."""
    folder = tmp_path_factory.mktemp("처음 자리")
    shutil.copytree(TINY_BASE, folder / "모델")
    (folder / "자료").mkdir()
    write_records(folder / "자료" / "질문.json", ASKED)
    inputs = [str(folder / "모델"), str(folder / "자료" / "질문.json"), "-o", str(folder / "결과" / "답.json")]
    words = ["--max-new-tokens", "64", "--samples", "2", "--batch-size", "4", "--dtype", "float32"]
    result = CliRunner().invoke(predict.main, [*inputs, *words])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def moved(original, tmp_path):
    """The same in another place."""
    return shutil.copytree(original, tmp_path / "다른 자리")


def again(run, *words):
    return CliRunner().invoke(reproduce.main, [str(run), *map(str, words)])


def edit(folder, section, **values):
    path = folder / "결과" / "답.manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest[section] |= values
    path.write_text(json.dumps(manifest), "utf-8")


def test_the_same_elsewhere(moved):
    manifest = json.loads((moved / "결과" / "답.manifest.json").read_text("utf-8"))
    assert {"torch", "llguidance", "git", "threads"} <= manifest["environment"].keys()
    assert manifest["options"]["questions"] == "../자료/질문.json"
    edit(moved, "environment", torch="0.1")
    result = again(moved / "결과")
    assert result.exit_code == 0, result.output
    assert "torch 0.1 →" in result.stdout
    assert {path.name for path in (moved / "결과").iterdir()} == {"답.json", "답.manifest.json"}


def test_an_input_that_has_moved_is_named(moved):
    questions = (moved / "자료" / "질문.json").rename(moved / "질문.json")
    result = again(moved / "결과" / "답.json")
    assert result.exit_code == 2
    assert "--input questions=" in result.stderr
    kept = moved / "다시.json"
    result = again(moved / "결과" / "답.manifest.json", "--input", f"questions={questions}", "-o", kept)
    assert result.exit_code == 0, result.output
    assert kept.read_bytes() == (moved / "결과" / "답.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("모델/model.safetensors", ["model: model.safetensors"]),
        ("모델/chat_template.jinja", ["model: chat_template.jinja", "chat_template "]),
        ("자료/질문.json", ["questions "]),
    ],
)
def test_an_input_that_has_changed_is_named(moved, file, named):
    data = bytearray((moved / file).read_bytes())
    data[-2 if file.endswith("safetensors") else 0] ^= 1
    if file.endswith("json"):
        data = (moved / file).read_bytes().replace(ASKED[1].id.encode(), b"other")
    (moved / file).write_bytes(data)
    result = again(moved / "결과" / "답.json")
    assert result.exit_code == 1, result.output
    assert len(result.stderr.splitlines()) == 1
    assert all(name in result.stderr for name in named)


def test_another_option_is_found_in_the_answers(moved):
    edit(moved, "options", decoding_name="free", samples=1)
    result = again(moved / "결과" / "답.json")
    assert result.exit_code == 1, result.output
    assert f'id "{ASKED[0].id}", character ' in result.stderr
    assert "is not what" not in result.stderr


def test_an_edited_answer_is_found(moved):
    path = moved / "결과" / "답.json"
    records = load_records(path, "prediction")
    answer = records[1].answer
    write_records(path, [records[0], records[1].with_answer(f"{answer[:5]}☆{answer[6:]}"), records[2]])
    result = again(path)
    assert result.exit_code == 1, result.output
    assert f'id "{records[1].id}", character 6' in result.stderr
    assert "is not what the prediction wrote" in result.stderr
    path.unlink()  # its digest is enough
    assert again(moved / "결과").exit_code == 0


def test_what_cannot_be_repeated_is_one_line(moved, tmp_path):
    results = moved / "결과"
    manifest = (results / "답.manifest.json").read_text("utf-8")

    def refused(run, *words):
        result = again(run, *words)
        assert result.exit_code == 2, result.output
        return result.stderr.splitlines()[-1]

    assert "nothing.manifest.json" in refused(tmp_path / "nothing.json")
    assert str(tmp_path) in refused(tmp_path)
    assert "--input file" in refused(results, "--input", "file=x")
    assert "would overwrite" in refused(results, "-o", results / "답.json")
    for text in ("{", "[1]", '{"sha256": {}}', "[" * 100_000):
        (results / "답.manifest.json").write_text(text)
        assert "답.manifest.json: is damaged" in refused(results)
    (results / "답.manifest.json").write_text(manifest)
    edit(moved, "options", batch_size=0)
    assert "--batch-size" in refused(results)
    edit(moved, "options", batch_size=4, novelty=1)
    assert "novelty" in refused(results)
    shutil.copy(results / "답.manifest.json", results / "둘.manifest.json")
    assert "holds 2 predictions" in refused(results)
    (results / "답.manifest.json").unlink()
    assert "has no 답.manifest.json" in refused(results / "답.json")
