"""`actlas audit MODEL`: is something between this model and its weights?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.shared import (
    Debug,
    Edits,
    Json,
    ModelName,
    Seed,
    example,
    installed,
    load_edits,
    load_model,
    new_app,
    session,
)
from actlas.core.errors import FailureError, InputError

app = new_app()


@app.command(
    epilog=example(
        "actlas audit smollm2",
        "actlas audit smollm2 --save-fingerprint known/",
        "actlas audit ./downloaded --fingerprint known/ --strict",
        "actlas audit smollm2 --edit trojan/",
    )
)
def audit(
    model: ModelName,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="TEXT", help="What to run; default: three short texts. Repeat."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="The original, to compare weights with."),
    ] = None,
    fingerprint: Annotated[
        Path | None, typer.Option("--fingerprint", metavar="DIR", help="A saved fingerprint to compare with.")
    ] = None,
    save_fingerprint: Annotated[
        Path | None, typer.Option("--save-fingerprint", metavar="DIR", help="Save this model's fingerprint.")
    ] = None,
    edit: Edits = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 if anything is found.")
    ] = False,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Check a model for hooks, added vectors and changed weights.

    Lists hooks, swapped functions, parametrisations and parts that the configuration does not imply; runs
    every block again without them, and says what is added to the stream; compares weights with a reference.
    """
    with session(json=json, debug=debug) as out:
        if reference is not None and fingerprint is not None:
            raise InputError("--reference and --fingerprint were both given; choose one")
        from actlas.cli.calibrate import check_target
        from actlas.security.audit import TEXTS
        from actlas.security.audit import audit as look
        from actlas.security.fingerprint import StateFingerprint
        from actlas.security.fingerprint import fingerprint as take

        if save_fingerprint is not None:
            check_target(save_fingerprint)
        known = StateFingerprint.load(fingerprint) if fingerprint is not None else None
        loaded = load_model(model)
        if reference is not None:
            known = take(load_model(reference))
        edits = load_edits(edit, loaded)
        with installed(loaded, edits):
            report = look(loaded, known, texts=tuple(text) if text else TEXTS)
            state = take(loaded)
        out.document = {"model": loaded.name, "fingerprint": state.digest, **report.to_json()}
        out.table(["found", "where", "what"], [(f.kind, f.where, f.said) for f in report.findings])
        out.measurements(report.measurements)
        out.say(*report.notes)
        if save_fingerprint is not None:
            state.save(save_fingerprint)
            out.document["saved"] = str(save_fingerprint)
            out.say(f"fingerprint saved in {save_fingerprint}")
        out.say(f"fingerprint {state.digest}")
        out.say("nothing found" if report.clean else f"{len(report.findings)} findings")
    if strict and not report.clean:
        raise FailureError(
            f"the audit of {loaded.name} found {len(report.findings)} things: {report.findings[0]}"
        )
