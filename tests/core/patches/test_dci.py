"""Prioritized DCI beside Algorithm 2 with its priority queue, and beside brute force."""

import heapq
import json

import numpy as np
import pytest

from core.errors import InvalidSpec
from core.patches.dci import PrioritizedDCI, UnreadableIndex


def gaussian(points, dimensions=12, seed=0):
    return np.random.default_rng(seed).normal(size=(points, dimensions)).astype(np.float32)


def repeated(points, seed=0):
    """Few different points, many times: most visits are ties."""
    rng = np.random.default_rng(seed)
    return gaussian(5, 4)[rng.integers(5, size=points)]


def build(vectors, simple=4, composite=2, seed=1):
    return PrioritizedDCI.build(vectors, simple=simple, composite=composite, seed=seed)


def brute_force(vectors, queries, k):
    """Ids and distances of the `k` nearest, in float64; equal ones by id."""
    apart = np.linalg.norm(vectors.astype(np.float64) - queries.astype(np.float64)[:, None], axis=2)
    ids = np.argsort(apart, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(apart, ids, axis=1)


def algorithm_2(directions, vectors, query, retrieve, visit, excluded=()):
    """The candidates of the paper's Algorithm 2: one visit after another, by a priority queue."""
    found = set()
    for lines in directions:
        points = (vectors.astype(np.float64) @ lines.T).astype(np.float32)
        centre = (lines @ query.astype(np.float64)).astype(np.float32)
        away = np.abs(points - centre).tolist()
        # Each simple index hands out its points from the nearest projection on.
        walks = [iter(sorted((row[j], i) for i, row in enumerate(away))) for j in range(len(lines))]
        queue = [(*next(walk), j) for j, walk in enumerate(walks)]
        heapq.heapify(queue)
        visits = [0] * len(vectors)
        retrieved = 0
        for _ in range(visit):
            if not queue or retrieved == retrieve:
                break
            _, point, j = heapq.heappop(queue)
            following = next(walks[j], None)
            if following:
                heapq.heappush(queue, (*following, j))
            visits[point] += 1
            if visits[point] == len(lines) and point not in excluded:
                found.add(point)
                retrieved += 1
    return sorted(found)


@pytest.mark.parametrize(
    "vectors, simple, composite",
    [
        (gaussian(1), 2, 1),
        (gaussian(40), 1, 3),
        (gaussian(200), 4, 2),
        (gaussian(700, 3), 7, 1),
        (repeated(150), 3, 2),
        (np.zeros((60, 4), np.float32), 2, 1),
        (np.eye(30, 8, dtype=np.float32), 3, 2),
    ],
)
def test_candidates_are_those_of_the_papers_priority_queue(vectors, simple, composite):
    points = len(vectors)
    index = build(vectors, simple, composite)
    queries = np.concatenate([gaussian(2, vectors.shape[1], seed=5), vectors[:2]])
    for retrieve in sorted({1, 3, points // 3 + 1, points}):
        for visit in (1, simple, 5 * simple + 1, points, simple * points // 2, simple * points):
            expected = [
                algorithm_2(index.directions, vectors, query, retrieve, visit) for query in queries
            ]
            found = index.candidates(queries, retrieve=retrieve, visit=visit)
            assert [ids.tolist() for ids in found] == expected


@pytest.mark.parametrize("visit", range(1, 61))
def test_any_number_of_visits_ends_among_ties_as_the_priority_queue_does(visit):
    vectors = repeated(20)
    index = build(vectors, simple=3, composite=1)
    queries = np.concatenate([gaussian(2, 4, seed=5), vectors[:2]])
    found = index.candidates(queries, retrieve=20, visit=visit)
    expected = [algorithm_2(index.directions, vectors, query, 20, visit) for query in queries]
    assert [ids.tolist() for ids in found] == expected


@pytest.mark.parametrize("visit", [40, 150, 400])
def test_excluded_points_are_visited_and_not_retrieved(visit):
    vectors = gaussian(100)
    exclude = np.arange(100) % 3 == 0
    index = build(vectors)
    queries = gaussian(3, seed=5)
    found = index.candidates(queries, retrieve=20, visit=visit, exclude=exclude)
    excluded = set(np.flatnonzero(exclude).tolist())
    assert [ids.tolist() for ids in found] == [
        algorithm_2(index.directions, vectors, query, 20, visit, excluded) for query in queries
    ]


@pytest.mark.parametrize("follow", [0.1, 1000])
@pytest.mark.parametrize("vectors", [gaussian(300), repeated(300)])
@pytest.mark.parametrize("visit", [None, 500])
def test_how_points_are_read_does_not_change_the_candidates(monkeypatch, vectors, follow, visit):
    queries = gaussian(3, vectors.shape[1], seed=5)
    index = build(vectors)
    exclude = np.arange(300) % 7 == 0
    monkeypatch.setattr("core.patches.dci._FOLLOW", follow)  # windows, or all points in a row
    monkeypatch.setattr("core.patches.dci._WINDOW", 7)
    monkeypatch.setattr("core.patches.dci._QUERIES", 2)
    found = index.candidates(queries, retrieve=40, visit=visit, exclude=exclude)
    excluded = set(np.flatnonzero(exclude).tolist())
    assert [ids.tolist() for ids in found] == [
        algorithm_2(index.directions, vectors, query, 40, visit or 9999, excluded)
        for query in queries
    ]


def test_a_first_radius_that_holds_too_few_is_widened(monkeypatch):
    vectors, queries = gaussian(300), gaussian(3, seed=5)
    index = build(vectors)
    monkeypatch.setattr(
        PrioritizedDCI, "_likely", lambda self, q, _: np.abs(self.projections[0, 0, 0] - q[..., 0])
    )
    found = index.candidates(queries, retrieve=90)
    assert [ids.tolist() for ids in found] == [
        algorithm_2(index.directions, vectors, query, 90, 9999) for query in queries
    ]


@pytest.mark.parametrize("vectors", [gaussian(500), repeated(120)])
def test_retrieving_every_point_is_exact_search(vectors):
    queries = gaussian(6, vectors.shape[1], seed=5)
    ids, far = build(vectors).query(queries, 10, distances=vectors, retrieve=len(vectors))
    expected, distances = brute_force(vectors, queries, 10)
    assert ids.dtype == np.int64 and np.array_equal(ids, expected)
    np.testing.assert_allclose(far, distances, rtol=1e-6, atol=1e-6)


def test_distances_of_bytes_are_exact():
    rng = np.random.default_rng(0)
    vectors = rng.choice(np.array([0, 1, 254, 255], np.uint8), size=(400, 3 * 20 * 20))
    vectors[0] = 0
    queries = np.concatenate([vectors[:9], np.full((1, 1200), 255, np.uint8)])
    ids, far = build(vectors).query(queries, 400, distances=vectors, retrieve=400)
    expected, distances = brute_force(vectors, queries, 400)
    assert np.array_equal(ids, expected)
    assert np.array_equal(far, distances)


def test_distances_in_float64_keep_its_precision():
    vectors, queries = 1e6 + gaussian(200).astype(np.float64), 1e6 + gaussian(3, seed=5)
    ids, far = build(vectors).query(queries, 9, distances=vectors, retrieve=200)
    expected, distances = brute_force(vectors, queries, 9)
    assert np.array_equal(ids, expected)
    np.testing.assert_allclose(far, distances, rtol=1e-9)


def test_recall_grows_with_the_points_retrieved():
    vectors, queries = gaussian(2000, 16), gaussian(60, 16, seed=5)
    index = build(vectors, simple=5)
    nearest, _ = brute_force(vectors, queries, 10)

    def recall(retrieve):
        ids, _ = index.query(queries, 10, distances=vectors, retrieve=retrieve)
        return np.mean([len(set(a) & set(b)) for a, b in zip(ids, nearest, strict=True)]) / 10

    recalls = [recall(retrieve) for retrieve in (20, 100, 500, 2000)]
    assert recalls == sorted(set(recalls))
    assert recalls[-1] == 1


def test_no_projected_distance_exceeds_the_true_one():
    vectors, queries = gaussian(400), gaussian(5, seed=5)
    index = build(vectors, simple=9)
    lines = index.directions.reshape(-1, 12)
    projected = np.abs(index.projections.reshape(-1, 400) - (lines @ queries.T).T[..., None])
    true = np.linalg.norm(vectors.astype(np.float64) - queries[:, None], axis=2)
    np.testing.assert_allclose(np.linalg.norm(index.directions, axis=2), 1, rtol=1e-12)
    assert (projected <= true[:, None] + 1e-6).all()
    assert projected.max() > 0.5 * true.max()


def test_points_in_another_order_are_the_same_answers():
    vectors, queries = gaussian(600), gaussian(8, seed=5)
    moved = np.random.default_rng(2).permutation(600)
    ids, far = build(vectors).query(queries, 7, distances=vectors, retrieve=40, visit=900)
    shuffled = build(vectors[moved])
    again, as_far = shuffled.query(queries, 7, distances=vectors[moved], retrieve=40, visit=900)
    assert (ids >= 0).all()
    assert np.array_equal(moved[again], ids)
    assert np.array_equal(as_far, far)


def test_blocks_one_array_and_another_run_give_one_index():
    vectors = gaussian(500)
    whole = build(vectors)
    for other in (build(vectors), build(iter([vectors[:7], vectors[7:7], vectors[7:]]))):
        assert np.array_equal(other.directions, whole.directions)
        assert np.array_equal(other.projections, whole.projections)
        assert np.array_equal(other.order, whole.order)
    assert not np.array_equal(build(vectors, seed=2).directions, whole.directions)


def test_an_array_larger_than_a_block_is_projected_whole(monkeypatch):
    whole = build(gaussian(100))
    monkeypatch.setattr("core.patches.dci._PROJECTED", 12 * 7)
    assert np.array_equal(build(gaussian(100)).projections, whole.projections)


def test_distances_may_be_measured_by_a_function():
    vectors, queries = gaussian(300), gaussian(4, seed=5)

    def doubled(query, ids):
        return 2 * np.linalg.norm(vectors[ids] - query, axis=1)

    index = build(vectors)
    ids, far = index.query(queries, 5, distances=vectors, retrieve=50)
    again, twice = index.query(queries, 5, distances=doubled, retrieve=50)
    assert np.array_equal(again, ids)
    np.testing.assert_allclose(twice, 2 * far, rtol=1e-5)


def test_no_queries_have_no_answers():
    vectors = gaussian(30)
    ids, far = build(vectors).query(vectors[:0], 5, distances=vectors, retrieve=9)
    assert ids.shape == far.shape == (0, 5)


def test_what_too_few_visits_leave_open_is_marked():
    vectors = gaussian(300)
    ids, far = build(vectors).query(gaussian(4, seed=5), 5, distances=vectors, retrieve=9, visit=1)
    assert (ids == -1).all() and np.isinf(far).all()


def test_a_saved_index_answers_alike_from_its_files(tmp_path):
    vectors, queries = gaussian(300), gaussian(4, seed=5)
    index = build(vectors)
    index.save(tmp_path / "index")
    loaded = PrioritizedDCI.load(tmp_path / "index")
    assert isinstance(loaded.projections, np.memmap) and isinstance(loaded.order, np.memmap)
    for a, b in zip(
        index.query(queries, 5, distances=vectors, retrieve=30),
        loaded.query(queries, 5, distances=vectors, retrieve=30),
        strict=True,
    ):
        assert np.array_equal(a, b)
    size = sum(
        (tmp_path / "index" / f"{name}.npy").stat().st_size for name in ("projections", "order")
    )
    assert size == pytest.approx(300 * loaded.bytes_per_point, rel=0.05)
    assert loaded.bytes_per_point == 4 * 2 * (4 + 4)


def damage_version(path):
    (path / "dci.json").write_text(json.dumps({"format": 0}))


def damage_header(path):
    (path / "dci.json").write_text("[")


def damage_array(path):
    (path / "order.npy").write_bytes(b"\x93NUMPY")


def damage_whole_array(path):
    (path / "projections.npy").write_bytes(b"")


def damage_pair(path):
    np.save(path / "order.npy", np.zeros((2, 4, 7), np.int32))


@pytest.mark.parametrize(
    "damage, says",
    [
        (damage_version, "has format 0, not 1"),
        (damage_header, "cannot be read"),
        (damage_array, "cannot be read"),
        (damage_whole_array, "cannot be read"),
        (damage_pair, "not of one index"),
        (lambda path: (path / "dci.json").unlink(), "cannot be read"),
    ],
)
def test_an_index_of_another_version_or_damaged_is_refused(tmp_path, damage, says):
    build(gaussian(30)).save(tmp_path)
    PrioritizedDCI.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(UnreadableIndex, match=says):
        PrioritizedDCI.load(tmp_path)


@pytest.mark.parametrize(
    "vectors, says",
    [
        (np.empty((0, 3), np.float32), "no points"),
        (iter([]), "no points"),
        (np.ones(3, np.float32), r"\(3,\)"),
        (np.empty((2, 0), np.float32), r"\(2, 0\)"),
        (iter([gaussian(3, 4), gaussian(3, 5)]), "5 numbers, the first had 4"),
        (np.array([[0, np.nan]]), "finite"),
    ],
)
def test_vectors_that_cannot_be_indexed_are_refused(vectors, says):
    with pytest.raises(InvalidSpec, match=says):
        build(vectors)


@pytest.mark.parametrize("sizes", [{"simple": 0}, {"composite": 0}])
def test_an_index_of_nothing_is_refused(sizes):
    with pytest.raises(InvalidSpec, match="at least one"):
        build(gaussian(10), **sizes)


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"k": 0}, "0 neighbours"),
        ({"k": 21, "retrieve": 99}, "20 points"),
        ({"k": 6, "retrieve": 5}, "5 are retrieved"),
        ({"k": 11, "exclude": np.arange(20) % 2 == 0}, "10 points"),
        ({"exclude": np.zeros(19, bool)}, r"\(19,\)"),
        ({"queries": gaussian(2, 5)}, "12 numbers"),
        ({"queries": gaussian(1)[0]}, "12 numbers"),
        ({"queries": np.full((1, 12), np.inf)}, "finite"),
        ({"distances": gaussian(19)}, r"\(20, 12\)"),
        ({"retrieve": 0, "k": 0}, "cannot be chosen"),
        ({"visit": 0}, "at least one"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(asked, says):
    vectors = gaussian(20)
    settings = {"queries": gaussian(2), "k": 3, "distances": vectors, "retrieve": 20} | asked
    with pytest.raises(InvalidSpec, match=says):
        build(vectors).query(settings.pop("queries"), settings.pop("k"), **settings)
