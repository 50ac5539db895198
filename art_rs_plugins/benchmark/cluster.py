"""Workers on Ray: the same run on all cores, GPUs or machines of a cluster."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch

__all__ = ["RayWorkers"]

logger = logging.getLogger(__name__)

QUEUE = 2
"""Items at each worker, so that none waits for the next."""
AHEAD = 8
"""Items for each worker, at most, that may be finished before an earlier one is."""
RETRIES = 5
"""Times that an item is tried again because its worker died."""
PATIENCE = 25.0
"""Seconds to wait for a cluster that does not answer."""


class RayWorkers:
    """Workers on a Ray cluster; enter it with ``with``. One worker for each GPU that is free, or else for each core.

    Parameters
    ----------
    address : str
        ``"local"`` starts Ray on this machine, ``"auto"`` finds one that runs here, ``host:port`` one elsewhere. A Ray
        that this process has started already is used as it is.
    gpu : bool
        Give each worker a GPU of its own, where the cluster has any.

    Raises
    ------
    ImportError
        On entry, without Ray.
    ConnectionError
        On entry, where no cluster answers within 30 seconds; later, where the workers of one item died again and again.

    Notes
    -----
    A task travels to each worker once, items one at a time, a few of them ahead. A worker that dies is started anew and
    what it had is done again, so a task must be a pure function of its item, as those of a run are. Workers need this
    package and the code of the network, but neither weights nor data. On CPUs a worker computes with one thread.
    """

    def __init__(self, address: str = "local", *, gpu: bool = True) -> None:
        self.address, self.gpu = address, gpu
        self._workers: list[Any] = []
        self._options: dict[str, Any] = {}
        self._size = 0
        self._begun_here = False

    def __enter__(self) -> Self:
        ray = _ray()
        if not ray.is_initialized():
            if self.address != "local":
                _knock(self.address)
            own = {"include_dashboard": False} if self.address == "local" else {}
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", **own)
            self._begun_here = True
        free = ray.available_resources()
        gpus, cores = int(free.get("GPU", 0)) if self.gpu else 0, int(free.get("CPU", 0))
        self._size = max(1, gpus or cores)
        if not cores:
            logger.warning("no core of the Ray cluster is free: the run begins when one is")
        self._options = {"num_cpus": 1, "num_gpus": int(gpus > 0), "max_restarts": -1, "max_task_retries": RETRIES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray = _ray()
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()
        if self._begun_here:
            ray.shutdown()
        self._begun_here = False

    def __call__(self, task: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        """Yield ``task(item)`` for each item, in order; items are taken as there is room for them."""
        ray = _ray()
        sent = [ray.put(_packed(task))]   # within a list it is not fetched for each item
        order: deque[Any] = deque()
        running: dict[Any, Any] = {}   # unfinished, each with its worker
        for item in items:
            while len(running) >= QUEUE * self._size or len(order) >= AHEAD * self._size:
                for finished in ray.wait(list(running), num_returns=1)[0]:
                    del running[finished]
                while order and order[0] not in running:
                    yield _result(ray, order.popleft())
            worker = self._least_busy(list(running.values()))
            reference = worker.call.remote(sent, item)
            order.append(reference)
            running[reference] = worker
        while order:
            yield _result(ray, order.popleft())

    def _least_busy(self, busy: list[Any]) -> Any:
        """A worker with nothing to do, a new one, or the one with the least to do."""
        best = min(self._workers, key=busy.count, default=None)
        if best is None or (best in busy and len(self._workers) < self._size):
            best = _ray().remote(**self._options)(_Worker).remote()
            self._workers.append(best)
        return best


class _Worker:
    """Keeps a task, and does it for one item after the other."""

    def __init__(self) -> None:
        self._sent: Any = None
        self._task: Any = None

    def call(self, sent: list[Any], item: Any) -> Any:
        if self._sent != sent:
            # to the CPU first: a task finds its device by itself, which may be another than the driver's
            self._task = torch.load(io.BytesIO(_ray().get(sent[0])), map_location="cpu", weights_only=False)
            self._sent = sent
        return self._task(item)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'art-rs-plugins[ray]'") from error
    return ray


def _packed(task: Callable[[Any], Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(task, stream, pickle_module=_ray().cloudpickle)
    return stream.getvalue()


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ConnectionError(
            f"workers died {RETRIES + 1} times at the same inputs ({type(error).__name__}); see whether they run out "
            "of memory, and run again: what is recorded stays"
        ) from error


def _knock(address: str) -> None:
    """See whether a cluster answers, in a process that can be given up: Ray itself waits for minutes."""
    knock = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", knock, address], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {PATIENCE:g} seconds"
    else:
        if answer.returncode == 0:
            return
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
    raise ConnectionError(
        f"no Ray cluster at {address} ({reason}); start one with `ray start --head`, or take --ray local"
    )
