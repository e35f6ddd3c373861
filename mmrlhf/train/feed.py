"""Batches made ahead of time, in order, by worker processes while the model computes.

Workers decode, tokenise and collate; `data.workers: 0` does it in this process when a batch is asked for. An exception
in a worker comes out where its batch would have; a worker that dies or hangs is a RuntimeError, never an endless wait.
A signal to the whole process group stops this process alone; the workers end when it closes the feed, or is gone.
Processes, not threads: fast tokenizers refuse to be used from two threads at once.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

Made = TypeVar("Made")
PATIENCE = 600.0  # seconds a batch may take before its worker counts as hung


def feed(jobs: Iterable[Any], make: Callable[[Any], Made], *, workers: int) -> Generator[Made, None, None]:
    """`make(job)` for each job, in order, up to two jobs a worker ahead. Close the generator to stop the workers."""
    if workers == 0:
        yield from map(make, jobs)
        return
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader = DataLoader(
        _Maker(make),  # type: ignore[arg-type]
        batch_size=None,
        sampler=jobs,
        num_workers=workers,
        collate_fn=_unchanged,
        timeout=PATIENCE,
        multiprocessing_context="fork",  # nothing is pickled on the way in; workers never touch a device
        generator=torch.Generator(),  # or it would draw from the generator whose state is saved
    )
    with _signals_held():
        iterator: Any = iter(loader)
    processes = list(iterator._workers)
    try:
        yield from iterator
    finally:
        del iterator, loader  # ends the workers
        for process in processes:
            if process.is_alive():  # it hangs, and holds off the SIGTERM that torch has sent it
                process.kill()
                process.join()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes forked inside never see SIGTERM or SIGINT, not even in their first moment; this one sees them after.

    SLURM, timeout, systemd and Ctrl-C signal the whole group: a worker that died of it would take the run along in the
    middle of the step that is to be finished and saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Maker:
    """`make` under the name a DataLoader knows."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, job: Any) -> Any:
        return self.make(job)


def _unchanged(made: Any) -> Any:
    return made
