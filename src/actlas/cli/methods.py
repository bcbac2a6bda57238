"""`actlas methods [NAME]`: what can be fitted, and with which options."""

from __future__ import annotations

from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, new_app, session

app = new_app()


@app.command(epilog=example("actlas methods", "actlas methods probe", "actlas methods --room steering"))
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show one method with its options.")
    ] = None,
    room: Annotated[
        str | None, typer.Option("--room", metavar="ROOM", help="Only the methods of one room.")
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """List the methods that can be fitted."""
    with session(json=json, debug=debug) as out:
        from actlas.core.errors import InputError, did_you_mean
        from actlas.core.methods import find_method
        from actlas.core.methods import methods as every

        if name is not None:
            info = find_method(name)
            out.document = info.to_json()
            out.say(
                f"{info.name}: {info.summary}", f"room {info.room}, returns {info.returns}, data: {info.data}"
            )
            if info.papers:
                out.say(f"papers: {', '.join(info.papers)}")
            rows = [(k, "required" if v is ... else repr(v)) for k, v in info.options.items()]
            out.table(["option", "default"], rows)
            if info.example:
                out.say(f"example: {info.example}")
            return
        found = list(every().values())
        rooms = sorted({info.room for info in found})
        if room is not None and room not in rooms:
            raise InputError(f"no method is in a room called {room!r}; the rooms are {', '.join(rooms)}"
                             f"{did_you_mean(room, rooms)}")  # fmt: skip
        found = [info for info in found if room in (None, info.room)]
        out.document = {"methods": [info.to_json() for info in found]}
        rows4 = [(i.room, i.name, i.returns, i.summary, ", ".join(i.papers)) for i in found]
        out.table(["room", "method", "returns", "what it does", "papers"], rows4)
