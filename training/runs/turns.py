"""Several runs in one process that take turns: one runs at a time, each with generators and a stream of its own.

A GPU works on what all of them have started, so a run whose steps are CUDA graphs waits for no other. Between two turns
a run is where it gave way, after one or several steps, and finds the random numbers of torch as it left them: it ends
with the bits that it has alone.
"""

import gc
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

#: Memory that must be free before another run begins, as a multiple of what the largest so far took.
_MARGIN = 1.25
#: Seconds that a stopped run has to end its step before the process goes on without it.
_PATIENCE_S = 30.0

GiveWay = Callable[[], None]
#: A run; it calls its argument wherever another one may run.
Job = Callable[[GiveWay], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a run that shares its process knows of it: its name in lines, and the call that lets others run."""

    name: str
    give_way: GiveWay


class Memory(Protocol):
    """The memory of a device, in bytes."""

    def taken(self) -> int:
        """What this process holds, also where it is not in use at present."""

    def free(self) -> int:
        """What could still be taken."""

    def release(self) -> None:
        """Give back what is not in use."""


class CudaMemory:
    """The memory of a GPU as torch's allocator has it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def taken(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A run that ended: its place among the jobs, the memory that it took, and its error if it has one."""

    place: int
    memory: int
    error: BaseException | None


class Watcher:
    """What ``take_turns`` reports; each method may be overridden."""

    def begins(self, place: int) -> None:
        """The job at ``place`` begins."""

    def waits(self, running: int, need: int, free: int) -> None:
        """No other job begins beside ``running`` ones: it may need more bytes than are free."""

    def ended(self, run: Ended) -> bool:
        """A job ended; returns whether others may begin."""
        return run.error is None


def take_turns(
    jobs: Sequence[Job], at_once: int, device: torch.device, watcher: Watcher, memory: Memory | None = None
) -> None:
    """Run ``jobs`` on ``device``, at most ``at_once`` of them in turns; another begins when one has ended.

    Beside others a job begins only if the largest one so far would fit into ``memory``. Errors of jobs are for
    ``watcher``; an error of this thread, Ctrl-C too, ends all jobs where they give way.
    """
    waiting, running = deque(range(len(jobs))), list[_Run]()
    largest, told = 0, False
    with _generators_kept(device), _stopped(running):
        while running or waiting:
            while waiting and len(running) < at_once:
                need, free = int(_MARGIN * largest), 0 if memory is None else memory.free()
                if running and memory is not None and need > free:
                    if not told:
                        watcher.waits(len(running), need, free)
                    told = True
                    break
                place = waiting.popleft()
                watcher.begins(place)
                running.append(_Run(place, jobs[place], device, memory))
                # Its first turn, in which it takes its memory, before another one begins.
                running[-1].go_on()
                largest = max(largest, running[-1].memory)
            for run in running:
                run.go_on()
            largest = max(largest, *(run.memory for run in running))
            for run in [run for run in running if run.ended]:
                running.remove(run)
                if memory is not None:
                    memory.release()
                if not watcher.ended(Ended(place=run.place, memory=run.memory, error=run.error)):
                    waiting.clear()


@contextmanager
def _stopped(running: list["_Run"]) -> Iterator[None]:
    """After the block none of ``running`` runs."""
    try:
        yield
    finally:
        for run in running:
            run.stop()


class _Stopped(BaseException):
    """Ends a run where it gave way; no handler of ``Exception`` keeps it."""


class _Run:
    """A job on a thread of its own, which runs from ``go_on`` to where it gives way.

    The thread has its own current stream, autocast and gradient mode, which torch keeps for each thread.
    """

    def __init__(self, place: int, job: Job, device: torch.device, memory: Memory | None) -> None:
        self.place, self.memory, self.ended = place, 0, False
        self.error: BaseException | None = None
        self._device, self._memory = device, memory
        self._generators = _Generators(device)
        self._may_run, self._gave_way = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._work, args=(job,), daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Run until the job gives way or ends; nothing if it has ended."""
        if self.ended:
            return
        before = 0 if self._memory is None else self._memory.taken()
        self._generators.put()
        self._may_run.release()
        self._gave_way.acquire()
        self._generators.take()
        if self._memory is not None:
            self.memory += max(0, self._memory.taken() - before)

    def stop(self) -> None:
        """End the job where it gave way."""
        self._stopping = True
        self._may_run.release()
        self._thread.join(_PATIENCE_S)

    def _work(self, job: Job) -> None:
        self._may_run.acquire()
        try:
            if not self._stopping:
                with _own_stream(self._device):
                    job(self._give_way)
        except BaseException as error:  # noqa: BLE001, it is raised where all jobs are watched
            # Its frames would keep the tensors of the run.
            traceback.clear_frames(error.__traceback__)
            self.error = error
        self.ended = True
        self._gave_way.release()

    def _give_way(self) -> None:
        self._gave_way.release()
        self._may_run.acquire()
        if self._stopping:
            raise _Stopped


class _Generators:
    """The states of torch's default generators that belong to one run."""

    def __init__(self, device: torch.device) -> None:
        self._host = torch.get_rng_state()
        # The state itself and not a copy of its values: the graphs of two runs may read their states at the same time.
        self._default = _default_generator(device)
        self._own = None if self._default is None else self._default.clone_state()

    def put(self) -> None:
        torch.set_rng_state(self._host)
        if self._default is not None and self._own is not None:
            self._default.graphsafe_set_state(self._own)

    def take(self) -> None:
        self._host = torch.get_rng_state()


def _default_generator(device: torch.device) -> torch.Generator | None:
    if device.type != "cuda":
        return None
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """After the block torch's generators are as before."""
    host, default = torch.get_rng_state(), _default_generator(device)
    before = None if default is None else default.graphsafe_get_state()
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if default is not None and before is not None:
            default.graphsafe_set_state(before)


def _own_stream(device: torch.device) -> "torch.cuda.StreamContext | nullcontext[None]":
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
