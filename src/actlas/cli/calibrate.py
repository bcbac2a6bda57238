"""`actlas calibrate MODEL CORPUS`: statistics of activations, read once and saved."""

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
    one_list,
    session,
)
from actlas.core.errors import InputError

app = new_app()


@app.command(
    epilog=example(
        "actlas calibrate smollm2 prose --site 'blocks.*.mlp.act' --tokens 5000 -o cal/",
        "actlas calibrate smollm2 notes.txt --site blocks.5.resid_post --stats moments,hessian -o cal/",
    )
)
def calibrate(
    model: ModelName,
    corpus: Annotated[
        str,
        typer.Argument(metavar="CORPUS", help="prose, code, docs, mixed, a text file, JSONL or a folder."),
    ],
    site: Annotated[
        list[str], typer.Option("--site", metavar="SITE", help="A site or pattern. Repeat for several.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to save it.")],
    stats: Annotated[
        list[str] | None,
        typer.Option(
            "--stats",
            metavar="NAMES",
            help="What to keep, e.g. moments,absmax,quantiles,kurtosis,hessian,rows.",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after so many tokens.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens a document is cut into.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in one forward pass.")] = 2048,
    field: Annotated[
        str, typer.Option(metavar="NAME", help="The JSON field or column that holds the text.")
    ] = "text",
    edit: Edits = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Read a corpus once and save statistics of the activations."""
    with session(json=json, debug=debug) as out:
        from actlas.data import corpus as load_corpus

        text = load_corpus(corpus, seed=seed, field=field)
        check_target(out_folder)
        loaded = load_model(model)
        edits = load_edits(edit, loaded)
        from actlas.core.calibration import calibrate as run
        from actlas.core.calibration.statistics import DEFAULT_STATISTICS
        from actlas.core.measurement import format_number

        with installed(loaded, edits):
            made = run(
                loaded,
                text,
                one_list(site),
                one_list(stats) or DEFAULT_STATISTICS,
                batch_tokens=batch_tokens,
                context=context,
                max_tokens=tokens,
                seed=seed,
            )
        made.save(out_folder)
        rows = []
        for name, found in made.items():
            record = {"site": name, "rows": found.count, "massive rows left out": found.massive.count}
            if "absmax" in made.stats:
                record["absolute maximum"] = float(found.absmax.max())
            if "moments" in made.stats:
                record["root mean square"] = float(found.second_moment.mean() ** 0.5)
            rows.append(record)
        out.document = {
            "model": loaded.name,
            "corpus": {"name": text.name, "hash": text.hash, "source": text.source},
            "tokens": made.tokens,
            "stats": list(made.stats),
            "seed": seed,
            "sites": rows,
            "saved": str(out_folder),
        }
        columns = list(rows[0])
        cells = [[format_number(v) if isinstance(v, float) else v for v in row.values()] for row in rows]
        out.table(columns, cells, right=columns[1:])
        out.say(f"{made.tokens:,} tokens of {text.name} read; saved in {out_folder}")


def check_target(path: Path) -> None:
    """Refuse, before the work starts, a folder that could not be replaced at its end.

    Raises:
        InputError: it is a file, or a folder that is not an artifact of ours.
    """
    if path.exists() and (
        not path.is_dir() or (any(path.iterdir()) and not (path / "manifest.json").exists())
    ):
        raise InputError(f"{path} exists and is not an Actlas artifact; give another name or remove it")
