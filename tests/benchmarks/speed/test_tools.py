"""The other tools at their best."""

from __future__ import annotations

from benchmarks.speed.tools import at_best, tool_label


def test_the_quickest_way_of_a_tool_is_its_row_and_the_shipped_one_beside_it() -> None:
    tried = {"torch-rechub": [5.0], "torch-rechub @ num_workers=1": [9.0, 8.0], "RecBole": [7.0], "RecBole @ x": []}
    label, other = (tool_label(name) for name in ("torch-rechub", "RecBole"))
    peers, settings = at_best(tried, more=True)
    assert peers == {label: [9.0, 8.0], f"{label}, as shipped": [5.0], other: [7.0]}
    assert settings == {label: "num_workers=1"}
    peers, settings = at_best(tried, more=False)
    assert peers[label] == [5.0]
    assert settings == {label: "as shipped"}
