"""`actlas measure MODEL [NAMES...]`: numbers about a model, and what edits change about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.output import Output, interval
from actlas.cli.shared import (
    Debug,
    Edits,
    Json,
    Seed,
    example,
    load_with_edits,
    new_app,
    one_list,
    session,
)
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.measure.compare import Comparison

app = new_app()


@app.command(
    epilog=example(
        "actlas measure --list",
        "actlas measure smollm2 perplexity --data prose --tokens 4000",
        "actlas measure smollm2 task-accuracy --data ioi --edit vec*4",
        "actlas measure smollm2 editing --data edits.jsonl --edit memory/",
        "actlas measure smollm2 self-report --edit tuned/",
        "actlas measure smollm2 --suite quantization --edit rtn3/ --edit awq3/",
    )
)
def measure(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A bundled name, a folder, a GGUF file or a hub name."),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAMES]...", help="Measures; default: all that apply.")
    ] = None,
    edit: Edits = None,
    each: Annotated[
        bool, typer.Option("--each", help="One variant for each edit, not one with all.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="CORPUS|TASK|FILE",
            help="Text, a task, images, edit requests or questions to measure on. Repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens that measures on text read.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--quick", help="More text and items: slower, narrower.")
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help="A set of measures that belong together, for every edit apart: quantization.",
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the measures and stop.")] = False,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Measure a model, with and without edits, side by side.

    Every number comes with its 95% interval and how many items are behind it. With edits, each measure is
    taken on the same data with and without them, and the paired difference is shown.
    """
    with session(json=json, debug=debug) as out:
        if listed:
            _list(out)
            return
        if model is None:
            raise InputError(
                "name a model to measure, e.g. 'actlas measure smollm2'; --list shows the measures"
            )
        from actlas.measure import compare, find_measure
        from actlas.measure import measure as run

        if suite is not None:
            _suite(out, suite, model, edit, one_list(names), data, full, seed)
            return
        wanted = one_list(names) or None
        for name in wanted or ():
            find_measure(name)
        on = _data(data, seed)
        loaded, edits = load_with_edits(model, edit)
        out.document = {
            "model": loaded.name,
            "edits": [e.describe() for e in edits],
            "seed": seed,
            "quick": not full,
        }
        if not edits:
            found = run(loaded, wanted, on, seed=seed, quick=not full, tokens=tokens)
            out.document["measurements"] = found
            out.measurements(found, title=f"{loaded.name} ({loaded.kind})")
            return
        variants: dict[str, list[Any]] = {"base": []}
        if each:
            for text, made in zip(edit or (), edits, strict=True):
                variants[text if text not in variants else f"{text} ({len(variants)})"] = [made]
        else:
            variants["edited"] = edits
        compared = compare(loaded, variants, wanted, on, seed=seed, quick=not full, tokens=tokens)
        out.document["comparison"] = compared.to_json()
        out.say(
            *(f"{name}: {', '.join(e.describe() for e in es) or 'no edit'}" for name, es in variants.items())
        )
        _show(out, compared)


def _suite(
    out: Output,
    name: str,
    model: str,
    given: list[str] | None,
    names: list[str],
    data: list[str] | None,
    full: bool,
    seed: int,
) -> None:
    """Run a suite on the model and every edit apart."""
    from actlas.cli.suites import check_suite, run_suite

    check_suite(name, given)
    if names:
        raise InputError(f"a suite has its own measures; leave out {names[0]!r} or --suite")
    on = _data(data, seed)
    if on is not None and set(on) != {"corpus"}:
        raise InputError("--data of a suite is a corpus, e.g. --data prose; its tasks are fixed")
    loaded, edits = load_with_edits(model, given)
    variants = dict(zip((_short(text) for text in given or ()), edits, strict=True))
    out.document = {
        "model": loaded.name,
        "edits": {name: e.describe() for name, e in variants.items()},
        "seed": seed,
        "quick": not full,
    }
    out.say(*(f"{label}: {e.describe()}" for label, e in variants.items()))
    run_suite(out, loaded, variants, None if on is None else on["corpus"], full=full, seed=seed)


def _short(text: str) -> str:
    return text.rstrip("/").rpartition("/")[2] or text


def _show(out: Output, compared: Comparison) -> None:
    """Print one line for each measure and group: every variant's value and its difference from base."""
    base, *others = compared.variants
    lines: dict[Any, dict[str, Any]] = {}
    for row in compared.rows:
        lines.setdefault(row.key, {})[row.variant] = row
    columns = ["measure", base]
    for name in others:
        columns += [name, f"{name} - {base}", "95% interval"]
    rows = []
    for (name, group), found in lines.items():
        label = name + (f" ({', '.join(f'{k}={v}' for k, v in group)})" if group else "")
        cells = [label, _value(found, base)]
        for other in others:
            change = found[other].difference if other in found else None
            value = "-" if change is None else f"{'+' if change.value > 0 else ''}{_number(change.value)}"
            cells += [_value(found, other), value, "" if change is None else interval(change)]
        first = next(iter(found.values())).measurement
        rows.append([*cells, first.unit, f"{first.n:,}"])
    out.table([*columns, "unit", "n"], rows, right=[c for c in columns[1:] if "interval" not in c] + ["n"])


def _value(found: dict[str, Any], variant: str) -> str:
    return _number(found[variant].measurement.value) if variant in found else "-"


def _number(value: float) -> str:
    from actlas.core.measurement import format_number

    return "-" if value != value else format_number(value)


def _data(given: list[str] | None, seed: int) -> Any:
    """Turn `--data` values into what `measure` takes: by kind, several tasks in a list.

    Raises:
        InputError: a name that is neither a corpus, a task, an image set nor a file.
    """
    from actlas.data import corpus, edit_requests, tasks
    from actlas.data.questionnaires import questionnaire, records_kind

    found: dict[str, Any] = {}
    for name in given or ():
        if name in tasks():
            found.setdefault("task", []).append(name)
        elif name in ("digits", "photos"):
            found["images"] = name
        elif (kind := records_kind(name)) is not None:
            found[kind] = edit_requests(name) if kind == "requests" else questionnaire(name)
        elif "corpus" in found:
            raise InputError(f"--data names two corpora, {found['corpus'].name} and {name}; give one")
        else:
            found["corpus"] = _corpus(name, seed, corpus, tasks())
    return found or None


def _corpus(name: str, seed: int, corpus: Any, tasks: Any) -> Any:
    try:
        return corpus(name, seed=seed)
    except InputError as error:
        if str(error).startswith("there is no corpus"):
            raise InputError(f"{error}; the tasks are {', '.join(tasks)}") from error
        raise


def _list(out: Output) -> None:
    from actlas.measure import measures

    known = measures()
    out.document = {"measures": [info.to_json() for info in known.values()]}
    rows = [(i.name, i.summary, i.unit, i.data, ", ".join(i.needs)) for i in known.values()]
    out.table(["measure", "what it tells", "unit", "data", "models"], rows)
