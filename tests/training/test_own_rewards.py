"""Rewards of one's own: loaded, checked, called with plain texts, logged as the others."""

import pytest

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.errors import InputError
from malpyeong.training.rewards import RewardRun, load_functions

RECIPE = "recipes/tiny/grpo.yaml"
GOLD = '"낡은 우산을 챙겼다."가 옳다. 까닭은 이렇다.'


@pytest.fixture
def own(tmp_path):
    """Write a Python file and return (name of its reward, file)."""

    def write(source, function="shortness"):
        path = tmp_path / "내 보상" / "my_rewards.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, "utf-8")
        return f"{path}:{function}", str(path)

    return write


def call(name, file, completions=("가", [{"role": "assistant", "content": "가나"}])):
    run = RewardRun({name: 1.0}, 2, own=load_functions({name: file}))
    metrics = {}
    rewards = run.functions[0](
        completions=list(completions),
        reference=[GOLD, GOLD],
        record_id=["1", "1"],
        prompts=[[{"role": "user", "content": "질문"}]] * 2,
        trainer_state=None,
        log_metric=metrics.__setitem__,
    )
    return rewards, metrics, run.functions[0].__name__


def test_it_is_given_texts_and_logged_as_the_others(own):
    name, file = own(
        "def shortness(completions, reference, **_):\n    return [1 / len(text) for text in completions]\n"
    )
    rewards, metrics, label = call(name, file)
    assert rewards == [1.0, 0.5]
    assert metrics[f"group_std/{name}"] == pytest.approx(0.3536, abs=1e-4)
    assert metrics["dead_groups"] == 0
    assert label == "shortness"


def test_the_recipe_takes_it_in_a_file_and_on_the_command_line(own):
    name, file = own("def shortness(completions, **_): return [0.0 for _ in completions]\n")
    for override in (f"data.rewards={{{name}: 0.1, format: 1}}", f"data.rewards.{name}=0.1"):
        data = load_recipe(RECIPE, [override], GRPORecipe).data
        assert data.rewards[name] == 0.1
        assert data.own_rewards == {name: file}
    with pytest.raises(InputError, match="unknown reward; did you mean format"):
        load_recipe(RECIPE, ["data.rewards.formal=1"], GRPORecipe)


@pytest.mark.parametrize(
    ("source", "function", "says"),
    [
        ("def shortness(texts): return []\n", "shortness", "def shortness(completions, reference, **_)"),
        ("def shortness(completions): return []\n", "shortness", "unexpected keyword"),
        ("def other(completions, **_): return []\n", "shortness", "known: other"),
        ("shortness = 3\n", "shortness", "known: none"),
        ("def shortness(:\n", "shortness", "SyntaxError"),
        ("import not_there\n", "shortness", "No module named"),
    ],
)
def test_what_is_no_reward_is_refused_with_one_line(own, source, function, says):
    name, file = own(source, function)
    with pytest.raises(InputError) as error:
        load_functions({name: file})
    assert says in error.value.message
    assert "\n" not in error.value.message
    assert name in error.value.message


def test_a_file_that_is_not_there(tmp_path):
    file = str(tmp_path / "none.py")
    with pytest.raises(InputError, match="cannot be read"):
        load_functions({f"{file}:a": file})


@pytest.mark.parametrize("returned", ["[1.0]", "None", "[1.0, 'a']", "[1.0, float('nan')]", "1.0"])
def test_what_it_returns_is_checked(own, returned):
    name, file = own(f"def shortness(completions, **_): return {returned}\n")
    with pytest.raises(InputError, match="return a list with a finite number or None for each"):
        call(name, file)


def test_its_exception_is_raised(own):
    name, file = own("def shortness(completions, **_): raise ZeroDivisionError('내 실수')\n")
    with pytest.raises(ZeroDivisionError, match="내 실수"):
        call(name, file)
