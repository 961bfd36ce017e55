"""Which kinds a worker takes: turns, room, and suspects alone; and who gives way to others."""

from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from store.queue import ALONE, Kind
from worker.plan import LONG, MAX_KINDS, TURN, Holding, Running, able, choose, give_way

ME, YOU, THIRD = (UUID(int=i) for i in range(3))


def kind(
    name: str,
    *keys: UUID,
    priority: int = 0,
    model: str = "net",
    patch_set: str | None = None,
) -> Kind:
    return Kind(name, model, patch_set, dict.fromkeys(keys or (ME,), priority))


def busy(*, room: int = 10, age: float = 0.0) -> Running:
    return Running(jobs=3, room=room, age=age)


def test_an_idle_worker_takes_the_most_urgent_kinds_as_many_as_it_can_hold() -> None:
    waiting = [kind(name) for name in "abcde"]
    assert choose(waiting, {}) == ["a", "b", "c"]


def test_jobs_join_a_kind_that_runs_while_it_has_room() -> None:
    assert choose([kind("a")], {"a": busy(room=5)}) == ["a"]
    assert choose([kind("a")], {"a": busy(room=0)}) == []


def test_what_this_worker_lacks_or_could_not_load_is_left_to_others() -> None:
    waiting = [
        kind("a", model="other"),
        kind("b", patch_set="birds"),
        kind("c", patch_set="photos"),
        kind("d"),
    ]

    def names(patch_sets: set[str], refused: set[str]) -> list[str]:
        return [each.batch_key for each in able(waiting, {"net"}, patch_sets, refused)]

    assert names({"photos"}, set()) == ["c", "d"]
    assert names({"birds"}, {"d"}) == ["b"]


def test_after_its_turn_a_kind_makes_room_for_one_that_found_none() -> None:
    running = {name: busy(age=TURN + 1) for name in "abc"}
    waiting = [kind(name) for name in "abcd"]
    assert choose(waiting, running) == []
    assert choose(waiting[:3], running) == ["a", "b", "c"]  # nobody waits for room
    running["a"] = busy(age=TURN - 1)
    assert choose(waiting, running) == ["a"]


def test_what_a_key_finds_more_urgent_does_not_wait_for_the_end_of_a_turn() -> None:
    running = {name: busy() for name in "abc"}
    waiting = [kind("urgent", priority=1), *(kind(name) for name in "abc")]
    assert choose(waiting, running) == []


def test_what_another_key_finds_urgent_waits_for_the_end_of_a_turn() -> None:
    running = {name: busy() for name in "abc"}
    waiting = [kind("urgent", YOU, priority=100), *(kind(name, ME) for name in "abc")]
    assert choose(waiting, running) == ["a", "b", "c"]
    shared = [*waiting[:-1], kind("c", ME, YOU)]
    assert choose(shared, running) == ["a", "b", "c"]


def test_a_suspect_runs_alone_and_others_go_round_it_for_one_turn() -> None:
    suspect = kind(f"{ALONE}1")
    assert choose([suspect, kind("a")], {}) == [suspect.batch_key]
    assert choose([suspect, kind("a")], {"a": busy()}) == ["a"]
    assert choose([suspect, kind("b")], {"a": busy()}) == ["b"]
    assert choose([kind("a"), suspect], {}) == ["a"]
    assert choose([kind("a")], {suspect.batch_key: busy()}) == []
    # After that, nothing new comes until it has had its own, however many go first.
    assert choose([kind("a"), suspect], {"a": busy()}, alone_waits=TURN + 1) == []
    assert choose([kind("a"), suspect], {}, alone_waits=TURN + 1) == [suspect.batch_key]


def holding(name: str, key: UUID, *, rows: int = 5, age: float = LONG + 1) -> Holding:
    return Holding(uuid4(), name, key, rows, age)


def test_of_one_kind_the_longest_job_of_who_has_most_gives_way_until_rows_are_shared() -> None:
    full = {"a": Running(jobs=10, room=0, age=0.0, limit=50)}
    mine = [holding("a", ME, age=LONG + i) for i in range(10, 0, -1)]
    left = list(mine)
    while tokens := give_way([kind("a", YOU)], full, left, places=9):
        assert tokens == [left[0].token]  # one at a time
        left.pop(0)
    assert len(left) == 5
    assert give_way([kind("a", ME)], full, mine, places=9) == []  # nobody else waits
    assert give_way([kind("a", YOU)], {"a": busy()}, mine, places=9) == []  # there is room
    theirs = [holding("a", YOU) for _ in range(10)]
    assert give_way([kind("a", YOU, ME)], full, [*mine, *theirs], places=9) == []
    young = [holding("a", ME, age=LONG - 1) for _ in range(10)]
    assert give_way([kind("a", YOU)], full, young, places=9) == []


def test_a_kind_that_has_been_here_for_long_gives_way_to_another_keys() -> None:
    held = [holding(name, ME, age=LONG + i) for i, name in enumerate("abcc")]
    running = {name: busy() for name in "abc"}
    oldest = {job.token for job in held if job.batch_key == "c"}
    assert set(give_way([kind("d", YOU)], running, held, places=9)) == oldest
    assert give_way([kind("d", ME)], running, held, places=9) == []
    assert give_way([kind("d", YOU)], running, held[:2], places=9) == []
    # Where it is places that there are none of, one is enough.
    assert give_way([kind("d", YOU)], running, held[:2], places=0) == [held[1].token]
    assert give_way([kind("a", YOU)], running, held[:2], places=0) == [held[1].token]


def test_a_job_alone_gives_way_to_other_keys_and_all_give_way_to_one_that_has_waited() -> None:
    suspect = holding(f"{ALONE}1", ME)
    running = {suspect.batch_key: busy()}
    assert give_way([kind("a", YOU)], running, [suspect], places=9) == [suspect.token]
    assert give_way([kind("a", ME)], running, [suspect], places=9) == []
    waiting, held = [kind(f"{ALONE}2", ME)], [holding("a", ME), holding("b", YOU, age=LONG - 1)]
    running = {name: busy() for name in "ab"}
    assert give_way(waiting, running, held, places=9, alone_waits=TURN - 1) == []
    assert give_way(waiting, running, held, places=9, alone_waits=TURN + 1) == [held[0].token]


@given(
    names=st.lists(st.sampled_from("abcdefg"), unique=True),
    running=st.dictionaries(
        st.sampled_from("abcdefg"),
        st.builds(Running, jobs=st.integers(0, 3), room=st.integers(-3, 9), age=st.floats(0, 30)),
        max_size=MAX_KINDS,
    ),
)
def test_never_more_kinds_than_it_can_hold(names: list[str], running: dict[str, Running]) -> None:
    chosen = choose([kind(name) for name in names], running)
    in_flight = {name for name, now in running.items() if now.jobs}
    assert len(in_flight | set(chosen)) <= MAX_KINDS
    assert len(set(chosen)) == len(chosen)
    idle = not in_flight
    assert chosen or not (names and idle), "an idle worker takes something"
