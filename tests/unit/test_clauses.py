import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations

import pytest

from blindtune.client.demo.clauses import Clause, split_clauses, write_clauses

LABELS = {
    "Assignment",
    "Confidentiality",
    "Governing Law",
    "Limitation of Liability",
    "Payment",
    "Termination",
}


@pytest.fixture(scope="module", params=[0, 7])
def clauses(request: pytest.FixtureRequest) -> list[Clause]:
    return write_clauses(request.param)


def test_classes_are_balanced(clauses: list[Clause]) -> None:
    assert Counter(clause.label for clause in clauses) == dict.fromkeys(LABELS, 40)


def test_texts_are_whole_sentences_of_varied_number(clauses: list[Clause]) -> None:
    for clause in clauses:
        assert not re.search(r"[\[\]{}|\n]|  | [,.]", clause.text)
        assert all(re.match(r"[A-Z].*\.$", part) for part in re.split(r"(?<=\.) ", clause.text))
    lengths = Counter(len(re.findall(r"\.(?: |$)", clause.text)) for clause in clauses)
    assert set(lengths) == {1, 2, 3, 4}


def test_no_two_clauses_differ_only_a_little(clauses: list[Clause]) -> None:
    # The word following "the" with a capital is a party or another defined term.
    bare = [re.sub(r"\b[Tt]he [A-Z]\w+|\d+", "_", clause.text) for clause in clauses]
    assert len(set(bare)) == len(clauses)
    for one, other in combinations(bare, 2):
        matcher = SequenceMatcher(None, one.split(), other.split(), autojunk=False)
        assert matcher.quick_ratio() < 0.85 or matcher.ratio() < 0.85, (one, other)


def test_seed_decides_the_clauses() -> None:
    assert write_clauses() == write_clauses(0) != write_clauses(1)


def test_split_is_stratified_and_leaves_nothing_out(clauses: list[Clause]) -> None:
    train, test = split_clauses(clauses)
    assert Counter(clause.label for clause in test) == dict.fromkeys(LABELS, 10)
    assert sorted(train + test) == sorted(clauses)
    assert not {clause.text for clause in train} & {clause.text for clause in test}


def test_split_follows_its_arguments(clauses: list[Clause]) -> None:
    assert split_clauses(clauses) == split_clauses(clauses, held_out=0.25, seed=0)
    assert split_clauses(clauses, seed=1) != split_clauses(clauses)
    train, test = split_clauses(clauses, held_out=0.5)
    assert len(train) == len(test) == 120
