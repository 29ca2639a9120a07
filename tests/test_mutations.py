"""The list of mutations matches the code, so that experiments/mutations.py can run at any time."""

import ast
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("mutations", ROOT / "experiments/mutations.py")
assert spec is not None
assert spec.loader is not None
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_replaces_one_text_by_code_and_names_existing_tests(mutation, tmp_path):
    path = Path(mutations.PACKAGE) / mutation.file
    copy = tmp_path / path
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / path).read_text())
    before = mutation.apply(tmp_path)
    assert ast.dump(ast.parse(before)) != ast.dump(ast.parse(copy.read_text()))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test


def test_the_processes_of_the_tests_do_not_get_the_package_itself():
    # They import the script before they put the mutated copy first on the path.
    code = "import sys, mutations; sys.exit('vqvae_lightning' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "experiments", check=False)
    assert run.returncode == 0


def test_a_missing_text_is_an_error(tmp_path):
    gone = mutations.MUTATIONS[0]._replace(old="no such text")
    path = tmp_path / mutations.PACKAGE / gone.file
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="occurs 0 times"):
        gone.apply(tmp_path)


def test_at_least_sixty_mutations_have_unique_names():
    counted = Counter(mutation.name for mutation in mutations.MUTATIONS)
    assert max(counted.values()) == 1
    assert len(counted) >= 60
    assert sum(bool(mutation.survives) for mutation in mutations.MUTATIONS) <= 3


def test_the_page_counts_and_lists_what_became_of_each(tmp_path):
    first, second = mutations.MUTATIONS[:2]
    mutations.write_page(
        [
            mutations.Outcome(first, True, "caught", 100.0),
            mutations.Outcome(second, False, "survived: no reason", 80.0),
        ],
        "abcdef",
        tmp_path / "page.md",
    )
    text = (tmp_path / "page.md").read_text()
    assert "At commit abcdef," in text
    assert "1 of 2 mutations were caught and 1 survived, in 3 minutes" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    file = first.tests[0].partition("::")[0]
    assert rows[0] == f"| {first.name} | caught | `{file}` |"
    assert rows[1].startswith(f"| {second.name} | survived: no reason | `")
