"""`actlas papers [SLUG]`: the papers, their claims, and what came out here."""

from __future__ import annotations

from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, new_app, session

app = new_app()


@app.command(epilog=example("actlas papers", "actlas papers void", "actlas papers --room quantize"))
def papers(
    slug: Annotated[
        str | None, typer.Argument(metavar="[SLUG]", help="Show one paper and its stored result.")
    ] = None,
    room: Annotated[
        str | None, typer.Option("--room", metavar="ROOM", help="Only the papers of one room.")
    ] = None,
    status: Annotated[
        str | None, typer.Option("--status", metavar="STATUS", help="Only 'reproduced' or 'planned' ones.")
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """List the papers that Actlas rests on, and what came out here."""
    with session(json=json, debug=debug) as out:
        from actlas.papers.catalogue import paper
        from actlas.papers.catalogue import papers as every

        if slug is not None:
            one = paper(slug)
            out.document = {**one.to_json(), "stored": one.stored}
            out.say(f"{one.slug}: {one.title}", f"room {one.room}, {one.status}", f"claim: {one.claim}")
            out.say(f"result: {one.result}" if one.result else f"no stored result; run: {one.command}")
            return
        found = every(room, status)
        out.document = {"papers": [p.to_json() for p in found]}
        rows = [(p.slug, p.room, p.status, _short(p.title), p.result) for p in found]
        out.table(["slug", "room", "status", "title", "result here"], rows)
        out.say(f"{len(found)} papers, {sum(p.status == 'reproduced' for p in found)} with a reproduction")


def _short(title: str, most: int = 60) -> str:
    return title if len(title) <= most else title[: most - 1].rstrip() + "…"
