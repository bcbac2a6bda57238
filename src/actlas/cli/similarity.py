"""`actlas similarity MODEL_A MODEL_B CORPUS`: how alike the layers of two models are, on the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.shared import Debug, Json, Seed, example, load_model, new_app, session
from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from actlas.cli.output import Output
    from actlas.core.model import Model

KINDS = ("cka", "svcca", "relative", "linreg", "itda")
app = new_app()


@app.command(
    epilog=example(
        "actlas similarity smollm2 smollm2 prose --site blocks.0-5.resid_post",
        "actlas similarity smollm2 ./my-finetune prose --kind itda --tokens 8192",
    )
)
def similarity(
    model_a: Annotated[str, typer.Argument(metavar="MODEL_A", help="A model.")],
    model_b: Annotated[
        str, typer.Argument(metavar="MODEL_B", help="Another with the same tokenizer, or the same again.")
    ],
    corpus: Annotated[
        str, typer.Argument(metavar="[CORPUS]", help="prose, code, docs, mixed, a file or a folder.")
    ] = "mixed",
    kind: Annotated[str, typer.Option("--kind", metavar="KIND", help=", ".join(KINDS) + ".")] = "cka",
    site: Annotated[
        str, typer.Option("--site", metavar="SITES", help="Which sites of each model.")
    ] = "blocks.*.resid_post",
    tokens: Annotated[int, typer.Option(min=16, metavar="N", help="Tokens that both read.")] = 2048,
    k: Annotated[int, typer.Option("--k", min=1, metavar="N", help="Steps of matching pursuit (itda).")] = 8,
    cos_min: Annotated[
        float, typer.Option("--cos-min", metavar="C", help="What is rebuilt worse becomes an atom (itda).")
    ] = 0.9,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Compare the layers of two models on the same tokens.

    Shows the similarity of every layer of one with every layer of the other and, where both have as many
    layers, how often the most similar layer is the one of the same number.
    """
    with session(json=json, debug=debug) as out:
        if kind not in KINDS:
            raise InputError(
                f"there is no kind {kind!r}{did_you_mean(kind, KINDS) or '; there are ' + ', '.join(KINDS)}"
            )
        from actlas.data import corpus as find_corpus
        from actlas.measure.similarity import layer_matching, similarity_matrix

        texts = find_corpus(corpus, seed=seed)
        first = load_model(model_a)
        second = first if model_b == model_a else load_model(model_b)
        _check_tokenizers(first, second)
        a = _layers(first, texts, site, tokens)
        b = a if second is first else _layers(second, texts, site, tokens)
        if kind == "itda":
            a, b = (_dictionaries(x, k, cos_min) for x in (a, b))
        options: dict[str, Any] = {} if kind != "relative" and kind != "linreg" else {"seed": seed}
        matrix = similarity_matrix(a, b, kind, **options)  # type: ignore[arg-type]
        found = [] if len(a) != len(b) else [layer_matching(matrix)]
        out.document = {
            "models": [first.name, second.name],
            "kind": kind,
            "sites": [list(a), list(b)],
            "similarity": matrix.tolist(),
            "measurements": found,
        }
        _show(out, matrix, list(a), list(b))
        out.measurements(found)


def _check_tokenizers(a: Model, b: Model) -> None:
    one, other = a.fingerprint.tokenizer, b.fingerprint.tokenizer
    if one is None or other is None or one != other:
        raise InputError(
            f"{a.name} and {b.name} do not read the same tokens (their tokenizers differ); give two models "
            "with one tokenizer"
        )


def _layers(model: Model, texts: Any, site: str, tokens: int) -> dict[str, Tensor]:
    """Return the rows of each site, massive activations included: rows must stay the same tokens."""
    import torch

    found: dict[str, list[Tensor]] = {}
    for trace in model.stream(texts, site, context=min(128, model.context_length or 128), max_tokens=tokens):
        for name in trace:
            found.setdefault(name, []).append(trace.rows(name).flatten(1).float().cpu().clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _dictionaries(layers: dict[str, Tensor], k: int, cos_min: float) -> dict[str, Any]:
    import torch

    from actlas.dictionaries.itda import fit_itda

    n = len(next(iter(layers.values())))
    labels = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)], dim=1)
    return {
        name: fit_itda(None, x, name, k=k, cos_min=cos_min, tokens=None, batch=128, held_out=0, labels=labels)
        for name, x in layers.items()
    }


def _show(out: Output, matrix: Tensor, a: list[str], b: list[str]) -> None:
    best = matrix.argmax(1).tolist()
    rows = [
        [name, *(f"{v:.3f}{'*' if j == best[i] else ''}" for j, v in enumerate(matrix[i].tolist()))]
        for i, name in enumerate(a)
    ]
    out.table(["", *b], rows, right=b)
    out.say("* the most similar one of its row")
