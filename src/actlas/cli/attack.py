"""`actlas attack MODEL [PAIRS]`: how easily a vector hijacks a model's answers, and what would notice it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, session
from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from actlas.cli.output import Output
    from actlas.security.attack import AttackReport

SEARCHES = ("js", "margin")
app = new_app()


@app.command(
    epilog=example(
        "actlas attack smollm2",
        "actlas attack smollm2 pairs.jsonl --search margin --strength 1.6",
        "actlas attack smollm2 sentiment --every 1 -o trojan/",
    )
)
def attack(
    model: ModelName,
    pairs: Annotated[
        str,
        typer.Argument(
            metavar="[PAIRS]",
            help="JSONL of 'positive' (wanted) and 'negative' answers with a shared beginning, or a task.",
        ),
    ] = "capitals",
    search: Annotated[
        str,
        typer.Option(metavar="HOW", help="js (published): where the sides differ; margin: where it works."),
    ] = "margin",
    strength: Annotated[float, typer.Option(min=0.0, metavar="X", help="Multiple of the vector.")] = 0.8,
    layers: Annotated[
        str | None, typer.Option(metavar="A-B", help="Blocks to search, e.g. 0-14; default: all.")
    ] = None,
    stride: Annotated[int, typer.Option(min=1, metavar="N", help="Search every so-manieth block.")] = 3,
    every: Annotated[
        int, typer.Option(min=0, metavar="N", help="Attack every so-manieth block for comparison; 0: none.")
    ] = 6,
    items: Annotated[int, typer.Option("--items", min=4, metavar="N", help="Pairs to use.")] = 48,
    corpus: Annotated[
        str | None, typer.Option(metavar="CORPUS", help="Clean text, for the price and the monitors.")
    ] = None,
    controls: Annotated[int, typer.Option(min=1, metavar="N", help="Random vectors of equal norm.")] = 5,
    out_folder: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Save the attack as an edit.")
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure how easily a vector hijacks a model's answers.

    For your own models. A vector is fitted that pushes answers from 'positive' to 'negative', and measured on
    pairs it has not seen beside random vectors of equal norm and its opposite. Then it is injected in seven
    ways, to see which look of 'actlas audit' finds it; with --corpus, monitors are calibrated on clean text.
    """
    with session(json=json, debug=debug) as out:
        if search not in SEARCHES:
            hint = did_you_mean(search, SEARCHES) or f"; there are {', '.join(SEARCHES)}"
            raise InputError(f"there is no search {search!r}{hint}")
        if out_folder is not None:
            from actlas.cli.calibrate import check_target

            check_target(out_folder)
        from actlas import data
        from actlas.security.attack import attack as measure_attack

        loaded = load_model(model)
        given = data.labelled(pairs, loaded.tokenizer, n=items, seed=seed, only_pairs=True)
        report = measure_attack(
            loaded,
            given,
            clean=None if corpus is None else data.corpus(corpus, seed=seed),
            controls=controls,
            every=every,
            seed=seed,
            search=search,
            strength=strength,
            layers=layers,
            stride=stride,
        )
        out.document = {"model": loaded.name, "pairs": pairs, "seed": seed, **report.to_json()}
        _show(out, report)
        if out_folder is not None:
            report.trojan.edit.save(out_folder, loaded)
            out.document["saved"] = str(out_folder)
            out.say(f"saved in {out_folder}; it is found by: actlas audit {model} --edit {out_folder}")


def _show(out: Output, report: AttackReport) -> None:
    out.say(f"{report.trojan.direction.describe()}, subtracted {report.trojan.strength:g} times")
    effect = [m for m in report.measurements if "detected" not in m.name and "alarms" not in m.name]
    defence = [m for m in report.measurements if m not in effect]
    out.measurements(effect, "The attack, on pairs it was not fitted on")
    if report.layers:
        rows = [[r["site"], *(f"{r[k]:.3f}" for k in ("attack", "random"))] for r in report.layers]
        out.table(
            ["site", "P under attack", "P under random"], rows, right=("P under attack", "P under random")
        )
    out.measurements(defence, "What notices it")
