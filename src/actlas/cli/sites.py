"""`actlas sites MODEL [PATTERN]`: where activations can be read and edited."""

from __future__ import annotations

from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, session

app = new_app()


@app.command(
    epilog=example(
        "actlas sites smollm2", "actlas sites smollm2 'blocks.4-9.mlp.act'", "actlas sites ./my-model"
    )
)
def sites(
    model: ModelName,
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="[PATTERN]", help="Only the sites it names, e.g. 'blocks.*.attn.z'."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One line for each block, not one for all.")] = False,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """List where a model's activations can be read and edited.

    Sites that this architecture has not got are listed with the reason. A model of unknown architecture
    has `module:` sites, one for each of its submodules.
    """
    with session(json=json, debug=debug) as out:
        loaded = load_model(model)
        found = loaded.sites(pattern)
        out.document = {
            "model": loaded.name,
            "kind": loaded.kind,
            "architecture": loaded.fingerprint.architecture,
            "layout": loaded.layout is not None,
            "sites": [
                {
                    "name": site.name,
                    "kind": site.kind,
                    "block": site.block,
                    "shape": site.shape,
                    "module": site.module,
                    "absent": site.absent,
                }
                for site in found
            ],
        }
        lines: dict[tuple[str, str, str | None], list[int]] = {}
        for site in found:
            block = f"blocks.{site.block}."
            whole = pattern is not None or every or site.block is None
            name = site.name if whole else site.name.replace(block, "blocks.*.", 1)
            lines.setdefault((name, site.shape, site.absent), []).append(site.block or 0)
        if loaded.layout is None:
            out.say(
                f"{loaded.name} ({loaded.fingerprint.architecture}) has no layout: its sites are its modules."
            )
        rows = [(name, shape, _state(absent, len(blocks))) for (name, shape, absent), blocks in lines.items()]
        out.table(["site", "shape", ""], rows)


def _state(absent: str | None, count: int) -> str:
    if absent:
        return f"absent: {absent}"
    return f"{count} blocks" if count > 1 else ""
