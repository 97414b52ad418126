"""What a warm `python test.py` on a tiny config takes of the processor, and how much of it goes into imports.

    python benchmarks/startup.py [--config configs/config_tiny_t2i.yaml] [--repeat 3]

Processor seconds of a process with one thread: the least of several runs, after one that is not counted, because it
fills the system's file cache and writes Python's. Imports: the same for a process that imports the modules that were
found to be loaded, and does nothing else, and for one that imports torch; the rest is loading the weights, and the
request: text, steps, decoding, writing.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT = re.compile(r"import time:\s+\d+ \|\s+\d+ \|\s+(\S+)")
AGAIN = """
import contextlib, importlib, sys
for name in sys.stdin.read().split():
    with contextlib.suppress(Exception):  # what only others may import
        importlib.import_module(name)
"""


def run(words: list[str], *options: str, given: str = "") -> tuple[float, str]:
    """Processor seconds of a Python process, and what it says on standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, all of our modules would be compiled in every run
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *options, *words],
        cwd=ROOT,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/config_tiny_t2i.yaml")
    parser.add_argument("--prompt", default="a red circle on a white background")
    parser.add_argument("--repeat", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out.png" if "t2i" in args.config else "out.mp4")
        words = ["test.py", "--config", args.config, "--prompt", args.prompt, "--output_filename", str(output)]
        run(words)
        total = min(run(words)[0] for _ in range(args.repeat))
        _, said = run(words, "-X", "importtime")
    modules = "\n".join(IMPORT.findall(said))
    imports = min(run(["-c", AGAIN], given=modules)[0] for _ in range(args.repeat))
    torch = min(run(["-c", "import torch"])[0] for _ in range(args.repeat))
    print(
        f"{args.config}: {total:.1f} s of the processor, of which imports {imports:.1f} s, of which torch {torch:.1f} s"
    )


if __name__ == "__main__":
    main()
