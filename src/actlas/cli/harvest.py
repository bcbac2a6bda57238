"""`actlas harvest MODEL CORPUS`: activations to disk, row by row, to be read many times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from actlas.store import Store

app = new_app()


@app.command(
    epilog=example(
        "actlas harvest smollm2 prose --site blocks.15.resid_post --rows 100000 -o acts/",
        "actlas harvest smollm2 notes/ --site 'blocks.10-12.mlp.out' --dtype int8 -o acts/",
        "actlas harvest smollm2 prose --site blocks.15.resid_post --rows 100000 -o acts/ --repair",
    )
)
def harvest(
    model: ModelName,
    corpus: Annotated[
        str,
        typer.Argument(metavar="CORPUS", help="prose, code, docs, mixed, a text file, JSONL or a folder."),
    ],
    site: Annotated[
        list[str], typer.Option("--site", metavar="SITE", help="A site or pattern. Repeat for several.")
    ],
    out_folder: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Where; a harvest that was killed goes on there."),
    ],
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after so many tokens; each is a row.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="float16, bfloat16, float32, or int8 with a scale a row.")
    ] = "float16",
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens a document is cut into.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens in one forward pass.")] = 2048,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rows of a file; a kill costs at most these.")
    ] = None,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Store the loss's gradient at each row too, in float32.")
    ] = False,
    keep_massive: Annotated[
        bool,
        typer.Option("--keep-massive", help="Let batches hand out rows of massive activations like others."),
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Share the work among so many Ray workers.")
    ] = 1,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check every file first, and make damaged ones again.")
    ] = False,
    field: Annotated[
        str, typer.Option(metavar="NAME", help="The JSON field or column that holds the text.")
    ] = "text",
    edit: Edits = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Store the activations of a corpus on disk.

    Killed at any moment and called again, it goes on; the rows are the same. --seed orders the corpus.
    """
    with session(json=json, debug=debug) as out:
        from actlas.data import corpus as load_corpus

        text = load_corpus(corpus, seed=seed, field=field)
        loaded = load_model(model)
        edits = load_edits(edit, loaded)
        from actlas import store as room

        with installed(loaded, edits):
            mended = room.repair(out_folder, loaded, text) if repair else []
            store = room.harvest(
                loaded,
                text,
                one_list(site),
                out_folder,
                rows=rows,
                dtype=dtype,
                context=context,
                batch_tokens=batch_tokens,
                shard_rows=shard_rows,
                keep_massive=keep_massive,
                gradient=gradient,
                workers=workers,
            )
        size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        sites = [{"site": name, "channels": store.channels(name)} for name in store.sites]
        out.document = {**_about(store), "sites": sites, "bytes": size, "repaired": mended, "seed": seed}
        if mended:
            out.say(f"made again: {', '.join(mended)}")
        out.table(["site", "channels"], [list(s.values()) for s in sites], right=["channels"])
        found = f"{store.massive:,} of them massive activations" if store.massive else "none massive"
        out.say(
            f"{store.rows:,} rows ({found}) of {text.name}, {store.dtype}, {size / 1e6:,.1f} MB in "
            f"{len(store.shards)} shards, in {out_folder}"
        )


def _about(store: Store) -> dict[str, Any]:
    return {
        "model": store.model_name,
        "corpus": store.corpus,
        "rows": store.rows,
        "massive": store.massive,
        "dtype": store.dtype,
        "gradient": store.gradient,
        "context": store.context_length,
        "shards": len(store.shards),
        "saved": str(store.path),
    }
