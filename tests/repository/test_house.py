"""The limits of the house: size of classes and functions, imports one way, the way of a candidate. `make house` prints them."""

from __future__ import annotations

import house
import pytest

CLASSES, FUNCTIONS = house.all_definitions()


def too_large(found, size, limit):
    return {one.where: size(one) for one in found if size(one) > limit}


@pytest.mark.parametrize(
    ("found", "size", "limit"),
    [
        pytest.param(CLASSES, lambda one: one.lines, 200, id="lines of a class"),
        pytest.param(CLASSES, lambda one: one.width, 15, id="fields of a class"),
        pytest.param(FUNCTIONS, lambda one: one.lines, 60, id="lines of a function"),
        pytest.param(FUNCTIONS, lambda one: one.width, 8, id="parameters of a function"),
    ],
)
def test_nothing_grows_over_its_limit(found, size, limit):
    assert too_large(found, size, limit) == {}


def test_no_import_cycle():
    assert house.cycles(house.module_graph()) == []


def test_no_import_goes_upward():
    assert house.upward(house.module_graph()) == []


def test_a_candidate_s_way_is_short():
    way = house.candidate_path()
    assert way[0][1] == "run"
    assert any(name == "fsour_attempt" for _, name in way)
    assert len(way) < 20


def test_the_counts_see_what_they_should(tmp_path, monkeypatch):
    """The checks above pass for a reader that sees nothing; this one does not."""
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "sample.py"
    path.write_text(
        "class A:\n    x: int\n"
        "    def f(self, a, *b, c=1, **d):\n        self.x = self.y = a\n        def g(e):\n            pass\n"
        "\ndef h(a, /, b):\n    pass\n"
    )
    classes, functions = house.definitions(path)
    assert [(one.where, one.lines, one.width) for one in classes] == [("sample.py:A", 6, 2)]
    assert [(one.where, one.lines, one.width) for one in functions] == [
        ("sample.py:A.f", 4, 4),
        ("sample.py:A.f.g", 2, 1),
        ("sample.py:h", 2, 2),
    ]


def test_cycles_and_upward_imports_are_found():
    graph = {"plan": {"table"}, "table": {"search.rosais"}, "search.rosais": {"plan"}, "report.page": {"errors"}, "errors": set()}
    assert house.cycles(graph) == [["plan", "search.rosais", "table"]]
    assert house.upward(graph) == ["table -> search.rosais"]
