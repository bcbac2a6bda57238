"""`actlas convert SOURCE -o TARGET`: dictionaries from and to other libraries' formats (SAELens)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, load_model, new_app, session
from actlas.core.errors import InputError

app = new_app()


@app.command(
    epilog=example(
        "actlas convert saelens-folder/ --model smollm2 -o sae/     (SAELens -> Actlas)",
        "actlas convert sae/ -o for-saelens/                        (Actlas -> SAELens)",
    )
)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A SAELens folder, or a saved lens.")],
    target: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The model that the dictionary reads; needed for a SAELens folder.",
        ),
    ] = None,
    input_scale: Annotated[
        float | None,
        typer.Option(
            "--input-scale",
            metavar="X",
            help="Factor of SAELens' expected_average_only_in normalisation, where it is not folded in.",
        ),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Turn a SAELens folder into a lens, or the reverse."""
    with session(json=json, debug=debug) as out:
        from actlas.cli.calibrate import check_target
        from actlas.core.dictionary import Dictionary
        from actlas.dictionaries.saelens import is_saelens, load_saelens, save_saelens

        if is_saelens(source):
            if model is None:
                raise InputError(
                    f"{source} is a SAELens folder; give the model that it reads, e.g. --model smollm2"
                )
            check_target(target)
            loaded = load_model(model)
            lens: Dictionary = load_saelens(source, loaded, input_scale=input_scale)
            lens.save(target, loaded)
            into = "lens"
        else:
            if input_scale is not None:
                raise InputError("--input-scale is for SAELens folders; leave it out")
            lens, into = Dictionary.load(source), "saelens"
            save_saelens(lens, target, model_name=model or "")
        out.document = {
            "source": str(source),
            "saved": str(target),
            "format": into,
            "kind": type(lens).__name__,
            "site": lens.site,
            "channels": lens.channels,
            "features": lens.features,
        }
        out.say(f"{type(lens).__name__} at {lens.site}, {lens.features:,} features, saved in {target}")
        if into == "lens":
            out.say(f"use it: actlas generate {model} PROMPT --edit '{target}#0*4'")
