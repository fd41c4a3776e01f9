"""Runs that take turns in one process: each must find what it left, and none may harm the others."""

import signal
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from training.runs.turns import Ended, GiveWay, Job, Memory, Watcher, take_turns

CPU = torch.device("cpu")


class Noted(Watcher):
    """Keeps what it is told; other jobs begin whatever happened."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: dict[int, BaseException] = {}
        self.memory: dict[int, int] = {}

    def begins(self, place: int) -> None:
        self.lines.append(f"{place} begins")

    def waits(self, running: int, need: int, free: int) -> None:
        self.lines.append(f"{running} run, {need} needed, {free} free")

    def ended(self, run: Ended) -> bool:
        self.lines.append(f"{run.place} ends")
        self.memory[run.place] = run.memory
        if run.error is not None:
            self.errors[run.place] = run.error
        return True


class Room:
    """A device of 100 bytes on which each job takes what ``take`` says."""

    def __init__(self) -> None:
        self.held, self.released = 0, 0

    def taken(self) -> int:
        return self.held

    def free(self) -> int:
        return 100 - self.held

    def release(self) -> None:
        self.released += 1


def turning(jobs: list[Job], at_once: int, memory: Memory | None = None) -> Noted:
    watcher = Noted()
    take_turns(jobs, at_once, CPU, watcher, memory)
    return watcher


def drawing(seed: int, turns: int, found: list[float]) -> Job:
    """Draws a number in each turn, as a step does."""

    def job(give_way: GiveWay) -> None:
        torch.manual_seed(seed)
        for _ in range(turns):
            found.append(float(torch.rand(())))
            give_way()

    return job


def test_each_job_draws_the_numbers_that_it_draws_alone_and_the_process_keeps_its_own() -> None:
    alone = []
    for seed in (3, 4, 5):
        torch.manual_seed(seed)
        alone.append([float(torch.rand(())) for _ in range(4 + seed)])
    torch.manual_seed(9)
    expected = [float(torch.rand(())), float(torch.rand(()))]
    torch.manual_seed(9)
    first = float(torch.rand(()))
    together: list[list[float]] = [[], [], []]
    turning([drawing(seed, 4 + seed, found) for seed, found in zip((3, 4, 5), together, strict=True)], 2)
    assert together == alone
    assert [first, float(torch.rand(()))] == expected


def test_jobs_take_turns_one_at_a_time_and_at_most_so_many() -> None:
    order: list[tuple[int, int]] = []
    inside = threading.Lock()
    open_, most = set[int](), 0

    def job(place: int, turns: int) -> Job:
        def run(give_way: GiveWay) -> None:
            nonlocal most
            open_.add(place)
            most = max(most, len(open_))
            for turn in range(turns):
                assert inside.acquire(blocking=False)
                order.append((place, turn))
                inside.release()
                give_way()
            open_.remove(place)

        return run

    watcher = turning([job(0, 3), job(1, 1), job(2, 2)], 2)
    assert watcher.errors == {}
    assert most == 2
    assert order == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (2, 1)]
    assert watcher.lines == ["0 begins", "1 begins", "1 ends", "2 begins", "0 ends", "2 ends"]


def test_precision_and_gradient_mode_of_a_job_are_not_those_of_another() -> None:
    found = []

    def lower(give_way: GiveWay) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            give_way()
            found.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    def plain(give_way: GiveWay) -> None:
        give_way()
        found.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    turning([lower, plain], 2)
    assert found == [(True, False), (False, True)]


def test_an_error_ends_its_job_only_and_keeps_none_of_its_tensors() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    ended = []

    def fails(give_way: GiveWay) -> None:
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        give_way()
        raise ValueError("as planned")

    def works(give_way: GiveWay) -> None:
        give_way()
        give_way()
        ended.append(True)

    watcher = turning([fails, works, works], 2)
    assert {place: str(error) for place, error in watcher.errors.items()} == {0: "as planned"}
    assert ended == [True, True]
    assert kept[0]() is None


def test_no_other_job_begins_if_the_watcher_does_not_want_it() -> None:
    ended: list[int] = []

    def job(place: int) -> Job:
        def run(give_way: GiveWay) -> None:
            give_way()
            if place == 0:
                raise ValueError
            give_way()
            ended.append(place)

        return run

    take_turns([job(place) for place in range(4)], 2, CPU, Watcher())
    assert ended == [1]


@pytest.mark.parametrize("interrupt", [lambda: signal.raise_signal(signal.SIGINT), None])
def test_a_stop_ends_every_job_where_it_gave_way(interrupt: Callable[[], None] | None) -> None:
    closed = []

    def job(place: int) -> Job:
        def run(give_way: GiveWay) -> None:
            try:
                for turn in range(100):
                    if place == 1 and turn == 2 and interrupt is not None:
                        interrupt()
                    give_way()
            finally:
                closed.append(place)

        return run

    class Impatient(Watcher):
        def begins(self, place: int) -> None:
            if place == 2 and interrupt is None:
                raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        take_turns([job(0), job(1), job(2)], 3, CPU, Impatient())
    assert sorted(closed) == ([0, 1] if interrupt is None else [0, 1, 2])
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("sizes", "lines"),
    [
        # 1.25 times 30 bytes still fit beside two jobs of 30, but not beside three.
        (
            (30, 30, 30, 30),
            ["0 begins", "1 begins", "2 begins", "3 run, 37 needed, 10 free", *(f"{place} ends" for place in range(3))],
        ),
        # A job that needs more than the device has is not held back for ever.
        ((90, 10), ["0 begins", "1 run, 112 needed, 10 free", "0 ends"]),
    ],
)
def test_a_job_waits_until_there_is_room_for_the_largest_so_far(sizes: tuple[int, ...], lines: list[str]) -> None:
    room = Room()

    def job(size: int) -> Job:
        def run(give_way: GiveWay) -> None:
            room.held += size
            give_way()
            room.held -= size

        return run

    watcher = turning([job(size) for size in sizes], 4, room)
    last = len(sizes) - 1
    assert watcher.lines == [*lines, f"{last} begins", f"{last} ends"]
    assert watcher.memory == dict(enumerate(sizes))
    assert room.released == len(sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_graphs_of_two_jobs_have_a_stream_and_a_generator_each() -> None:
    device = torch.device("cuda")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    default = torch.cuda.default_generators[0]

    def job(seed: int, turns: int, offsets: list[int], streams: list[int]) -> Job:
        def run(give_way: GiveWay) -> None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                torch.rand(1000, device=device)
            streams.append(torch.cuda.current_stream().cuda_stream)
            torch.manual_seed(seed)
            for _ in range(turns):
                graph.replay()
                assert default.initial_seed() == seed
                offsets.append(default.get_offset())
                give_way()
                torch.rand(10, device=device)

        return run

    alone: list[list[int]] = [[], []]
    for place, turns in enumerate((4, 6)):
        take_turns([job(place + 3, turns, alone[place], [])], 1, device, Watcher())
    torch.manual_seed(9)
    together: list[list[int]] = [[], []]
    streams: list[int] = []
    jobs = [job(place + 3, turns, together[place], streams) for place, turns in enumerate((4, 6))]
    take_turns(jobs, 2, device, Watcher())
    assert together == alone
    assert [len(offsets) for offsets in alone] == [4, 6]
    assert len({*streams, torch.cuda.current_stream().cuda_stream}) == 3
    assert (default.initial_seed(), default.get_offset()) == (9, 0)
