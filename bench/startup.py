"""How long `actlas --help` and `import actlas` take, in fresh processes, beside a bare Python."""

from __future__ import annotations

import subprocess
import sys
import time

from bench.harness import ROOT, Figure, median, report, say

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "actlas --help": [
        sys.executable,
        "-c",
        "import sys; sys.argv = ['actlas', '--help']\nfrom actlas.cli.main import run; run()",
    ],
    "python -c 'import actlas'": [sys.executable, "-c", "import actlas"],
}
IMPORT = "import time; t = time.perf_counter(); import actlas; print(time.perf_counter() - t)"


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    rounds = max(rounds, 9)  # they are short
    samples: dict[str, list[float]] = {name: [] for name in [*COMMANDS, "import actlas"]}
    for name in (*COMMANDS, *COMMANDS):  # once to fill the file cache and write the byte code
        subprocess.run(COMMANDS[name], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            samples[name].append(time.perf_counter() - start)
        out = subprocess.run(
            [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
        )
        samples["import actlas"].append(float(out.stdout))
    say(f"{rounds} rounds done")
    figures: list[Figure] = [
        median("actlas --help, whole process", samples["actlas --help"], "s", 0.4),
        median("import actlas, inside a fresh process", samples["import actlas"], "s", 0.2),
        median("python -c 'import actlas', whole process", samples["python -c 'import actlas'"], "s"),
        median("python -c pass, whole process", samples["python -c pass"], "s", note="the baseline"),
    ]
    return report("startup", "Start-up, medians of fresh processes", figures)
