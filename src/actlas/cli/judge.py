"""`actlas judge MODEL [DICTIONARY]`: a dictionary on a task of known variables, beside supervised ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlas.cli.output import Output, interval
from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, one_list, session
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.dictionaries.task_eval import TaskReport

app = new_app()


@app.command(
    epilog=example(
        "actlas judge smollm2 sae/",
        "actlas judge smollm2 sae/ --task ioi --change Pos --exchanges 1,2,4,8",
        "actlas judge smollm2 --site blocks.21.resid_post        (only supervised dictionaries)",
    )
)
def judge(
    model: ModelName,
    dictionary: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DICTIONARY]...", help="A saved dictionary; several are patched together."),
    ] = None,
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="A task's name.")] = "ioi",
    site: Annotated[
        list[str] | None, typer.Option("--site", metavar="SITE", help="Where, if no dictionary is given.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=16, metavar="N", help="Prompts to fit on.")] = 512,
    test: Annotated[int, typer.Option(min=8, metavar="N", help="Prompts to test on.")] = 128,
    words: Annotated[
        int, typer.Option(min=4, metavar="N", help="How many words of a list (names) the prompts use.")
    ] = 16,
    change: Annotated[
        list[str] | None,
        typer.Option("--change", metavar="ATTRIBUTE", help="What to change; 'all' for everything at once."),
    ] = None,
    exchanges: Annotated[
        str, typer.Option("--exchanges", metavar="M,...", help="How many features may be exchanged.")
    ] = "1,2,4,8",
    parametrisation: Annotated[
        str, typer.Option(metavar="HOW", help="Supervised vectors: independent, coupled, or IO+Pos,S+Pos.")
    ] = "independent",
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Judge a dictionary on a task whose variables are known.

    Approximation: is the reconstruction enough, is it needed? Control: how much of an attribute's effect do m
    exchanged features move? Interpretability: how well do single features tell the attributes' values?
    Random features and untrained dictionaries are measured beside it.
    """
    with session(json=json, debug=debug) as out:
        numbers = _numbers(exchanges)
        if not dictionary and not site:
            raise InputError("give a saved dictionary, or a --site for supervised dictionaries alone")
        from actlas import data
        from actlas.core.dictionary import Dictionary
        from actlas.dictionaries.task_eval import dictionary_task_eval

        loaded = load_model(model)
        lenses = [Dictionary.load(path, loaded) for path in dictionary or ()]
        by_site = {lens.site: lens for lens in lenses}
        if len(by_site) < len(lenses):
            raise InputError("two of the dictionaries are for one site; give one for each site")
        items = data.task(task, loaded.tokenizer, n=prompts + test, seed=seed, words=words)
        report = dictionary_task_eval(
            loaded, by_site or None, items, site=one_list(site), test=test, exchanges=numbers,
            changes=one_list(change) or None, parametrisation=parametrisation, seed=seed,
        )  # fmt: skip
        out.document = {"model": loaded.name, "task": task, "seed": seed, **report.to_json()}
        _show(out, report)


def _show(out: Output, report: TaskReport) -> None:
    out.say(report.note)
    control = ("edit effect", "edit success", "weight removed")
    edits: dict[tuple[str, ...], dict[str, str]] = {}
    for m in report.measurements:
        if m.name in control:
            key = tuple(m.group.get(k, "") for k in ("change", "dictionary", "choice", "exchanges"))
            value = "-" if m.value != m.value else f"{m.value:.2f} {interval(m)}"
            edits.setdefault(key, {})[m.name] = value
    rows = [[*key, *(cells.get(name, "") for name in control)] for key, cells in edits.items()]
    out.measurements(
        [m for m in report.measurements if m.name in ("sufficiency", "necessity")], "Approximation"
    )
    out.table(["change", "dictionary", "features chosen", "m", *control], rows, right=["m"], title="Control")
    said = ("attribute F1", "features per value", "interpretable features", "attribute size")
    out.measurements([m for m in report.measurements if m.name.startswith(said)], "Interpretability")


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(f"--exchanges {text!r} is not a list of numbers from 1; write e.g. 1,2,4,8")
    return found
