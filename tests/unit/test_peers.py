"""Workers as one object: alone without torch, and two real processes over gloo."""

from __future__ import annotations

import subprocess
import sys

import pytest

from orchestrator.peers import Peers

TWO = """
import os, sys
import torch.distributed as dist
import torch.multiprocessing as mp
from orchestrator.peers import Peers

def work(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    peers = Peers(rank, 2)
    assert peers.share(5) == [[0, 2, 4], [1, 3]][rank]
    assert peers.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert peers.first(f"from {rank}") == "from 0"
    assert peers.agree(True) and not peers.agree(rank == 0)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
    print("fine")
"""


def test_alone_nothing_is_asked_of_torch():
    peers = Peers()
    assert peers.share(3) == [0, 1, 2] and peers.gather("a") == ["a"] and peers.first("b") == "b"
    assert peers.agree(True) and not peers.agree(False)
    code = "import sys; from orchestrator.peers import Peers; Peers().gather(1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("count", "workers"), [(0, 3), (1, 3), (7, 3), (6, 2)])
def test_shares_are_everything_once(count, workers):
    shares = [Peers(rank, workers).share(count) for rank in range(workers)]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_tell_each_other(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "meet")], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-2000:]
