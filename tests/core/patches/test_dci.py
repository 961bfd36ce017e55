"""Prioritized DCI beside Algorithm 2 with its priority queue."""

import heapq
import json

import numpy as np
import pytest

from core.errors import InvalidSpec
from core.patches.dci import PrioritizedDCI, UnreadableIndex, draw, project, write


def gaussian(points, dimensions=12, seed=0):
    return np.random.default_rng(seed).normal(size=(points, dimensions)).astype(np.float32)


def repeated(points, seed=0):
    """Few different points, many times: most visits are ties."""
    rng = np.random.default_rng(seed)
    return gaussian(5, 4)[rng.integers(5, size=points)]


def build(vectors, simple=4, composite=2, seed=1):
    """An index in memory."""
    directions = draw(vectors.shape[1], simple=simple, composite=composite, seed=seed)
    projections = project(vectors, directions)
    return PrioritizedDCI(directions, projections, np.argsort(projections, kind="stable"))


def saved(index, path):
    """The index after it was written to a folder."""
    path.mkdir(exist_ok=True)
    write(path, index.directions, index.points, np.concatenate(index.projections))
    return PrioritizedDCI.load(path)


def algorithm_2(directions, vectors, query, retrieve, excluded=()):
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
        while queue and retrieved < retrieve:
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
        found = index.candidates(queries, retrieve=retrieve)
        assert [ids.tolist() for ids in found] == [
            algorithm_2(index.directions, vectors, query, retrieve) for query in queries
        ]


@pytest.mark.parametrize("retrieve", [5, 20, 100])
def test_excluded_points_are_visited_and_not_retrieved(retrieve):
    vectors = gaussian(100)
    exclude = np.arange(100) % 3 == 0
    index = build(vectors)
    queries = gaussian(3, seed=5)
    found = index.candidates(queries, retrieve=retrieve, exclude=exclude)
    excluded = set(np.flatnonzero(exclude).tolist())
    assert [ids.tolist() for ids in found] == [
        algorithm_2(index.directions, vectors, query, retrieve, excluded) for query in queries
    ]


@pytest.mark.parametrize("follow", [0.1, 1000])
@pytest.mark.parametrize("vectors", [gaussian(300), repeated(300)])
def test_how_points_are_read_does_not_change_the_candidates(monkeypatch, vectors, follow):
    queries = gaussian(3, vectors.shape[1], seed=5)
    index = build(vectors)
    exclude = np.arange(300) % 7 == 0
    monkeypatch.setattr("core.patches.dci._FOLLOW", follow)  # windows, or all points in a row
    monkeypatch.setattr("core.patches.dci._WINDOW", 7)
    found = index.candidates(queries, retrieve=40, exclude=exclude)
    excluded = set(np.flatnonzero(exclude).tolist())
    assert [ids.tolist() for ids in found] == [
        algorithm_2(index.directions, vectors, query, 40, excluded) for query in queries
    ]


def test_a_first_radius_that_holds_too_few_is_widened(monkeypatch):
    vectors, queries = gaussian(300), gaussian(3, seed=5)
    index = build(vectors)
    monkeypatch.setattr(
        PrioritizedDCI, "_likely", lambda self, q, _: np.abs(self.projections[0, 0, 0] - q[..., 0])
    )
    found = index.candidates(queries, retrieve=90)
    assert [ids.tolist() for ids in found] == [
        algorithm_2(index.directions, vectors, query, 90) for query in queries
    ]


def test_recall_grows_with_the_points_retrieved():
    vectors, queries = gaussian(2000, 16), gaussian(60, 16, seed=5)
    index = build(vectors, simple=5)
    apart = np.linalg.norm(vectors.astype(np.float64) - queries[:, None], axis=2)
    nearest = np.argsort(apart, axis=1)[:, :10]

    def recall(retrieve):
        found = index.candidates(queries, retrieve=retrieve)
        return np.mean([np.isin(a, b).mean() for a, b in zip(nearest, found, strict=True)])

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


def test_points_in_another_order_are_the_same_candidates():
    vectors, queries = gaussian(600), gaussian(8, seed=5)
    moved = np.random.default_rng(2).permutation(600)
    found = build(vectors).candidates(queries, retrieve=40)
    shuffled = build(vectors[moved]).candidates(queries, retrieve=40)
    for ids, again in zip(found, shuffled, strict=True):
        assert len(ids) and np.array_equal(np.sort(moved[again]), ids)


def test_a_vector_has_the_same_projections_wherever_in_a_block_it_stands():
    vectors, directions = gaussian(500), draw(12, simple=4, composite=2, seed=1)
    whole = project(vectors, directions)
    parts = [project(part, directions) for part in (vectors[:7], vectors[7:7], vectors[7:])]
    assert np.array_equal(np.concatenate(parts, axis=2), whole)


def test_a_seed_gives_one_set_of_directions_and_another_one_another():
    first, same, other = (draw(12, simple=4, composite=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.isclose(first, other).any()


def test_no_queries_have_no_candidates():
    vectors = gaussian(30)
    assert list(build(vectors).candidates(vectors[:0], retrieve=9)) == []


def test_a_written_index_is_the_same_one_and_stays_on_disk(tmp_path):
    vectors, queries = gaussian(300), gaussian(4, seed=5)
    index = build(vectors)
    loaded = saved(index, tmp_path)
    assert isinstance(loaded.projections, np.memmap) and isinstance(loaded.order, np.memmap)
    for name in ("directions", "projections", "order"):
        assert np.array_equal(getattr(loaded, name), getattr(index, name))
    found, again = (i.candidates(queries, retrieve=30) for i in (index, loaded))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    size = sum((tmp_path / f"{name}.npy").stat().st_size for name in ("projections", "order"))
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
    saved(build(gaussian(30)), tmp_path)
    damage(tmp_path)
    with pytest.raises(UnreadableIndex, match=says):
        PrioritizedDCI.load(tmp_path)


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"exclude": np.zeros(19, bool)}, r"\(19,\)"),
        ({"queries": gaussian(2, 5)}, "12 numbers"),
        ({"queries": gaussian(1)[0]}, "12 numbers"),
        ({"queries": np.full((1, 12), np.inf)}, "finite"),
        ({"retrieve": 0}, "at least one"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(asked, says):
    settings = {"queries": gaussian(2), "retrieve": 20} | asked
    with pytest.raises(InvalidSpec, match=says):
        list(build(gaussian(20)).candidates(settings.pop("queries"), **settings))
