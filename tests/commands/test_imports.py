"""Looking is quick: no torch for `import malpyeong`, --help and the scorer's commands."""

import pytest


@pytest.mark.parametrize(
    "code", ["import malpyeong", "import malpyeong.contest.answer, malpyeong.contest.records, malpyeong.metrics"]
)
def test_import_loads_no_torch(code, run_module):
    result = run_module("-c", f"{code}; import sys; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert result.stdout.split() == ["False", "False"], result.stderr


@pytest.mark.parametrize(
    "module",
    [
        *("evaluate", "submit", "predict", "reproduce", "export", "report", "doctor", "models.memory", "rules"),
        *("retrieval", "serve"),
    ],
)
def test_help_loads_no_torch(module, run_module):
    code = (
        f"import sys, runpy; sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('malpyeong.{module}', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    result = run_module("-c", code)
    assert result.stdout.startswith("Usage:")
    assert result.stdout.split()[-1] == "False"


def test_a_package_of_an_extra_that_is_missing_is_one_line(run_module, tmp_path):
    (tmp_path / "rules.pdf").write_bytes(b"%PDF-1.4")
    code = (
        "import sys, importlib.util as util; real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'pypdf' else real(name, *rest)\n"
        f"sys.argv = ['rules', 'build', {str(tmp_path / 'rules.pdf')!r}, '-o', {str(tmp_path / 'rules.json')!r}]\n"
        "from malpyeong.rules import main; main()"
    )
    result = run_module("-c", code)
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "[rules]" in result.stderr
