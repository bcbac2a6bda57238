"""`actlas evaluate LENS [MODEL] [CORPUS]`: how good a dictionary is, beside untrained ones of equal size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlas.cli.shared import Debug, Json, Seed, example, load_model, new_app, one_list, session
from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from actlas.core.dictionary import Dictionary
    from actlas.core.model import Model

app = new_app()


@app.command(
    epilog=example(
        "actlas evaluate sae/ smollm2 prose",
        "actlas evaluate sae/ smollm2 mixed --part core,error,behaviour,probing,removal,first-letter",
        "actlas evaluate sae/ --against other/           (how alike are their features?)",
    )
)
def evaluate(
    lens: Annotated[Path, typer.Argument(metavar="LENS", help="The folder of a saved dictionary.")],
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="The model that it was fitted on.")
    ] = "smollm2",
    corpus: Annotated[
        str,
        typer.Argument(metavar="[CORPUS]", help="Text that it was not fitted on; a name, file or folder."),
    ] = "mixed",
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="NAMES",
            help="core, error, behaviour, probing, removal, first-letter; default: core,behaviour.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens that are encoded.")] = 8192,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Random atoms and directions beside it.")
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="LENS", help="Compare the atoms with another dictionary's."),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Evaluate a dictionary with SAEBench's measures.

    Reconstruction, sparsity, and what the model loses when the reconstruction takes the activation's place;
    on request sparse probing, concept removal, feature absorption and splitting. The numbers of two
    dictionaries that nobody trained, of equal size and equal k, stand beside.
    """
    with session(json=json, debug=debug) as out:
        from actlas.dictionaries.evaluation import DEFAULT, PARTS, dictionary_similarity
        from actlas.dictionaries.evaluation import evaluate as run

        parts = one_list(part) or list(DEFAULT)
        for name in parts:
            if name not in PARTS:
                hint = did_you_mean(name, PARTS)
                raise InputError(f"there is no part {name!r}; the parts are {', '.join(PARTS)}{hint}")
        if against is not None:
            one, other = _dictionary(lens, None), _dictionary(against, None)
            found = dictionary_similarity(one, other, names=(str(lens), str(against)), seed=seed)
            out.document = {"dictionaries": [str(lens), str(against)], "seed": seed, "measurements": found}
            out.measurements(found, title=f"{lens} and {against}")
            return
        from actlas.data import corpus as load_corpus

        text = load_corpus(corpus, seed=seed)
        loaded = load_model(model)
        dictionary = _dictionary(lens, loaded)
        found = run(loaded, dictionary, text, parts=parts, tokens=tokens, controls=controls, seed=seed)
        about = f"{type(dictionary).__name__} of {dictionary.features:,} features at {dictionary.site}"
        out.document = {
            "dictionary": about,
            "model": loaded.name,
            "corpus": text.name,
            "parts": parts,
            "tokens": tokens,
            "seed": seed,
            "measurements": found,
        }
        out.measurements(found, title=f"{about}, {loaded.name}, {text.name}")


def _dictionary(path: Path, model: Model | None) -> Dictionary:
    """Load a dictionary.

    Raises:
        ArtifactError: not an artifact. FingerprintError: another model's.
        InputError: a lens that is no dictionary.
    """
    from actlas.core.dictionary import Dictionary
    from actlas.core.lens import Lens

    found = Lens.load(path, model)
    if not isinstance(found, Dictionary):
        raise InputError(
            f"{path} holds a {type(found).__name__}, which is no dictionary; fit one, e.g. 'actlas fit sae'"
        )
    return found
