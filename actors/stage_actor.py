"""The Ray shell around a stage: loads it, joins its edges, answers questions while it computes.

It only delegates: the work is `Stage.forward`, the loop is `serve_stage`. Its process may die at
any time; nothing in it is worth saving. A joined stage works on a thread of its own, so that calls
are answered at once.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import NoReturn

import ray

from actors.cores import compute_first
from actors.local import describe_stage
from actors.pipeline import serve_stage
from actors.shares import NodeFacts
from actors.stats import StageStats
from actors.transport import Address, Edge, Listener, connect
from sharding.errors import DeviceLostError, PipelineError, StageError
from sharding.gguf.reader import GGUFFile
from sharding.kernels import device_facts, take_cores, use_threads
from sharding.stage import Stage
from sharding.stage_spec import StageSpec

log = logging.getLogger("longspan.stage")

JOIN_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 600.0
_DEVICE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Joint:
    """How a stage joins its neighbours in an epoch; it already listens for the one before it."""

    epoch: int
    secret: bytes
    downstream: Address


class StageActor:
    """A process that becomes stage number `number` of a pipeline once it has loaded it."""

    def __init__(self) -> None:
        self._number = -1
        self._progress = 0.0
        self._device = ""
        self._stage: Stage | None = None
        self._listener: Listener | None = None
        self._edges: list[Edge] = []
        self._worker: threading.Thread | None = None
        self._longest_step_s = 0.0

    def facts(self, kernels: str) -> NodeFacts:
        """Where it runs, on which device it would compute with that kernel set and what memory is
        free there. Raises `ConfigError` for a GPU that cannot be used, `StageError` if it fails."""
        device = device_facts(kernels)
        # The number by which the machine knows it: this process has no other.
        numbers = "".join(f" #{number}" for number in ray.get_gpu_ids())
        device = replace(device, name=device.name + numbers)
        self._device = device.name
        node = ray.get_runtime_context().get_node_id()
        return NodeFacts(node, ray.util.get_node_ip_address(), device)

    def load(self, number: int, spec: StageSpec, threads: int) -> None:
        """Become stage `number`: load the slice of the model and compute it on so many threads.

        Raises `ModelFileError` (every node needs the file).
        """
        self._number = number
        compute_first()
        use_threads(threads, spec.kernels)
        with GGUFFile.open(spec.model) as file:
            self._stage = Stage(spec, file, self._report)

    def _report(self, share: float) -> None:
        self._progress = share

    def progress(self) -> float:
        """Share of the slice loaded, 0 to 1."""
        return self._progress

    def listen(self, over_tcp: bool) -> Address:
        """Leave the old epoch, then wait for the neighbour before this one.

        A process that does not come back from its work, or whose device failed unnoticed, ends
        here: nobody may take it for a survivor."""
        try:
            self._leave()
        except StageError as error:
            self._end(str(error))
        if self._stage is not None and not _is_sound(self._stage):
            self._end("its device failed")
        host = ray.util.get_node_ip_address() if over_tcp else None
        self._listener = Listener(host)
        return self._listener.address

    def join(self, joint: Joint) -> None:
        """Connect to the neighbour after this one and go to work. Raises `PeerLostError`."""
        assert self._stage is not None, "joined before it was loaded"
        self._stage.reset()
        downstream = connect(joint.downstream, joint.secret, joint.epoch)
        self._edges = [downstream]
        self._worker = threading.Thread(target=self._work, args=(joint, downstream), daemon=True)
        self._worker.start()

    def _work(self, joint: Joint, downstream: Edge) -> None:
        stage, listener = self._stage, self._listener
        assert stage is not None and listener is not None, "joined before it listened"
        compute_first()
        take_cores(stage.spec.kernels)
        try:
            upstream = listener.accept(joint.secret, joint.epoch, JOIN_TIMEOUT_S)
            self._edges.append(upstream)
            listener.close()
            serve_stage(stage, upstream, downstream, self._note_step)
        except DeviceLostError as error:
            self._end(str(error))
        except PipelineError as error:
            log.info("stage %d left epoch %d: %s", self._number, joint.epoch, error)
        finally:
            downstream.close()

    def _note_step(self, step_s: float) -> None:
        self._longest_step_s = max(self._longest_step_s, step_s)

    def _end(self, reason: str) -> NoReturn:
        """Without anything that would still wait for the device; Ray tells the engine."""
        log.error("stage %d ends: %s", self._number, reason)
        os._exit(1)

    def _leave(self) -> None:
        for edge in self._edges:
            edge.close()
        self._edges = []
        if self._listener is not None:
            self._listener.close()
        if self._worker is not None:
            # One that is slow by nature does not hang: deep in a prompt steps become longer still.
            patience_s = min(max(JOIN_TIMEOUT_S, 3 * self._longest_step_s), LEAVE_TIMEOUT_S)
            self._worker.join(patience_s)
            if self._worker.is_alive():
                raise StageError(f"stage {self._number} still computes after {patience_s:.0f} s")

    def stats(self) -> StageStats:
        """Its books."""
        assert self._stage is not None, "asked before it was loaded"
        host = ray.util.get_node_ip_address()
        link = "" if self._listener is None else self._listener.address.link
        return describe_stage(self._number, self._stage, host, self._device, link)

    def pid(self) -> int:
        """Its process, for tests that end it."""
        return os.getpid()


def _is_sound(stage: Stage) -> bool:
    """Whether its device computes; asked on another thread, since one that hangs never answers."""
    if stage.lost:
        return False
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(stage.kernels.works()), daemon=True)
    asking.start()
    asking.join(_DEVICE_TIMEOUT_S)
    return answers == [True]


RemoteStage = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4)(StageActor)
