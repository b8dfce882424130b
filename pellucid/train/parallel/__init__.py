"""Training on several ranks, with torch.distributed.

| module | holds |
|---|---|
| layout.py | how ranks share the work, and which slice of each parameter a rank holds |
| parallelize.py | one function that spreads a model: tensor parallelism, recomputing, FSDP2, DDP |
| tensor.py, vocabulary.py | which matrices are cut, and the loss where the vocabulary is |
| recompute.py | activation checkpointing |
| ranks.py | joining the ranks that torchrun started; rows, sums and norms over them |
| checkpoint.py | checkpoints that any number of ranks reads again |
"""

import os
from collections.abc import Mapping


def ranks_launched(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks torchrun started, this one among them; 0 without torchrun."""
    return int(environment.get("WORLD_SIZE", "0")) if "RANK" in environment else 0
