"""`actlas features LENS [MODEL] [CORPUS]`: what the features of a dictionary mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, load_model, new_app, session

app = new_app()


@app.command(
    epilog=example(
        "actlas features sae/",
        "actlas features sae/ smollm2 mixed --html features.html",
        "actlas features sae/ --feature 417",
        "actlas features sae/ --search whale",
    )
)
def features(
    lens: Annotated[Path, typer.Argument(metavar="LENS", help="The folder of a fitted dictionary.")],
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="The model that it was fitted on.")
    ] = "smollm2",
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="[CORPUS]", help="Text to read: mixed, prose, code, docs, a file or a folder."
        ),
    ] = "mixed",
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the feature browser, one offline page."),
    ] = None,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", metavar="N", help="Show this feature. Repeatable.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Show features whose label or tokens contain it.")
    ] = None,
    most: Annotated[int, typer.Option("--most", "-n", metavar="N", help="How many to show.")] = 8,
    contexts: Annotated[int, typer.Option(min=1, metavar="N", help="Contexts kept for each feature.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to read.")] = 30_000,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Show what the features of a dictionary mean.

    Reads text once and shows, for every feature, its contexts, the tokens it raises at the output, its
    neighbours, and a label where a stated rule finds one that holds on text it was not chosen on.
    """
    with session(json=json, debug=debug) as out:
        from actlas.core.artifact import load_artifact
        from actlas.core.dictionary import Dictionary
        from actlas.core.errors import InputError
        from actlas.core.lens import Lens
        from actlas.data import corpus as load_corpus
        from actlas.dictionaries.feature_atlas import feature_atlas

        load_artifact(lens, "lens")
        text = load_corpus(corpus, seed=seed)
        loaded = load_model(model)
        found = Lens.load(lens, loaded)
        if not isinstance(found, Dictionary):
            raise InputError(f"{lens} holds a {type(found).__name__}; features are shown for dictionaries")
        for number in feature or []:
            found.check_feature(number)
        atlas = feature_atlas(loaded, found, text, max_tokens=tokens, contexts=contexts, name=corpus)
        if feature:
            shown = [atlas.feature(n) for n in feature]
        elif search is not None:
            shown = atlas.search(search)[:most]
            if not shown:
                raise InputError(
                    f"no feature's label or tokens contain {search!r}; try another word or more --tokens"
                )
        else:
            shown = (atlas.named or sorted(atlas.features, key=lambda f: -f.firings))[:most]
        out.document = {"about": atlas.about, "features": [f.to_json() for f in shown]}
        about = atlas.about
        out.say(
            f"{about['dictionary']} at {about['site']}: {about['features']:,} features over "
            f"{about['tokens']:,} tokens of {corpus}; {about['dead']:,} never fired, {about['named']:,} "
            "have a label",
            "",
        )
        for one in shown:
            out.say(*str(one).splitlines(), "")
        if html is not None:
            atlas.save_html(html)
            out.document["html"] = str(html)
            out.say(f"wrote {html}")
