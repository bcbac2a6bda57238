"""`actlas convert SOURCE -o TARGET`: lenses and edits from and to other libraries' formats.

Dictionaries go from and to SAELens folders, steering vectors from and to control vectors (GGUF).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.output import Output
from actlas.cli.shared import Debug, Json, Seed, example, load_model, new_app, session
from actlas.core.errors import InputError

app = new_app()


@app.command(
    epilog=example(
        "actlas convert saelens-folder/ --model smollm2 -o sae/     (SAELens -> Actlas)",
        "actlas convert sae/ -o for-saelens/                        (Actlas -> SAELens)",
        "actlas convert vec/ --model smollm2 -o vec.gguf            (Actlas -> llama.cpp)",
        "actlas convert vec.gguf --model smollm2 -o vec/            (llama.cpp, repeng -> Actlas)",
    )
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A SAELens folder, a control vector (.gguf), or a saved lens or edit."
        ),
    ],
    target: Annotated[
        Path, typer.Option("--out", "-o", metavar="PATH", help="The folder, or the .gguf file, to write.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="The model that it is for; needed for SAELens folders and control vectors.",
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
    """Turn SAELens or control-vector files into ours, or back."""
    with session(json=json, debug=debug) as out:
        if _vector_file(source) or _vector_file(target):
            if input_scale is not None:
                raise InputError("--input-scale is for SAELens folders; leave it out")
            _control_vector(out, source, target, model)
            return
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


def _vector_file(path: Path) -> bool:
    return path.suffix.lower() in (".gguf", ".safetensors") and not path.is_dir()


def _control_vector(out: Output, source: Path, target: Path, model: str | None) -> None:
    """Write an edit as a control vector, or read one and save it as an edit."""
    from actlas.cli.calibrate import check_target
    from actlas.cli.shared import load_edits
    from actlas.steering.exchange import read_control_vector, write_control_vector

    if model is None:
        which = source if _vector_file(source) else target
        raise InputError(f"{which} is a control vector; give the model that it is for, e.g. --model smollm2")
    if _vector_file(source):
        check_target(target)
        loaded = load_model(model)
        edit = read_control_vector(source, loaded)
        edit.save(target, loaded)
    else:
        if target.suffix.lower() != ".gguf":
            raise InputError(
                f"{target}: control vectors are written as .gguf; name it e.g. {target.stem}.gguf"
            )
        loaded = load_model(model)
        edit = load_edits([str(source)], loaded)[0]
        write_control_vector(edit, target, loaded)
    out.document = {
        "source": str(source),
        "saved": str(target),
        "format": "control vector" if target.suffix.lower() == ".gguf" else "edit",
        "about": edit.describe(),
    }
    out.say(f"{edit.describe()}, saved in {target}")
    if target.suffix.lower() == ".gguf":
        out.say(f"use it: llama-cli -m MODEL.gguf --control-vector {target}, or --edit {target} here")
    else:
        out.say(f"use it: actlas generate {model} PROMPT --edit '{target}*1' --compare")
