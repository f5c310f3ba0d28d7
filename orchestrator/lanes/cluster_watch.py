"""A process beside a driver that started a Ray cluster: when the driver is gone, however it went, nothing of the cluster is left.

Run as a script (`python -I -S cluster_watch.py`, so it costs a few MB and no imports of ours) with its stdin held open by the driver, which
writes lines: `folder PATH`, `process PID START` for each process of the cluster, and `done` when it has cleaned up itself. A driver that was
killed writes no `done`. Ray's own processes end with their driver, but some take a minute; its folder stays for ever.
"""

import os
import select
import shutil
import signal
import sys
import time

VARIABLE = "SAFEBASIN_RAY_FOLDER"
"""In the environment of every process of the cluster."""
PATIENCE_S = 4.0
"""For processes that end by themselves once their driver is gone."""


def started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is no such process, or only its exit status is left."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def left(processes: dict[int, str], folder: str) -> list[int]:
    """Those of the processes that still run, and any other that carries the folder in its environment."""
    found = [pid for pid, start in processes.items() if started(pid) == start]
    wanted, me = f"{VARIABLE}={folder}".encode(), os.getpid()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if not name.isdigit() or int(name) in (me, *found):
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0") and started(int(name)):
                    found.append(int(name))
        except OSError:  # another user's, or gone
            continue
    return found


def end(processes: dict[int, str], folder: str, patience: float = PATIENCE_S) -> int:
    """Wait for the cluster's processes and kill those that stay; how many had to be killed."""
    until = time.monotonic() + patience
    while (remaining := left(processes, folder)) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in remaining:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:  # gone in this moment
            continue
    until = time.monotonic() + 2.0
    while left(processes, folder) and time.monotonic() < until:
        time.sleep(0.05)
    return len(remaining)


def main() -> None:
    """Listen until the driver says `done` or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they go to the driver, which ends in good order or not
    driver, said, folder, processes = os.getppid(), b"", "", {}
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        piece = os.read(0, 65536) if ready else None
        said += piece or b""
        *lines, said = said.split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "done":
                return
            if word == "folder":
                folder = rest
            if word == "process":
                pid, _, start = rest.partition(" ")
                processes[int(pid)] = start
        if piece == b"" or os.getppid() != driver:
            break
    if folder:
        end(processes, folder)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the driver's terminal may belong to someone else by now
    main()
