"""``python kill_runs.py FOLDER KILLS``: train, kill -9 at random moments, go on, and compare with a run never killed.

Each run is a process that calls the command line; they are forked from this one, which has imported everything and
computed nothing. Prints the number of kills and of runs that they were spread over.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from training_laws import same_run
from undiffuse.commands import main
from undiffuse.training import checkpoint


def start(folder: Path, data: Path) -> int:
    """The process number of a training run."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(folder.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    words = f"train {data} --recipe tiny --steps 24 --batch-size 4 --device cpu --out {folder}"
    often = ("checkpoint_every=3", "log_every=2", "milestone_every=8", "preview_every=0", "previews=1")
    os._exit(main([*words.split(), *(word for each in often for word in ("--set", f"training.{each}"))]))


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_runs(root: Path, kills: int) -> int:
    data = root / "data.npy"
    np.save(data, np.random.Generator(np.random.PCG64(1)).normal(size=(10, 2)).astype(np.float32))
    begun = time.monotonic()
    assert finish(start(root / "straight", data)) == 0, (root / "said").read_text()
    whole, moments = time.monotonic() - begun, random.Random(kills)
    done = runs = reached = 0
    while done < kills or runs == 0:
        folder, runs = root / f"run-{runs}", runs + 1
        while True:
            child = start(folder, data)
            if done < kills:
                time.sleep(moments.uniform(0, whole / 2))
                os.kill(child, signal.SIGKILL)
            code = finish(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (root / "said").read_text()
            done += 1
            found = checkpoint.newest(folder / "checkpoints")  # warnings are errors: whatever is there is whole
            before, reached = reached, found.step if found else 0
            assert reached >= before
        reached = 0
        same_run(root / "straight", folder)
    print(done, runs)
    return 0


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("error")
    sys.exit(kill_runs(Path(sys.argv[1]), int(sys.argv[2])))
