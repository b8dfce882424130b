"""What one rank of the distributed tests runs: ``python rank_main.py FOLDER JOBS``.

JOBS is JSON, a list of the fields of `jobs.Job`. When they are done the last rank goes without a
word, and one of the others writes down what it sees of that.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import jobs  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from pellucid.train.parallel.ranks import joined_ranks  # noqa: E402


def main(folder: Path, wanted: list[dict]) -> None:
    """Do the jobs, then lose a rank."""
    with joined_ranks(timeout=120):
        found = [jobs.run(jobs.Job(**fields), folder) for fields in wanted]
        jobs.write(found, folder)
        dist.barrier()
        if dist.get_rank() == dist.get_world_size() - 1:
            os._exit(0)
        dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "The .grad attribute")  # of the compiler's own looking
    place = Path(sys.argv[1])
    try:
        main(place, json.loads(sys.argv[2]))
    except ConnectionError as error:
        with (place / f"lost-of-{os.environ['WORLD_SIZE']}.txt").open("a") as told:
            told.write(f"{error}\n")
        sys.exit(2)
