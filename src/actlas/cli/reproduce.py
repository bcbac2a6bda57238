"""`actlas reproduce SLUG`: run a paper's reproduction and print claim, measurements and verdict."""

from __future__ import annotations

from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, new_app, session
from actlas.core.errors import InputError

app = new_app()


@app.command(
    epilog=example("actlas reproduce void", "actlas reproduce void --full --store", "actlas reproduce --all")
)
def reproduce(
    slug: Annotated[
        str | None, typer.Argument(metavar="SLUG", help="A paper that 'actlas papers' lists.")
    ] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="More data: slower and surer.")] = False,
    every: Annotated[bool, typer.Option("--all", help="All papers that have a reproduction.")] = False,
    store: Annotated[bool, typer.Option("--store", help="Keep the result where the docs find it.")] = False,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Test a paper's claim here and judge it.

    The criterion is written down in code before the run; the verdict follows from it.
    """
    with session(json=json, debug=debug) as out:
        from actlas.papers import papers
        from actlas.papers import reproduce as run

        if every == (slug is not None):
            raise InputError("name one paper, or give --all; 'actlas papers' lists them")
        slugs = [p.slug for p in papers(status="reproduced")] if every else [str(slug)]
        results = []
        for number, name in enumerate(slugs):
            result = run(name, quick=not full, seed=seed, store=store)
            results.append(result)
            out.say(*([""] if number else []), str(result))
        made = [result.to_json() for result in results]
        out.document = {"reproductions": made} if every else made[0]
        if every:
            out.table(
                ["paper", "verdict", "seconds"], [(r.slug, r.verdict, round(r.seconds)) for r in results]
            )
