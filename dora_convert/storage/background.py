"""Do work in one background thread, and raise its error in the threads that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Task = TypeVar("Task")


class Background(Generic[Task]):
    """A thread that does tasks in the order they are put; its first error ends it.

    The thread starts with the first task. `changed` guards the state that the caller shares with the thread.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Task]], None],
        *,
        claim: Callable[[], bool] = lambda: True,
        gather: float | None = None,
    ) -> None:
        """`work` gets one task at a time; with `gather`, all tasks that came within so many seconds.

        `claim` is called with `changed` held before a task is taken. The task waits until `claim` returns
        True.
        """
        self.changed = threading.Condition()
        self.closed = False
        self._work, self._claim, self._gather = work, claim, gather
        self._tasks: list[Task] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, task: Task) -> None:
        """Add a task; raise the error that ended the thread, if one did."""
        with self.changed:
            self.check()
            self._tasks.append(task)
            if not self._thread.ident:
                self._thread.start()
            self.changed.notify_all()

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        if self._error:
            raise self._error

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Wait until `ready`, an error or the end; raise the error, and return True if `ready`."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self._error or ready())
            self.check()
            return ready()

    def finish(self) -> None:
        """Wait until all tasks are done; raise the error that ended the thread, if one did."""
        self._close()
        if self._thread.ident:
            self._thread.join()
        self.check()

    def stop(self) -> None:
        """Drop all tasks that wait, and do not wait for the task at work."""
        with self.changed:
            self._tasks.clear()
            self._close()

    def _close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        try:
            while tasks := self._take():
                self._work(tasks)
        except BaseException as error:  # noqa: BLE001 - raised again in the threads that wait
            with self.changed:
                self._error = error
                self.changed.notify_all()

    def _take(self) -> list[Task]:
        """Return the tasks to do next; none at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or (self._tasks and self._claim()))
            if self._gather is None:
                taken, self._tasks = self._tasks[:1], self._tasks[1:]
                return taken
            self.changed.wait_for(lambda: self.closed, self._gather)
            taken, self._tasks = self._tasks, []
        return taken
