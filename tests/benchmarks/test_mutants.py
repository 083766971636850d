"""Changes of code: which there are, that each is one, and what is said of the tests that run on it."""

import ast

import pytest

from benchmarks.robustness import mutants
from benchmarks.robustness.mutants import KILLED, SURVIVED, TIMEOUT, Mutant

SOURCE = '''"""Words 1 < 2."""
from x import y

@cached(3)
def larger(ä: int | None, b=0.5):
    if ä < b and not b == 1:
        raise ValueError(f"{ä + 1}")
    return max(ä, b), both(ä,  b)
'''


def test_changes_of_a_source():
    found = {(one.line, one.old, one.text) for one in mutants.mutants_of("x.py", SOURCE)}
    assert found == {
        (5, "0.5", "(0.5 * 2)"),
        (6, "<", "<="),
        (6, "and", "or"),
        (6, "not", ""),
        (6, "==", "!="),
        (6, "1", "2"),
        (6, "1", "0"),
        (8, "max", "min"),
        (8, "ä, b", "b, ä"),
        (8, "ä,  b", "b,  ä"),
    }
    for one in mutants.mutants_of("x.py", SOURCE):
        changed = mutants.mutated(SOURCE, one)
        assert ast.parse(changed) and changed != SOURCE
        lines = zip(changed.splitlines(), SOURCE.splitlines(), strict=True)
        assert [number for number, (new, old) in enumerate(lines, 1) if new != old] == [one.line]


def test_the_choice_is_that_of_its_seed_and_visits_every_file(tmp_path):
    files = mutants.code_files(mutants.ROOT)
    assert "kernels/topk.py" in files and not any("_triton" in file or "report" in file for file in files)
    for file in ("kernels/one.py", "methods/two.py", "utils/modeling/three.py", *mutants.FILES):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(SOURCE)
    first, again, other = (mutants.drawn(tmp_path, 8, seed=seed) for seed in (3, 3, 4))
    assert len({one.file for one in first[:5]}) == 5 and len(first) == 8
    assert first == again != other


def test_tests_of_a_file():
    assert mutants.tests_of(mutants.ROOT, "utils/modeling/memories.py") == ["tests/modeling/test_losses.py"]
    assert mutants.tests_of(mutants.ROOT, "utils/batches/part_images.py") == ["tests/methods/test_muva.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, result",
    [
        ("return a + b", (SURVIVED, "")),
        ("return a - b", (KILLED, "tests/test_sum.py::test_sum")),
        ("while True: pass", (TIMEOUT, "")),
        ("return a +", (KILLED, "tests/test_sum.py")),
    ],
)
def test_what_the_tests_say(tmp_path, code, result):
    (tmp_path / "tests").mkdir()
    (tmp_path / "kernels.py").write_text(f"def total(a, b):\n    {code}\n")
    text = "from kernels import total\n\ndef test_sum():\n    assert total(2, 3) == 5\n"
    (tmp_path / "tests" / "test_sum.py").write_text(text)
    exit_code, printed, _ = mutants.run_tests(tmp_path, ["tests/test_sum.py"], limit=3)
    assert (mutants.result_of(exit_code, printed)) == result


def test_a_change_that_python_cannot_read_is_left_out(tmp_path):
    (tmp_path / "x.py").write_text("f(*names)\n")
    assert not mutants.is_code(tmp_path, Mutant("x.py", 1, 2, 1, "*", "/"))
