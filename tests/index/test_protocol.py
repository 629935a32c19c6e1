"""Every kind of index does the same: each test runs over all of them, and a plain loop says what is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mykinds.indexes import Lsh
from vector_worlds import WIDTH, N, checked, in_order, naive, same, users, world

from twotower.arrays.sets import sorted_unique
from twotower.errors import ConfigError, DataError, RunError
from twotower.index import INDEXES, Index, Similarity, build_index, load_index, measure_recall, tune_index
from twotower.index.approximate import ApproximateIndex
from twotower.index.auto import Auto
from twotower.index.milvus.milvus import MilvusType, choose_milvus_type

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "milvus": [{"type": name} for name in get_args(MilvusType)],
    "exact": [{}, {"store": "int8"}],
}
"""Options of the kinds to be tested with others than their defaults."""
KINDS = {
    " ".join([kind.kind.rpartition(":")[2], *options.values()]): (kind, options)
    for kind in (*INDEXES, Lsh)
    for options in SETTINGS.get(kind.kind, [{}])
}
EXACT = ("auto", "exact", "exact int8", "milvus FLAT")
CASES = [(kind, metric) for kind in KINDS for metric in ("cosine", "dot")]
# Every type of Milvus and both metrics, but not every pair.
CASES = [case for case in CASES if case not in (("milvus FLAT", "dot"), ("milvus IVF_SQ8", "cosine"))]
each = pytest.mark.parametrize(("kind", "metric"), CASES)
each_approximate = pytest.mark.parametrize(("kind", "metric"), [c for c in CASES if c[0] not in EXACT])
URI = ""


@pytest.fixture(scope="module", autouse=True)
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """milvus-lite in this process, for all the tests."""
    global URI
    from milvus_lite.server_manager import server_manager_instance

    URI = str(tmp_path_factory.mktemp("milvus") / "milvus.db")
    yield
    server_manager_instance.release_server(URI)


def build(
    kind: str, vectors: np.ndarray, rows: np.ndarray, metric: Similarity, params: dict[str, Any] | None = None
) -> Index:
    """The index of a kind, in the server of this test if it needs one."""
    if kind not in KINDS:
        return build_index(kind, vectors, rows, metric, params)
    found, options = KINDS[kind]
    place = {"uri": URI, "prefix": "test"} if found.remote else {}
    return build_index(found.kind, vectors, rows, metric, options | place | (params or {}))


def made(kind: str, metric: str, n: int = N, seed: int = 0) -> tuple[Index, np.ndarray, np.ndarray]:
    vectors, rows = world(metric, n, seed)
    return build(kind, vectors, rows, checked(metric)), vectors, rows


def never_exact(index: Index) -> Index:
    """The index, which asks its engine also where few rows are allowed."""
    if isinstance(index, ApproximateIndex):
        index.exact_max_rows = 1
    return index


def ordered(kind: str) -> bool:
    """Whether equal scores are in the order of rows beyond the last place, too."""
    return kind in ("auto", "exact", "exact int8")


def full(index: Index) -> Index:
    """The index with every effort at its largest: then it must be right."""
    index.search_params |= index.search_limits()
    return index


# The same answers from all


@each
@pytest.mark.parametrize("k", [1, 7, 50, N, N + 30])
def test_the_best_k_as_a_loop_finds_them(kind: str, metric: str, k: int) -> None:
    index, vectors, rows = made(kind, metric)
    full(index)
    for queries in (users(1), users(5)):
        got = index.search(queries, np.int32(k))  # type: ignore[arg-type]  # as good as any integer
        in_order(*got)
        same(got, naive(vectors, rows, queries, k), ordered(kind))
        same(index.search(queries, k, exact=True), naive(vectors, rows, queries, k), True)


@each
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_allowed_and_banned_rows(kind: str, metric: str, share: float) -> None:
    index, vectors, rows = made(kind, metric)
    never_exact(full(index))
    rng, queries = np.random.default_rng(2), users(4)
    allowed = np.append(rng.permutation(rows)[: int(share * N)], [10**12, 10**12])
    banned = [np.append(rng.permutation(rows)[:n], [10**12]) for n in (0, 3, 300)] + [rows]
    for some, none in ((allowed, None), (None, banned), (allowed, banned)):
        got = index.search(queries, 20, allowed=some, banned=none)
        in_order(*got)
        same(got, naive(vectors, rows, queries, 20, some, none), ordered(kind))


@each_approximate
def test_little_effort_keeps_the_promises(kind: str, metric: str) -> None:
    """One probe and lists that are mostly banned: still never short, never banned, in order."""
    vectors, rows = world(metric)
    index = never_exact(build(kind, vectors[50:], rows[50:], checked(metric)))
    index.search_params = dict.fromkeys(index.search_params, 1)
    rng, queries = np.random.default_rng(3), users(6)
    for k in (1, 20, 100):
        for keep in (None, rows[: N // 2], rows[40:80]):
            banned = [rng.permutation(rows)[: 90 * n] for n in range(6)]
            found, scores = index.search(queries, k, allowed=keep, banned=banned)
            in_order(found, scores)
            for line, ban in zip(found, banned, strict=True):
                may = set((rows[50:] if keep is None else np.setdiff1d(keep, rows[:50])).tolist()) - set(ban.tolist())
                seen = line[line >= 0].tolist()
                assert len(seen) == min(k, len(may))
                assert set(seen) <= may


@each
def test_a_saved_index_gives_the_same(kind: str, metric: str, folder: Path) -> None:
    index, vectors, rows = made(kind, metric)
    full(index).save(folder)
    queries = users(4)
    again = load_index(folder, verify=metric == "dot")  # another process, for each kind once
    assert (again.options.params, again.metric, again.search_params) == (
        index.options.params,
        metric,
        index.search_params,
    )
    assert type(again) is type(index)
    assert type(again.options) is type(index.options)
    assert len(again) == N
    np.testing.assert_array_equal(again.rows, np.sort(rows))
    for got, wanted in zip(again.search(queries, 25), index.search(queries, 25), strict=True):
        np.testing.assert_array_equal(got, wanted)
    again.save(folder)  # onto the files that are mapped
    same(load_index(folder, verify=False).search(queries, 25), naive(vectors, rows, queries, 25), ordered(kind))


@each
def test_few_or_no_vectors(kind: str, metric: str) -> None:
    vectors, rows = world(metric, 3)
    index = build(kind, vectors, rows, checked(metric))
    same(index.search(users(2), 5), naive(vectors, rows, users(2), 5), ordered(kind))
    empty = build(kind, vectors[:0], rows[:0], checked(metric))
    assert (empty.search(users(2), 5)[0] == -1).all()
    assert empty.search(users(0), 5)[0].shape == (0, 5)


@each
def test_what_cannot_be_asked(kind: str, metric: str) -> None:
    index, vectors, rows = made(kind, metric)
    queries = users(2)
    for k in (0, -1, True, 2.0):
        with pytest.raises(DataError, match="k is"):
            index.search(queries, k)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"\(n, {WIDTH}\)"):
        index.search(queries[:, 1:], 3)
    with pytest.raises(DataError, match="query 1 is not finite"):
        index.search(np.where(np.arange(2)[:, None] == 1, np.float32(np.nan), queries), 3)
    with pytest.raises(DataError, match="one array of rows"):
        index.search(queries, 3, banned=[rows])
    with pytest.raises(DataError, match="whole numbers"):
        index.search(queries, 3, allowed=np.array([0.5]))
    with pytest.raises(DataError, match="is not in the index"):
        index.vectors(np.array([10**9]))
    for some, said in (
        (rows[[0, 0]], "named twice"),
        (np.array([-1, 3]), "start at 0"),
        (rows[:3], "3 rows for 2 vec"),
    ):
        with pytest.raises(DataError, match=said):
            build(kind, vectors[:2], some, checked(metric))


@each
def test_fault_C10_vectors_without_a_direction_are_refused_and_counted(kind: str, metric: str, folder: Path) -> None:
    vectors, rows = world(metric)
    vectors[3], vectors[4, 0], vectors[5, 1], vectors[6] = 0, np.nan, np.inf, 1e30
    index = full(build(kind, vectors, rows, checked(metric)))
    refused = [4, 5, 6] + [3] * (metric == "cosine")
    np.testing.assert_array_equal(index.rejected, np.sort(rows[refused]))
    assert len(index) == N - len(refused)
    found, scores = index.search(users(3), N)
    in_order(found, scores)
    assert not np.isnan(scores).any()
    assert not np.isin(found, rows[refused]).any()
    same((found, scores), naive(np.delete(vectors, refused, 0), np.delete(rows, refused), users(3), N), kind == "exact")
    index.save(folder)
    np.testing.assert_array_equal(load_index(folder, verify=False).rejected, np.sort(rows[refused]))


@each
def test_fault_C10_a_constant_catalogue(kind: str, metric: str) -> None:
    """All vectors alike, or all without length: every score ties, and the smallest rows come first."""
    for value in (1 / 3, 0.0):
        if value == 0 and metric == "cosine":
            continue
        index = build(kind, np.full((5000, WIDTH), value, np.float32), np.arange(5000), checked(metric))
        found, scores = index.search(users(3), 10)
        in_order(found, scores)
        assert (scores == scores[:, :1]).all()
        if ordered(kind):
            assert (found == np.arange(10)).all()


@given(data=st.data(), kind=st.sampled_from([*KINDS]), metric=st.sampled_from(["cosine", "dot"]))
@settings(max_examples=30, deadline=None)
def test_masking_is_deleting(data: st.DataObject, kind: str, metric: str) -> None:
    n = data.draw(st.sampled_from([1, 20, 300, 400]))
    vectors, rows = world(metric, n, seed=data.draw(st.integers(0, 3)))
    queries, k = users(data.draw(st.integers(1, 3))), data.draw(st.integers(1, 40))
    out = np.random.default_rng(data.draw(st.integers(0, 99))).random(n) < data.draw(st.floats(0, 1))
    gone = rows[out]
    whole = full(build(kind, vectors, rows, checked(metric)))
    less = full(build(kind, vectors[~out], rows[~out], checked(metric)))
    deleted = less.search(queries, k)
    in_order(*deleted)
    for masked in (
        whole.search(queries, k, banned=[gone] * len(queries)),
        whole.search(queries, k, allowed=np.setdiff1d(rows, gone)),
    ):
        same(masked, deleted, ordered(kind))


# Choosing and tuning


@each
def test_tuning_reaches_the_target_with_the_least(kind: str, metric: str) -> None:
    vectors, rows = world(metric, 3000)
    index = build(kind, vectors, rows, checked(metric))
    index.search_params = dict.fromkeys(index.search_params, 1)
    before = measure_recall(index, users(50), 10)
    recall = tune_index(index, users(50), 10, 0.9)
    assert recall == measure_recall(index, users(50), 10) >= 0.9
    assert all(index.search_params[name] <= top for name, top in index.search_limits().items())
    if kind in EXACT:
        assert before == recall == 1.0
    else:
        assert before < recall or "hnsw" in kind.lower()
        assert tune_index(index, users(50), 10, 1.0) >= (0.9 if kind == "ivfpq" else 0.98)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_graph_finds_nearly_all(metric: str) -> None:
    """Twins may cut a vector off from the graph, so no effort is quite enough, up to N, where all are looked at."""
    index, _, _ = made("hnsw", metric, 4000)
    index.search_params = {"ef": 400}
    assert measure_recall(index, users(50), 10) > 0.98
    index.search_params = {"ef": 4000}
    assert measure_recall(index, users(50), 10) == 1.0


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_recall_is_that_of_single_answers_without_what_each_leaves_out(kind: str) -> None:
    """Of a batch a graph looks for all as far as the longest list needs, and an answer is searched alone."""
    vectors, rows = world("cosine", 4000)
    index = build(kind, vectors, rows, "cosine", {"m": 3} if kind == "hnsw" else {})
    queries, lengths = users(40), [0, 5, 10, 60]
    near = naive(vectors, rows, queries, 60)[0]
    banned = [np.sort(found[: lengths[n % 4]]) for n, found in enumerate(near)]
    name = next(iter(index.search_limits()))
    index.search_params[name] = 1
    each = list[float]()
    for n, out in enumerate(banned):
        found, wanted = (index.search(queries[n : n + 1], 10, banned=[out], exact=exact)[1] for exact in (False, True))
        each.append(float((found >= wanted[:, -1:]).mean()))  # equal scores count
    assert measure_recall(index, queries, 10, banned) == pytest.approx(np.mean(each), abs=0.001)
    assert np.mean(each) < 0.97
    recall = tune_index(index, queries, 10, 0.98, banned)
    assert recall == measure_recall(index, queries, 10, banned) >= 0.98
    assert index.search_params[name] > 1


def test_a_graph_searches_exactly_where_a_request_leaves_out_a_large_share() -> None:
    vectors, rows = world("cosine", 4000)
    index = build("hnsw", vectors, rows, "cosine", {"m": 3})
    index.search_params = {"ef": 1}
    banned = naive(vectors, rows, users(20), 400)[0]
    for n, out in enumerate(banned):
        few, many = ([np.sort(out[:size])] for size in (1, 400))
        wanted = index.search(users(20)[n : n + 1], 10, banned=many, exact=True)
        assert (index.search(users(20)[n : n + 1], 10, banned=many)[0] == wanted[0]).all()
    assert measure_recall(index, users(20), 10, [few[0]] * 20) < 1


def test_recall_of_fewer_rows_than_asked_is_whole() -> None:
    index, _, rows = made("ivf", "dot")
    assert measure_recall(index, users(5), 10, [rows[3:]] * 5) == 1.0
    assert measure_recall(index, users(5), 10, [rows] * 5) == 1.0


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivfpq"])
def test_biases_and_a_temperature_in_the_vectors_do_not_ruin_recall(kind: str) -> None:
    """Users look nothing like items here: raw inner products on a graph find a quarter, whatever the effort."""
    rng = np.random.default_rng(0)
    taste = rng.standard_normal((30, 16))
    near = (taste[rng.integers(0, 30, 8050)] + 0.5 * rng.standard_normal((8050, 16))).astype(np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    items = np.column_stack([near[50:], np.ones(8000), rng.standard_normal(8000)]).astype(np.float32)
    queries = np.column_stack([10 * near[:50], np.ones((50, 2))]).astype(np.float32)
    index = build(kind, items, np.arange(8000), "dot")
    assert measure_recall(index, queries, 10) > (0.97 if kind == "hnsw" else 0.8)
    assert tune_index(index, queries, 10, 0.97) >= 0.97


def test_tune_and_recall_say_what_they_need() -> None:
    index, _, _ = made("ivf", "dot")
    with pytest.raises(ConfigError, match="target recall"):
        tune_index(index, users(2), 10, 1.5)
    with pytest.raises(DataError, match="at least one query"):
        measure_recall(index, users(0), 10)
    with pytest.raises(DataError, match="with items"):
        measure_recall(build("exact", users(0), np.arange(0), "dot"), users(2), 10)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_the_choice_follows_the_size(metric: str) -> None:
    sizes = (0, 10, 50_000, 50_001, 1_000_000, 2_000_001, 10**8)
    chosen = [Auto(k=7).choose(n, checked(metric)) for n in sizes]
    assert [options.kind for options, _ in chosen] == ["exact", "exact", "exact", "ivf", "ivf", "ivfpq", "ivfpq"]
    assert chosen[4][0].params == {"nlist": 4000}
    for options, reason in chosen:
        assert options.k == 7
        assert reason.isprintable()
        assert len(reason) < 160
        options.build(users(0), np.arange(0), checked(metric))


def test_the_type_in_milvus_follows_the_size() -> None:
    chosen = [choose_milvus_type(n) for n in (10, 50_000, 50_001, 2_000_000, 2_000_001)]
    assert [name for name, _ in chosen] == ["FLAT", "FLAT", "IVF_FLAT", "IVF_FLAT", "IVF_SQ8"]
    assert all(why.isprintable() and len(why) < 160 for _, why in chosen)


def test_names_that_are_not_known() -> None:
    vectors, rows = world("dot", 5)
    with pytest.raises(ConfigError, match="did you mean 'hnsw'"):
        build("hnws", vectors, rows, "dot")
    with pytest.raises(ConfigError, match="did you mean 'nlist'"):
        build("ivf", vectors, rows, "dot", {"nlits": 3})
    with pytest.raises(ConfigError, match="nlist"):
        build("ivf", vectors, rows, "dot", {"nlist": -1})
    with pytest.raises(DataError, match="allowed: cosine, dot"):
        build("exact", vectors, rows, "l2")  # type: ignore[arg-type]


# Files of others


def test_folders_that_are_no_index(folder: Path) -> None:
    index, vectors, rows = made("exact", "dot")
    index.save(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt"):
        index.save(folder)
    (folder / "notes.txt").unlink()
    good = json.loads((folder / "index.json").read_text())
    for name, value in [("format", 99), ("kind", "os"), ("metric", "l2"), ("width", 4), ("width", "x"), ("n", 3),
                        ("params", None), ("rejected", ["a"]), ("max_norm", None), ("max_norm", float("nan")),
                        ("max_norm", -1), ("kind", ["exact"]), ("params", {"nlist": 3}),
                        ("search_params", 3)]:  # fmt: skip
        (folder / "index.json").write_text(json.dumps(good | {name: value}))
        with pytest.raises(RunError):
            load_index(folder)
    (folder / "index.json").write_text(json.dumps(good))
    for name, array in [("rows", np.zeros(N, np.int64)), ("rows", rows[1:]), ("rows", rows.astype(float)),
                        ("rows", np.array([{}], object)), ("vectors", vectors.astype(np.float64)),
                        ("vectors", vectors[1:]), ("vectors", np.asfortranarray(vectors))]:  # fmt: skip
        index.save(folder)
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
        with pytest.raises(RunError):
            load_index(folder)
    for name in ("rows", "vectors"):
        index.save(folder)
        file = folder / f"{name}.npy"
        data = file.read_bytes()
        shape = data.index(b"'shape'") + 1
        # Headers that numpy's parser fails on with TypeError, TokenError, SyntaxError and ValueError.
        for at, byte in [(shape - 2, b"{"), (data.index(b"("), b"B"), (8, b"\1"), (21, b","), (8, b"\0")]:
            file.write_bytes(data[:at] + byte + data[at + 1 :])
            with pytest.raises(RunError, match=name):
                load_index(folder)
    index.save(folder)
    (folder / "vectors.npy").write_bytes(b"")
    with pytest.raises(RunError):
        load_index(folder)
    (folder / "rows.npy").unlink()
    with pytest.raises(RunError):
        load_index(folder)


@each
def test_rows_from_0_on_are_found_as_any_others(kind: str, metric: str, tmp_path: Path) -> None:
    """Row r at position r goes a shorter way than where a row is missing."""
    vectors = world(metric)[0]
    rows = np.arange(len(vectors))
    index = never_exact(full(build(kind, vectors, rows, checked(metric))))
    index.save(tmp_path / "index")
    queries, rng = users(2), np.random.default_rng(1)
    allowed = rng.permutation(len(vectors) + 50)[: len(vectors) // 2]
    banned = [np.repeat(rng.permutation(len(vectors) + 50)[: 40 * n], 2) for n in range(2)]

    def check(index: Index, rows: np.ndarray) -> None:
        for only, ban in ((None, None), (allowed, None), (np.sort(allowed), banned), (None, banned)):
            wanted = naive(vectors[rows], rows, queries, 20, only, ban)
            same(index.search(queries, 20, allowed=only, banned=ban), wanted, ordered(kind))
            for query, b, *best in zip(queries, ban or [np.empty(0, np.int64)] * 2, *wanted, strict=True):
                alone = index.search(query[None], 20, allowed=only, banned=None if ban is None else [b])
                same(alone, (best[0][None], best[1][None]), ordered(kind))
        np.testing.assert_allclose(index.scores(queries[:1]), vectors[rows] @ queries[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(index.vectors(rows[::3]), vectors[rows[::3]])

    check(index, rows)
    check(never_exact(full(load_index(tmp_path / "index", verify=False))), rows)
    left = np.delete(rows, slice(10, 30))
    index = never_exact(full(build(kind, vectors[left], left, checked(metric))))
    check(index, left)
    with pytest.raises(DataError, match="row 10 is not in the index"):
        index.vectors(rows)


def test_rising_rows_are_taken_as_they_are() -> None:
    rows = np.array([0, 3, 9])
    assert sorted_unique(rows) is rows
    assert sorted_unique(np.array([9, 3, 3, 0, 9])).tolist() == [0, 3, 9]
    assert sorted_unique(np.array([4, 4])).tolist() == [4]
    assert sorted_unique(np.array([], np.int64)).tolist() == []
