"""`actlas card [MODEL]`: the activation card."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.shared import (
    STATE,
    Debug,
    Edits,
    Json,
    Seed,
    example,
    load_with_edits,
    new_app,
    one_list,
    session,
)

app = new_app()


@app.command(
    epilog=example(
        "actlas card",
        "actlas card --fill-template about.yaml",
        "actlas card ./my-model --out my-card --fill about.yaml",
        "actlas card smollm2 --full --sections behaviour,sparsity",
    )
)
def card(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A bundled name, a folder, a GGUF file or a hub name.")
    ] = "smollm2",
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")
    ] = Path("card"),
    full: Annotated[bool, typer.Option("--full/--quick", help="About ten times as much data.")] = False,
    fill: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="What only the author knows: intended use, limits, contact."),
    ] = None,
    fill_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Write an empty file for --fill, with comments, and stop."),
    ] = None,
    sections: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Only these sections, e.g. behaviour,sparsity. Repeatable."),
    ] = None,
    edit: Edits = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure a model and write its activation card.

    The folder gets card.html (for reading; works offline), card.md (with model-card metadata) and card.json.
    """
    with session(json=json, debug=debug) as out:
        from actlas.report.fill import load_fill, template

        if fill_template is not None:
            template(fill_template)
            out.document = {"template": str(fill_template)}
            out.say(f"wrote {fill_template}; fill it in, then: actlas card {model} --fill {fill_template}")
            return
        from actlas.report.registry import find_sections
        from actlas.report.saving import check_target

        chosen = one_list(sections) or None
        check_target(out_folder)
        load_fill(fill)
        find_sections(chosen)
        from actlas.report.build import card as build

        loaded, edits = load_with_edits(model, edit)
        made = build(
            loaded,
            out_folder,
            quick=not full,
            seed=seed,
            fill=fill,
            sections=chosen,
            edits=edits,
            command=shlex.join(["actlas", *STATE.arguments]),
            debug=debug,
        )
        files = {kind: str(out_folder / f"card.{kind}") for kind in ("html", "md", "json")}
        out.document = {"files": files, "problems": list(made.problems), "card": made.to_json()}
        for kind, what in (("html", "to look at"), ("md", "for a model hub"), ("json", "for programs")):
            out.say(f"{files[kind]}  ({what})")
        for problem in made.problems:
            out.say(f"not measured: {problem}")
