from faults.scorecard import FAULTS, ROOT, count_tests, readme_with_table


def test_the_table_of_the_readme_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme_with_table(), "run python tests/faults/scorecard.py"


def test_most_faults_have_a_test_in_ci() -> None:
    tests = count_tests()
    assert sum(fast > 0 for fast, _ in tests.values()) > len(FAULTS) / 2
