"""What a checkpoint costs: how long training stands still for one, and how long writing and reading it takes.

    python benchmarks/checkpoint.py [--rounds N] [--out checkpoint.json]

*Stall* is the time of the update at which a checkpoint is due, less that of the median update: all written before
training goes on (*sync*), or copied and written by a thread (*async*). *Slower* is by how much the updates beside the
writing thread take longer. *Save* is against the library's ``save_file`` and ``fsync`` of the same tensors in one file.
All alternate in one process; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from undiffuse import open_dataset
from undiffuse.training import Trainer, checkpoint, make_recipe


def timed(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(size: str, batch: int, rounds: int, folder: Path) -> dict[str, Any]:
    dataset = open_dataset("digits")
    recipe = make_recipe("digits", dataset.spec, len(dataset), size)
    trainer = Trainer(
        dataset, replace(recipe, training=replace(recipe.training, batch_size=batch, images=10**9, keep=1))
    )
    for _ in range(3):
        trainer.update()
    pool = ThreadPoolExecutor(1)

    def due_sync() -> None:
        trainer.update()
        checkpoint.save(folder / "ours", trainer.snapshot(), {}, keep=1)

    def library() -> None:
        flat = {f"{group}/{name}": t for group, each in trainer.snapshot().tensors.items() for name, t in each.items()}
        save_file(flat, folder / "theirs")
        with (folder / "theirs").open("rb") as file:
            os.fsync(file.fileno())

    plain, sync, begun, beside, save, theirs, load = [], [], [], [], [], [], []
    for _ in range(rounds):
        plain += [timed(trainer.update) for _ in range(3)]
        sync.append(timed(due_sync))
        writing: list[Any] = []

        def due_async() -> None:
            trainer.update()
            copy = trainer.snapshot().copy()
            writing.append(pool.submit(checkpoint.save, folder / "ours", copy, {}, 1))  # noqa: B023

        begun.append(timed(due_async))
        while not writing[0].done():
            beside.append(timed(trainer.update))
        writing[0].result()
        save.append(timed(lambda: checkpoint.save(folder / "ours", trainer.snapshot(), {}, 1)))
        theirs.append(timed(library))

        def read() -> None:
            found = checkpoint.newest(folder / "ours")
            assert found is not None
            found.snapshot()

        load.append(timed(read))
    found = checkpoint.newest(folder / "ours")
    assert found is not None
    megabytes = sum(path.stat().st_size for path in found.path.iterdir()) / 1e6
    update = median(plain)
    return {
        "size": size,
        "batch": batch,
        "MB": round(megabytes, 1),
        "update_ms": round(1e3 * update, 1),
        "sync_stall": round(median(sync) / update - 1, 2),
        "async_stall": round(median(begun) / update - 1, 2),
        "slower": round(median(beside) / update - 1, 2) if beside else None,
        "save_ms": round(1e3 * median(save), 1),
        "of_library": round(median(a / b for a, b in zip(save, theirs, strict=True)), 2),
        "load_s_100MB": round(median(load) / megabytes * 100, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for size, batch in (("tiny", 128), ("small", 128)):
            rows.append(measure(size, batch, options.rounds, Path(folder) / size))
    print(f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.2f}")
    for cells in [list(rows[0]), *(row.values() for row in rows)]:
        print("  ".join(f"{cell!s:>12}" for cell in cells))
    if options.out:
        options.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
