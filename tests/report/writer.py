"""What the two processes of `test_card` run: import little, so that they start at once."""

from __future__ import annotations

from actlas.report.cards import Card


def write_many(folder: str, name: str) -> None:
    """Write one card several times."""
    for i in range(6):
        Card(f"{name}{i}").save(folder)
