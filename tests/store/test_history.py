"""The history of a store says where a rollback leads."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.errors import BundleError
from twotower.store.folder import FolderPlace
from twotower.store.history import current_ids, new_line, previous_id
from twotower.store.manifest import RecallCheck


@pytest.mark.parametrize(
    ("path", "existing", "previous"),
    [
        ("", "abc", None),
        ("a", "abc", None),
        ("abc", "abc", "b"),
        ("abcb", "abc", "a"),  # from c back to b: c is not returned to
        ("abcbd", "abcd", "b"),
        ("abcc", "abc", "b"),
        ("abc", "ac", "a"),
        ("abc", "c", None),
    ],
)
def test_the_previous_bundle_is_the_one_before_without_those_rolled_back_from(
    path: str, existing: str, previous: str | None
) -> None:
    assert previous_id(list(path), list(existing)) == previous


def test_lines_are_added_at_the_end_and_say_which_bundles_became_current(tmp_path: Path) -> None:
    history = FolderPlace(tmp_path)
    assert history.lines() == []
    check = RecallCheck(recall=0.9, threshold=0.8, k=10, queries=5)
    history.log(new_line("publish", "a", "", "first", check, forced=True))
    history.log(new_line("refused", "", "a", "recall"))
    history.log(new_line("gc", "a", "b", "keep 2"))
    history.log(new_line("recover", "b", "a", "died"))
    assert [line["reason"] for line in history.lines()] == ["first", "recall", "keep 2", "died"]
    assert history.lines()[0]["recall_check"] == check.model_dump()
    assert history.lines()[1]["recall_check"] is None
    assert current_ids(history.lines()) == ["a", "b"]


def test_a_history_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "HISTORY.jsonl").mkdir()
    with pytest.raises(BundleError, match="HISTORY.jsonl: cannot be read") as caught:
        FolderPlace(tmp_path).lines()
    assert caught.value.reason == "unreadable"


def test_damaged_lines_are_skipped_and_named_and_a_last_line_may_lack_its_end(
    tmp_path: Path, messages: list[str]
) -> None:
    good = '{"action": "publish", "bundle": "a"}'
    damaged = [
        '{"bundle": "b"}', '{"action": "publish", "bundle": 5}', "[]", "7", '{"action": ["gc"], "bundle": "a"}', "{",
    ]  # fmt: skip
    (tmp_path / "HISTORY.jsonl").write_text("\n".join([good, "", *damaged, good]))
    history = FolderPlace(tmp_path)
    assert current_ids(history.lines()) == ["a", "a"]
    history.log(new_line("recover", "b", "a", ""))
    assert current_ids(history.lines()) == ["a", "a", "b"]
    named = {m for m in messages if "HISTORY.jsonl: skipped damaged lines 3, 4, 5, 6, 7 …; a rollback without" in m}
    assert len(named) == 1
