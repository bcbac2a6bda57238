"""`actlas export MODEL --edit EDIT -o TARGET`: a quantised model for vLLM, transformers or llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.shared import Debug, Edits, Json, ModelName, Seed, example, load_with_edits, new_app, session
from actlas.core.errors import InputError

app = new_app()


@app.command(
    epilog=example(
        "actlas export smollm2 --edit awq3/ -o awq3-vllm/                    (compressed-tensors, for vLLM)",
        "actlas export smollm2 --edit awq4/ -o smollm2-awq4.gguf             (for llama.cpp)",
        "actlas export smollm2 --edit awq3/ --format hf -o awq3-hf/          (plain weights, for anything)",
    )
)
def export(
    model: ModelName,
    edit: Edits = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="The folder, or the .gguf file, to write."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="compressed-tensors, gguf or hf; default: gguf for a name that ends so, "
            "else compressed-tensors.",
        ),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Write a quantised model for other programs."""
    with session(json=json, debug=debug) as out:
        from actlas.core.edit import compose
        from actlas.models.exchange import FORMATS
        from actlas.models.exchange import export as write

        if target is None:
            raise InputError("say where to write: --out FOLDER, or --out FILE.gguf")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target} is there already; give another name, or remove it first")
        chosen = format or ("gguf" if target.suffix.lower() == ".gguf" else "compressed-tensors")
        if chosen not in FORMATS:
            raise InputError(f"there is no exchange format {chosen!r}; there are {', '.join(FORMATS)}")
        loaded, edits = load_with_edits(model, edit)
        if not edits:
            raise InputError("there is nothing to export: give a quantised edit, e.g. --edit awq3/")
        whole = compose(edits)
        write(loaded, whole, target, chosen)
        files = [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]
        size = sum(f.stat().st_size for f in files)
        out.document = {
            "model": loaded.name,
            "edit": whole.describe(),
            "format": chosen,
            "saved": str(target),
            "bytes": size,
        }
        out.say(f"{whole.describe()}, saved in {target} ({chosen}, {size / 1e6:.0f} MB)")
        use = {
            "gguf": f"llama-cli -m {target}",
            "hf": f"actlas generate {target} PROMPT, or transformers' from_pretrained",
            "compressed-tensors": f"vllm serve {target}, or transformers' from_pretrained",
        }[chosen]
        out.say(f"use it: {use}")
