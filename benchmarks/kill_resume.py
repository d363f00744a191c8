"""Kills a run with SIGKILL at random moments, resumes it, and compares every file with an uninterrupted run's.

    python benchmarks/kill_resume.py [--recipe digits-edge] [--kills 10] [--seed 0] [--set KEY=VALUE ...]

The moments are drawn uniformly from the time that the uninterrupted run takes, from its start to its end. Compared
byte for byte: every file under artifacts/ (model files, golden vectors, manifests) and the weights of every stage.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import print_machine

EDGEQAT = [sys.executable, "-c", "from edgeqat.cli import main; main()", "run"]
THREADS = 1
"""Threads of every run: sums of another number of threads are other sums."""


def command(options: argparse.Namespace, folder: Path, *more: str) -> list[str]:
    """The command line of a run."""
    settings = [part for setting in options.set for part in ("--set", setting)]
    return [*EDGEQAT, options.recipe, "-o", str(folder), *settings, *more]


def finish(words: list[str]) -> float:
    """Runs a command to its end; its seconds."""
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode not in (0, 3):  # 3: the gate, which is not the matter here
        raise SystemExit(f"exit code {done.returncode}: {done.stderr}")
    return time.perf_counter() - started


def kill_after(words: list[str], seconds: float, log: Path) -> str:
    """Starts a command, kills it with SIGKILL; the last stage that it told of."""
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment())
        time.sleep(seconds)
        ended = process.poll() is not None
        process.kill()
        process.wait()
    lines = log.read_text().splitlines()
    return "ended before" if ended else (lines[-1].strip() if lines else "not a line yet")


def environment() -> dict[str, str]:
    """With unbuffered output, so that the log shows where a run was killed."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(THREADS)}


def contents(folder: Path) -> dict[str, bytes]:
    """By name: every file of the artifacts and every stage's final weights."""
    places = [*(folder / "artifacts").rglob("*"), *(folder / "checkpoints").glob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in places if path.is_file()}


def main() -> None:
    """One line a kill, then the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-edge")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    print_machine(THREADS)
    moments = random.Random(options.seed)
    equal = 0
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        seconds = finish(command(options, whole))
        expected = contents(whole)
        print(f"{options.recipe}, uninterrupted: {seconds:.1f} s, {len(expected)} files to compare", flush=True)
        for index in range(options.kills):
            folder, moment = Path(temporary) / f"killed{index}", moments.uniform(0, seconds)
            where = kill_after(command(options, folder), moment, Path(temporary) / "log")
            took = finish(command(options, folder, "--resume"))
            found = contents(folder)
            different = [n for n in sorted({*expected, *found}) if expected.get(n) != found.get(n)]
            equal += not different
            result = f"differ: {', '.join(different)}" if different else f"{len(found)} files equal"
            print(f"killed after {moment:6.1f} s ({where}), resumed in {took:6.1f} s: {result}", flush=True)
    print(f"{equal} of {options.kills} resumed runs equal the uninterrupted one, byte for byte (seed {options.seed})")
    sys.exit(0 if equal == options.kills else 1)


if __name__ == "__main__":
    main()
