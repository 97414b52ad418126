"""What the server adds to a job: seconds beside the same call in this process, and memory over a hundred jobs.

    python benchmarks/serving.py [--jobs 100]

Starts serve.py on a free port of this machine with a tiny image model. A job's overhead is the time from the request
to the last event, less that of `pipeline.generate` with the same settings in this process, which writes the same file;
both are warm, and take turns, so that a busy machine is busy for both. Prints a table and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "config_tiny_t2i.yaml"
PROMPT = "a yellow square on a navy background"
STEPS = 8


class Client:
    """Asks with one connection a request, as most clients do."""

    def __init__(self, address: str) -> None:
        self.address = address

    def job(self) -> None:
        """A job, from the request to its last event."""
        fields = {"model": "tiny_t2i", "prompt": PROMPT, "steps": STEPS, "seed": 1}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/jobs", json.dumps(fields).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            job: dict[str, Any] = json.load(answer)["data"][0]
        with urllib.request.urlopen(self.address + job["urls"]["events"]) as events:
            last = events.read().decode().strip().rsplit("data: ", 1)[1]
        assert json.loads(last)["state"] == "done", last


def in_process(folder: Path) -> Any:
    """A call that does the same here."""
    from kandinsky.config.reading import load_config
    from kandinsky.loading.assemble import load_pipeline
    from kandinsky.request import resolve_request

    config = load_config(CONFIG)
    pipeline = load_pipeline(config, "cpu")
    request = resolve_request(config, PROMPT, seed=1, num_steps=STEPS)
    return lambda: pipeline.generate(request, save_path=folder / "here.png", progress=False)


def seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def resident(pid: int) -> float:
    """MB of 2^20 bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def children(pid: int) -> list[int]:
    """Of all its threads."""
    return [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=100)
    args = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            str(REPOSITORY / "serve.py"),
            "--config",
            str(CONFIG),
            "--port",
            "0",
            "--device",
            "cpu",
        ]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        process: Any = subprocess.Popen([*words, "--output_dir", folder], **quiet)  # type: ignore[call-overload]
        try:
            client = Client(process.stdout.readline().strip())
            here = in_process(Path(folder))
            for call in (client.job, here) * 3:  # warm
                call()
            processes = {"server": process.pid, "worker": children(process.pid)[0]}
            before = {name: resident(pid) for name, pid in processes.items()}
            served, own, grown = [], [], dict[str, list[float]]()
            for job in range(args.jobs):
                served.append(seconds(client.job))
                own.append(seconds(here))
                if (job + 1) % max(args.jobs // 4, 1) == 0:
                    for name, pid in processes.items():
                        grown.setdefault(name, []).append(resident(pid) - before[name])
        finally:
            process.terminate()
            process.wait()
    extra = [1000 * (a - b) for a, b in zip(served, own, strict=True)]
    print(f"{args.jobs} jobs of {STEPS} steps, 128x128, one after the other")
    print(f"in this process   median {1000 * statistics.median(own):.0f} ms")
    print(f"over HTTP         median {1000 * statistics.median(served):.0f} ms")
    print(f"overhead          median {statistics.median(extra):.0f} ms")
    for name, values in grown.items():
        print(f"{name}'s memory, MB more after each quarter: {', '.join(f'{value:+.1f}' for value in values)}")


if __name__ == "__main__":
    main()
