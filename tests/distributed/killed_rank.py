"""``pellucid`` under torchrun, where one rank is killed once: after a step, in the first attempt.

torchrun … killed_rank.py RANK STEP VERB …
"""

from __future__ import annotations

import os
import signal
import sys

from pellucid.cli import main
from pellucid.train.pretraining import Pretraining

if __name__ == "__main__":
    rank, step, *arguments = sys.argv[1:]
    whole = Pretraining.between_steps

    def between_steps(run, progress, log):
        """As always; then the end, without a word to anyone."""
        whole(run, progress, log)
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == rank and progress.step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    Pretraining.between_steps = between_steps
    sys.exit(main(arguments))
