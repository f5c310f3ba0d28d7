"""What Ray Train's controller of a lane tells the broker, beside the loop its workers run (`worker`).

Train restarts a group whose worker died, wherever there is room, and waits where there is none. What the group ran must not wait with
it: as soon as nothing of the old group runs any more, the broker hands its trial to the next free lane.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from typing import Any

import psutil
import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback

log = logging.getLogger(__name__)

ANSWER_S = 3.0
"""A machine whose raylet takes no connection for so long is gone, whatever the cluster still believes."""

ORPHAN_S = 2.0
"""Workers of a raylet that was killed look once a second whether it is there, and end; until then they may write to the trial's folder."""


class LaneControl(ControllerCallback, WorkerGroupCallback):
    """Lives in the controller's process. Tells the broker of the controller, and of every group that has ended and why."""

    def __init__(self, broker: Any, lane: int):
        self._broker, self._lane = broker, lane
        self._group: list[tuple[Any, str, str]] = []
        """(actor, id of its machine, address of its machine) of every worker."""
        self._why = "home"
        self._machines: list[str] = []

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller is up."""
        self._tell("control", self._lane, ray.get_runtime_context().current_actor)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """A fresh group."""
        self._group = [(w.actor, w.metadata.node_id, w.metadata.node_ip) for w in worker_group.get_workers()]
        self._why, self._machines = "home", []

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """On an error: see whether a worker died and a machine left, and end the rest of the group, which may sit in a collective."""
        if type(previous_state).__name__ not in ("RunningState", "PreemptingState"):
            return
        ending = getattr(current_state, "next_state", current_state)
        error = getattr(ending, "training_failed_error", None)
        if error is None:
            return
        preempted = getattr(error, "preemption_info", None)
        taken = set(preempted.preempted_node_to_ranks) if preempted is not None else set()
        self._machines = lost_machines(self._group, taken)
        self._why = "died" if self._machines or any_dead([actor for actor, _, _ in self._group]) else "raised"
        for actor, _, _ in self._group:
            ray.kill(actor, no_restart=True)
        if self._machines:
            time.sleep(ORPHAN_S)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Nothing of the group runs any more."""
        self._tell("left", self._lane, self._why, self._machines)
        self._group, self._why, self._machines = [], "home", []

    def _tell(self, method: str, *args: Any) -> None:
        try:
            ray.get(getattr(self._broker, method).remote(*args))
        except ray.exceptions.RayActorError as error:  # the run is over, or its driver died and this controller will be ended
            log.warning("lane %s could not tell the broker (%s): %s", self._lane, method, error)


class NodeInterface(WorkerCallback):
    """Lives in a worker's process. Gloo binds to what the host's own name resolves to, which on many machines is a loopback address that
    no other machine reaches; Ray knows the address by which this machine joined. GLOO_SOCKET_IFNAME, where it is set, stays."""

    def after_init_train_context(self) -> None:
        """Before the process group is made."""
        address = ray.util.get_node_ip_address()
        name = interface_of(address)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if address.startswith("127."):
            keep_store_on(address)


def keep_store_on(address: str) -> None:
    """Let the store by which a group's workers find each other take connections at this address only; torch would listen everywhere."""
    import torch.distributed  # noqa: F401 - brings the module below, which torch hides behind a function of its name

    rendezvous = sys.modules["torch.distributed.rendezvous"]
    if rendezvous.TCPStore.__name__ == "LocalStore":
        return

    class LocalStore(rendezvous.TCPStore):
        def __init__(self, *args: Any, **options: Any):
            if options.get("is_master"):
                options["master_listen_fd"] = socket.create_server((address, options["port"])).detach()
            super().__init__(*args, **options)

    rendezvous.TCPStore = LocalStore


def interface_of(address: str) -> str | None:
    """Name of this machine's network interface that has this address; None where none has."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    return None


def any_dead(workers: list[Any]) -> bool:
    """Whether one of these workers is dead. One that raised lives on; one that does not answer in time counts as alive."""
    calls = [worker.get_metadata.remote() for worker in workers]
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_S)
    for call in answered:
        try:
            ray.get(call)
        except ray.exceptions.RayActorError:
            return True
    return False


def lost_machines(group: list[tuple[Any, str, str]], taken: set[str]) -> list[str]:
    """Addresses of the group's machines that left: dead or draining (`taken`) by the cluster's word, or deaf."""
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    lost = set()
    for machine, address in {(machine, address) for _, machine, address in group}:
        node = alive.get(machine)
        if node is None or machine in taken or not _answers(node["NodeManagerAddress"], node["NodeManagerPort"]):
            lost.add(address)
    return sorted(lost)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), ANSWER_S):
            return True
    except OSError:
        return False
