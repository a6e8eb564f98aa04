"""Files that are not what their names say: how many records, which, and training without them."""

from dataclasses import replace

import pytest

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.contest.leaks import answer_problems, ids, shared_questions
from malpyeong.contest.records import load_records, write_records
from malpyeong.errors import InputError
from malpyeong.samples import DATA
from malpyeong.training.data import load_train
from malpyeong.training.preflight import check, examine

RECORDS = sorted(load_records(DATA / "train.json", answers="gold"), key=lambda record: len(record.question))[:40]


def renamed(record):
    """The same question under another id, with other white space, and without an answer."""
    return replace(record, id=f"x{record.id}", question=f" {record.question} \n", answer=None)


@pytest.fixture
def folder(tmp_path):
    """Train holds 3 questions of dev and one of test, one question twice, and one answer out of form."""
    train, dev, test = RECORDS[:20], RECORDS[20:30], RECORDS[30:40]
    train = [*train, *dev[:3], test[0], replace(train[0], id="twice", answer=train[0].answer.replace(".", "요.", 1))]
    train[1] = train[1].with_answer("정답은 이것이다.")
    write_records(tmp_path / "train.json", train)
    write_records(tmp_path / "dev.json", [replace(record, id=f"x{record.id}") for record in dev])
    write_records(tmp_path / "test.json", [renamed(record) for record in test])
    return tmp_path


def files(folder, *splits):
    return [f"data.{split}={folder / f'{split}.json'}" for split in splits]


def test_questions_are_compared_without_white_space_and_id():
    assert shared_questions(RECORDS, [renamed(record) for record in RECORDS[3:5]]) == RECORDS[3:5]
    assert shared_questions(RECORDS[:3], RECORDS[3:]) == []
    assert ids(RECORDS[:2]) == f'id "{RECORDS[0].id}", "{RECORDS[1].id}"'
    assert ids(RECORDS).endswith(f'"{RECORDS[4].id}", …')


def test_answers_that_differ_or_are_out_of_form():
    first, second = RECORDS[:2]
    assert list(answer_problems([*RECORDS, replace(first, id="2"), renamed(first)])) == []
    different, odd = answer_problems([first, second, replace(second, id="2", answer=first.answer[:-1])])
    assert f'1 questions stand there with different answers (id "{second.id}", "2")' == different
    assert odd.startswith('1 answers are not in the contest\'s form (id "2"; the first: ')


def test_the_doctor_says_how_many_and_which(folder, run_module):
    result = run_module(
        "-m", "malpyeong.doctor", "recipes/tiny/sft.yaml", *files(folder, "train", "dev", "test"), "--quick"
    )
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    shown = ", ".join(f'"{record.id}"' for record in RECORDS[20:23])
    assert len(warnings) == 4
    assert (
        f"3 of 25 questions of data.train are in data.dev (id {shown}); leave them out with --drop-leaks" in warnings[0]
    )
    assert f'1 of 25 questions of data.train are in data.test (id "{RECORDS[30].id}")' in warnings[1]
    assert f'(id "{RECORDS[0].id}", "twice")' in warnings[2]
    assert f'1 answers are not in the contest\'s form (id "{RECORDS[1].id}";' in warnings[3]


def test_training_says_it_too_and_goes_on_without_the_questions_of_dev(folder, capsys):
    for name, kind in (("sft", SFTRecipe), ("grpo", GRPORecipe)):
        overrides = [*files(folder, "train", "dev"), "model.adapter=null"]
        recipe = load_recipe(f"recipes/tiny/{name}.yaml", overrides, kind)
        assert len(load_train(recipe.data)) == 25
        check(recipe, "hf")
        assert "leave them out with --drop-leaks" in capsys.readouterr().err

        recipe = load_recipe(f"recipes/tiny/{name}.yaml", [*overrides, "data.drop_leaks=true"], kind)
        assert [record.id for record in load_train(recipe.data)] == [
            *(record.id for record in RECORDS[:20]), RECORDS[30].id, "twice"
        ]  # fmt: skip
        check(recipe, "hf")
        assert "3 of 25 questions of data.train are in data.dev" in (said := capsys.readouterr().err)
        assert "and are left out" in said
        counted = next(
            one.text for one in examine(recipe, "hf") if "records, " in one.text or " questions; " in one.text
        )
        assert counted.startswith("32 records" if name == "sft" else "22 questions")


def test_the_flag_is_the_key(folder, run_module):
    output = folder / "run"
    result = run_module(
        *("recipes/sft.py", "recipes/tiny/sft.yaml", *files(folder, "train", "dev"), f"training.output={output}"),
        *("training.epochs=1", "training.batch_size=8", "training.warmup_steps=0", "--drop-leaks"),
    )
    assert result.returncode == 0, result.stderr
    assert "and are left out" in result.stderr
    assert "drop_leaks: true" in (output / "config.yaml").read_text("utf-8")


def test_what_cannot_be_dropped_is_one_line(folder, run_module):
    for stage in ("recipes/grpo.py", "recipes/hard_questions.py"):
        more = ("-o", folder / "hard.json") if "hard" in stage else ()
        result = run_module(stage, "recipes/tiny/grpo.yaml", *files(folder, "train"), "--drop-leaks", *more)
        assert result.returncode == 2
        assert "drop_leaks needs data.dev" in result.stderr
        assert "Traceback" not in result.stderr
    overrides = [f"data.train={folder / 'dev.json'}", f"data.dev={folder / 'dev.json'}", "data.drop_leaks=true"]
    with pytest.raises(InputError, match=r"dev\.json: every question is in"):
        load_train(load_recipe("recipes/tiny/sft.yaml", overrides, SFTRecipe).data)


def test_a_test_file_that_comes_later_does_not_stop_a_run_from_being_resumed(folder):
    from malpyeong.training.run import check_run, start_run

    recipe = load_recipe("recipes/tiny/sft.yaml", files(folder, "train", "dev"), SFTRecipe)
    start_run(folder / "run", recipe, [])
    later = load_recipe("recipes/tiny/sft.yaml", files(folder, "train", "dev", "test"), SFTRecipe)
    assert check_run(folder / "run", later, [], resume=True) is None
    dropping = later.model_copy(update={"data": later.data.model_copy(update={"drop_leaks": True})})
    with pytest.raises(InputError, match=r"data\.drop_leaks"):
        check_run(folder / "run", dropping, [], resume=True)
