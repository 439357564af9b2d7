"""A thread that prepares what is asked for next while the main thread trains."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
_END_S = 10  # that a job has to notice that it is no longer wanted


class Worker:
    """Does jobs one after the other, in the order in which they are given.

    It ends with this object or with the program: a thread that is still in a tokenizer's code while the
    interpreter goes away can abort the whole process. Jobs that take long ask `ended` now and then.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._jobs: SimpleQueue = SimpleQueue()
        thread = threading.Thread(target=_work, args=(self._jobs, self.ended), name="data", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._jobs, self.ended, thread)

    def do(self, job: Callable[[], Result]) -> "Future[Result]":
        """Begin a job, or queue it; its result or its exception comes with the future. A job holds no reference to
        this object."""
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future


def _work(jobs: SimpleQueue, ended: threading.Event) -> None:
    while True:
        future, job = jobs.get()
        if ended.is_set():
            return _cancel(future, jobs)
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        del future, job  # so that nothing outlives its use while the thread waits


def _cancel(future: Future, jobs: SimpleQueue) -> None:
    future.cancel()
    while not jobs.empty():
        jobs.get()[0].cancel()


def _end(jobs: SimpleQueue, ended: threading.Event, thread: threading.Thread) -> None:
    ended.set()
    jobs.put((Future(), None))  # wakes the thread
    thread.join(_END_S)
