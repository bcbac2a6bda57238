"""`actlas select MODEL SOURCE TARGET`: choose the texts of a pool that are most like a few examples."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, session
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.lens import Lens
    from actlas.core.model import Model

app = new_app()


@app.command(
    epilog=example(
        "actlas select smollm2 pool.jsonl examples.jsonl --ratio 0.05 -o chosen.jsonl",
        "actlas select smollm2 pool.jsonl examples.jsonl --lens sae/ -o chosen.jsonl",
    )
)
def select(
    model: ModelName,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The pool: a corpus, a file or a folder.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A few texts like those you want.")],
    lens: Annotated[
        str,
        typer.Option(
            "--lens",
            metavar="DIR|itda|raw",
            help="A saved dictionary; itda: fit one on the pool; raw: compare raw activations.",
        ),
    ] = "itda",
    site: Annotated[
        str, typer.Option("--site", metavar="SITE", help="Where to read; a saved lens knows its own.")
    ] = "penultimate",
    ratio: Annotated[float, typer.Option("--ratio", metavar="R", help="Part of the pool to keep.")] = 0.05,
    similarity: Annotated[
        str, typer.Option("--similarity", metavar="NAME", help="jaccard, cosine or euclidean.")
    ] = "jaccard",
    pool: Annotated[
        str, typer.Option("--pool", metavar="NAME", help="mean or max over a text's tokens.")
    ] = "mean",
    duplicates: Annotated[
        float | None,
        typer.Option("--duplicates", metavar="S", help="Skip texts that overlap by more with a better one."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=16, metavar="N", help="Tokens of the pool that an itda is fitted on.")
    ] = 16_384,
    k: Annotated[
        int, typer.Option("--k", min=1, metavar="N", help="Atoms a token is rebuilt with (itda).")
    ] = 40,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the chosen texts as JSON lines.")
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Choose the texts of a pool that are most like a few examples.

    What counts is what the model makes of them, not their words.
    With each choice come the features that it shares with the examples.
    """
    with session(json=json, debug=debug) as out:
        from actlas.data import corpus
        from actlas.select import by_activation

        texts, examples = corpus(source, seed=seed), corpus(target, seed=seed)
        loaded = load_model(model)
        reader = _lens(lens, loaded, texts, site, tokens, k, seed)
        chosen = by_activation(
            loaded,
            reader,
            texts,
            examples,
            site=site,
            ratio=ratio,
            similarity=similarity,  # type: ignore[arg-type]
            pool=pool,  # type: ignore[arg-type]
            duplicates=duplicates,
            seed=seed,
        )
        records: list[dict[str, Any]] = [
            {
                "id": texts[i].id,
                "score": float(chosen.scores[i]),
                "shared": [
                    {"latent": s.latent, "sign": s.sign, "share": s.share, "what": _what(reader, s.latent)}
                    for s in shared
                ],
                "text": texts[i].text,
            }
            for i, shared in zip(chosen.indices, chosen.top_shared_latents, strict=True)
        ]
        out.document = {
            "model": loaded.name,
            "lens": lens,
            "similarity": similarity,
            "of": len(texts),
            "chosen": records,
            "measurements": list(chosen.measurements),
        }
        if out_file is not None:
            from actlas.core.artifact import atomic_write

            lines = "".join(jsonlib.dumps(r, ensure_ascii=False) + "\n" for r in records)
            atomic_write(out_file, lines)
            out.document["saved"] = str(out_file)
            out.say(f"{len(records)} of {len(texts)} texts, saved in {out_file}")
        rows = [(f"{r['score']:.3f}", r["id"], _shared(r), _start(r["text"])) for r in records[:20]]
        out.table(["score", "id", "shared most", "text"], rows, right=("score",))
        out.measurements(chosen.measurements)


def _lens(given: str, model: Model, texts: Any, site: str, tokens: int, k: int, seed: int) -> Lens | None:
    """Return the lens that `--lens` names.

    Raises:
        ArtifactError: not a saved lens. InputError: a pool too small to fit one on.
    """
    if given == "raw":
        return None
    if given != "itda":
        from actlas.core.lens import Lens

        return Lens.load(given, model)
    from actlas.dictionaries.itda import fit_itda
    from actlas.select.samples import read_site

    where = read_site(model, site)
    try:
        return fit_itda(model, texts, where, k=k, tokens=tokens, held_out=0, seed=seed)
    except InputError as error:
        raise InputError(f"no dictionary could be fitted on the pool ({error}), or try --lens raw") from error


def _what(lens: Lens | None, latent: int) -> str:
    label = getattr(lens, "label", None)
    return str(label(latent)) if callable(label) else ""


def _shared(record: dict[str, Any]) -> str:
    said = [f"{'-' if s['sign'] < 0 else ''}{s['latent']}" for s in record["shared"][:3]]
    return ", ".join(said) or "-"


def _start(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
