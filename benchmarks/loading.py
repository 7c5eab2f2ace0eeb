"""Does decoding starve the network? Images a second of reading (decode and resize) by threads, and of training.

    python benchmarks/loading.py [--count 512] [--repeat 3]

JPEG of 256x256 resized to 64, PNG of 32x32 kept; medians, the cases in turn. The small network trains on the same
shapes. Prints one table and writes JSON beside it with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from undiffuse.data.folder import Files, Images
from undiffuse.data.store import Folder
from undiffuse.training import Trainer, make_recipe

CASES = {"JPEG 256 to 64": ("jpg", 256, 64), "PNG 32": ("png", 32, 32)}
THREADS = (1, 2, 4)
BATCH = 64


def folder(root: Path, extension: str, side: int, count: int) -> Path:
    random = np.random.default_rng(0)
    root.mkdir()
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(root / f"{index}.{extension}", quality=90)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, dict[str, list[float]]] = {case: {} for case in CASES}
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {case: folder(Path(temporary, f[0]), *f[:2], options.count) for case, f in CASES.items()}
        for _ in range(options.repeat):
            for case, (_, _, size) in CASES.items():
                for threads in THREADS:
                    data = Files(Folder(made[case]), Images((size, size)), memory=0, threads=threads)
                    begun = time.perf_counter()
                    for start in range(0, options.count, BATCH):
                        data.batch(range(start, min(start + BATCH, options.count)))
                    rate = options.count / (time.perf_counter() - begun)
                    rates[case].setdefault(f"read, {threads} threads", []).append(rate)
                trainer = Trainer(data, make_recipe("images", data.spec, len(data), "small"), workers=0)
                x0 = trainer.read(0)
                trainer.read = lambda step, team=None, x0=x0: x0  # the network alone
                trainer.update()
                begun = time.perf_counter()
                for _ in range(3):
                    trainer.update()
                seconds = time.perf_counter() - begun
                rates[case].setdefault("train, small network", []).append(3 * len(x0[0]) / seconds)
    print(f"images a second, medians of {options.repeat}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    table = {case: {name: statistics.median(each) for name, each in of.items()} for case, of in rates.items()}
    for case, of in table.items():
        for name, rate in of.items():
            print(f"  {case:16s} {name:24s} {rate:10,.0f}")
    if options.out:
        options.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
