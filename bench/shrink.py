"""What `actlas shrink smollm2` finds on this machine: every mix with its quality and its speed.

The search is run with everything measured, also what cannot win, so that the plot of the documentation shows
the whole frontier; `python -m bench.shrink_page` writes the page from the stored result.
"""

from __future__ import annotations

import sys

from bench.harness import Figure, report


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    from actlas.report.shrink import Effort, shrink

    found = shrink(
        "smollm2",
        everything=True,
        effort=Effort(tokens=2048, calibration=2048, repeats=max(rounds, 5)),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    chosen = found.chosen
    rise = None if chosen.high is None else 100 * (chosen.high - 1)
    figures = [
        Figure("perplexity of the chosen mix, rise (upper end)", rise, "%", 1.0, chosen.name),
        Figure(
            "speed of the chosen mix", chosen.speed, "x transformers", None, f"{chosen.rate:.1f} tokens/s"
        ),
        *(
            Figure(
                f"{row.name} ({row.runtime})",
                row.rate,
                "tokens/s",
                None,
                f"{found.quality} x {row.quality:.4f}",
            )
            for row in found.rows
        ),
    ]
    title = "Shrinking smollm2 within 1% perplexity"
    return report("shrink", title, figures, {"shrunk": found.to_json()})
