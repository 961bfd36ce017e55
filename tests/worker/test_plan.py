"""Which kinds a worker takes: urgency, turns, room, and suspects alone."""

from hypothesis import given
from hypothesis import strategies as st

from store.queue import ALONE, Kind
from worker.plan import MAX_KINDS, TURN, Running, choose

ALL, SETS = {"net"}, {"photos"}


def kind(
    name: str,
    *,
    seq: int = 1,
    priority: int = 0,
    model: str = "net",
    patch_set: str | None = None,
) -> Kind:
    return Kind(name, model, patch_set, priority, seq)


def busy(*, room: int = 10, age: float = 0.0) -> Running:
    return Running(jobs=3, room=room, age=age)


def test_an_idle_worker_takes_the_most_urgent_kinds_as_many_as_it_can_hold() -> None:
    waiting = [kind(name, seq=i) for i, name in enumerate("abcde")]
    assert choose(waiting, {}, ALL, SETS) == ["a", "b", "c"]


def test_jobs_join_a_kind_that_runs_while_it_has_room() -> None:
    assert choose([kind("a")], {"a": busy(room=5)}, ALL, SETS) == ["a"]
    assert choose([kind("a")], {"a": busy(room=0)}, ALL, SETS) == []


def test_a_model_that_this_worker_lacks_is_left_to_others() -> None:
    assert choose([kind("a", model="other"), kind("b")], {}, ALL, SETS) == ["b"]


def test_a_kind_whose_patch_set_this_worker_lacks_is_left_to_others() -> None:
    waiting = [kind("a", patch_set="birds"), kind("b", patch_set="photos"), kind("c")]
    assert choose(waiting, {}, ALL, SETS) == ["b", "c"]
    assert choose(waiting, {}, ALL, {"birds"}) == ["a", "c"]


def test_after_its_turn_a_kind_makes_room_for_one_that_found_none() -> None:
    running = {name: busy(age=TURN + 1) for name in "abc"}
    waiting = [kind(name) for name in "abcd"]
    assert choose(waiting, running, ALL, SETS) == []
    assert choose(waiting[:3], running, ALL, SETS) == ["a", "b", "c"]  # nobody waits for room
    running["a"] = busy(age=TURN - 1)
    assert choose(waiting, running, ALL, SETS) == ["a"]


def test_a_higher_priority_does_not_wait_for_the_end_of_a_turn() -> None:
    running = {name: busy() for name in "abc"}
    waiting = [kind("urgent", priority=1), *(kind(name) for name in "abc")]
    assert choose(waiting, running, ALL, SETS) == []


def test_a_suspect_runs_alone_and_is_not_overtaken_for_ever() -> None:
    suspect = kind(f"{ALONE}1")
    assert choose([suspect, kind("a", seq=2)], {}, ALL, SETS) == [suspect.batch_key]
    assert choose([suspect, kind("a", seq=2)], {"a": busy()}, ALL, SETS) == []
    assert choose([kind("a"), suspect], {}, ALL, SETS) == ["a"]
    assert choose([kind("a")], {suspect.batch_key: busy()}, ALL, SETS) == []


@given(
    names=st.lists(st.sampled_from("abcdefg"), unique=True),
    running=st.dictionaries(
        st.sampled_from("abcdefg"),
        st.builds(Running, jobs=st.integers(0, 3), room=st.integers(-3, 9), age=st.floats(0, 30)),
        max_size=MAX_KINDS,
    ),
)
def test_never_more_kinds_than_it_can_hold(names: list[str], running: dict[str, Running]) -> None:
    chosen = choose([kind(name) for name in names], running, ALL, SETS)
    in_flight = {name for name, now in running.items() if now.jobs}
    assert len(in_flight | set(chosen)) <= MAX_KINDS
    assert len(set(chosen)) == len(chosen)
    idle = not in_flight
    assert chosen or not (names and idle), "an idle worker takes something"
