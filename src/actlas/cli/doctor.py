"""`actlas doctor MODEL`: why a model does not work, what its folder lacks, what its outputs mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, session

app = new_app()


@app.command(
    epilog=example(
        "actlas doctor ./my-model", "actlas doctor ./my-model --audit", "actlas doctor smollm2 --outputs"
    )
)
def doctor(
    model: ModelName,
    audit: Annotated[
        bool, typer.Option("--audit", help="Check the folder's card, licence and files instead.")
    ] = False,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="Say what each tensor that the model returns means instead.")
    ] = False,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Find out why a model does not work, and what its folder lacks.

    Everything that using a model needs is tried, stage by stage, with what to do about what fails (exit
    status 1). --audit checks the folder's card, licence and files; --outputs explains what the model returns.
    """
    with session(json=json, debug=debug) as out:
        from actlas.core.errors import InputError

        if audit and outputs:
            raise InputError("--audit and --outputs were both given; choose one")
        if audit:
            from actlas.report.auditing import audit as check_folder

            if not Path(model).exists():
                raise InputError(f"--audit reads a folder, and {model!r} is none; give the model's folder")
            found = check_folder(model)
            out.document = {"model": model, "measurements": found}
            out.measurements(found)
            return
        if outputs:
            from actlas.report.outputs import explain_output

            said = explain_output(load_model(model))
            out.document = said.to_json()
            out.say(str(said))
            return
        from actlas.report.diagnosis import doctor as diagnose

        checks = diagnose(model)
        out.document = {"model": model, "checks": [c.to_json() for c in checks]}
        out.say(*map(str, checks))
    if any(c.status == "failed" for c in checks):
        raise typer.Exit(1)
