"""`actlas models`: the bundled models, and the cache that holds them."""

from __future__ import annotations

from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, new_app, session

app = new_app()


@app.command(
    epilog=example("actlas models", "actlas models --fetch smollm2", "actlas models --remove minilm")
)
def models(
    fetch: Annotated[
        list[str] | None,
        typer.Option("--fetch", metavar="NAME", help="Download and convert it now. Repeatable."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="NAME", help="Remove it from the cache. Repeatable."),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """List the bundled models, fetch or remove them."""
    with session(json=json, debug=debug) as out:
        from actlas.models import bundled
        from actlas.models import remove as discard
        from actlas.models.catalogue import find, prepare

        for name in (*(fetch or ()), *(remove or ())):
            find(name)
        for name in remove or ():
            out.say(f"removed {name}: {_megabytes(discard(name))} freed")
        for name in fetch or ():
            out.say(f"{name} is in {prepare(find(name))}")
        known = bundled()
        out.document = {"models": [info.to_dict() for info in known.values()]}
        if fetch or remove:
            return
        rows = [
            (i.name, i.what, i.licence, _megabytes(i.size), _megabytes(i.bytes_on_disk) if i.cached else "no")
            for i in known.values()
        ]
        out.table(["name", "model", "licence", "download", "in the cache"], rows)
        out.say("Other models: give a folder, a GGUF file, or a name on a hub.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
