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
    ["evaluate", "submit", "predict", "export", "report", "doctor", "models.memory", "rules", "retrieval"],
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
