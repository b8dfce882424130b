"""Start ranks as torchrun does, without its agent: this process keeps the store they meet at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from jobs import Job

MAIN = Path(__file__).with_name("rank_main.py")
LIMIT = 300  # seconds, far more than it takes: only a hang reaches it


def ranks(count: int, jobs: list[Job], folder: Path) -> list[list[dict]]:
    """What each rank found of each job; all of them run the jobs in order, on gloo."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there: no rank is to open its port
    }
    command = [sys.executable, str(MAIN), str(folder), json.dumps([asdict(job) for job in jobs])]
    started = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=LIMIT)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [2] * (count - 1) + [0], "\n".join(said)  # the last one is lost to the others
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]
