"""`actlas shrink MODEL`: the fastest or smallest way to run a model here that keeps its quality."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.output import Output
from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, one_list, session
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.report.shrink import Row, Shrunk

app = new_app()


@app.command(
    epilog=example(
        "actlas shrink smollm2",
        "actlas shrink smollm2 prose --keep-ppl 2% --out fast/",
        "actlas shrink ./my-model --budget 3bit --out small/",
        "actlas shrink ./my-model --max-mb 60 --methods gptq",
        "actlas generate shrunk/ 'Once upon a time'        (uses the result)",
    )
)
def shrink(
    model: ModelName,
    corpus: Annotated[
        str | None,
        typer.Argument(
            metavar="[CORPUS]", help="Text to calibrate and measure on: a name, a file or a folder."
        ),
    ] = None,
    keep_ppl: Annotated[
        str | None,
        typer.Option(
            "--keep-ppl", metavar="P%", help="How much the perplexity may rise; 1% unless a size is given."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="Nbit", help="At most so many bits a weight, e.g. 4bit; the best of those."
        ),
    ] = None,
    max_mb: Annotated[
        float | None,
        typer.Option("--max-mb", metavar="N", help="At most so many MB of weights (layers and output head)."),
    ] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")
    ] = Path("shrunk"),
    rule: Annotated[
        str,
        typer.Option(
            metavar="upper|estimate", help="What must keep within P%: the interval's upper end, or the value."
        ),
    ] = "upper",
    formats: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="Weight formats to try: f32, q8, q4. Repeatable."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Quantization methods to try for a size: rtn, gptq, awq. Repeatable."
        ),
    ] = None,
    skip: Annotated[
        bool, typer.Option("--skip/--no-skip", help="Try to skip inputs too (activation sparsity).")
    ] = True,
    everything: Annotated[
        bool, typer.Option("--all", help="Measure mixes that cannot win too, for the plot.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(min=64, metavar="N", help="Held-out tokens for each quality.")
    ] = 4096,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Repeats of the race.")] = 5,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Make a model faster or smaller here, and show what it costs.

    Weight formats and skipped inputs are tried on this machine; each mix is judged on held-out text against
    the original, and raced against it. The folder goes where an edit or a model goes, e.g. to generate.
    """
    with session(json=json, debug=debug) as out:
        from actlas.report.shrink.result import check_target

        keep = _percent(keep_ppl) if keep_ppl is not None else None
        bits = _bits(budget) if budget is not None else None
        if max_mb is not None and max_mb <= 0:
            raise InputError(f"--max-mb is {max_mb:g}; it must be above 0")
        if keep is None and bits is None and max_mb is None:
            keep = 0.01
        check_target(out_folder)
        from actlas.data import corpus as texts
        from actlas.report.shrink.rows import Effort
        from actlas.report.shrink.search import shrink as search

        text = texts(corpus or "mixed", seed=seed)
        loaded = load_model(model)
        options: dict[str, Any] = {} if formats is None else {"formats": one_list(formats)}
        found = search(
            loaded,
            text,
            keep=keep,
            rule=rule,
            bits=bits,
            most_bytes=None if max_mb is None else round(max_mb * 1e6),
            methods=one_list(methods) or None,
            skip=skip,
            everything=everything,
            effort=Effort(tokens=tokens, repeats=repeats),
            seed=seed,
            say=_say,
            source=_source(model),
            **options,
        )
        found.save(out_folder)
        _show(out, found, out_folder)


def _show(out: Output, found: Shrunk, folder: Path) -> None:
    out.document = {**found.to_json(), "saved": str(folder)}
    out.say(f"asked for: {found.goal.say()}; {found.quality} of the original: {found.base:.4g}")
    columns = [
        "",
        "mix",
        "in",
        "MB",
        f"{found.quality} x",
        "95% interval",
        "weights read",
        "tokens/s",
        "x original",
    ]
    rows = [_cells(row) for row in sorted(found.rows, key=lambda r: r.rate or 0.0)]
    out.table(columns, rows, right=("MB", f"{found.quality} x", "weights read", "tokens/s", "x original"))
    out.say("* chosen   = on the frontier: no mix here is both faster and better   ! over the budget")
    for note in found.notes:
        out.say(f"note: {note}")
    row = found.chosen
    speed = "" if row.speed is None else f", {row.speed:.3g} times the original's speed"
    out.say(f"chosen: {row.name} in {'the lean loop' if found.lean else 'transformers'}{speed}")
    out.say(f"saved in {folder}; the plot is {folder / 'frontier.html'}")
    out.say(f"use it: actlas generate {folder} PROMPT   or   actlas measure {found.model} --edit {folder}")


def _cells(row: Row) -> list[str]:
    mark = "*" if row.chosen else "!" if not row.fits else "=" if row.frontier else ""
    known = row.low is not None and row.high is not None and row.low != row.high
    return [
        mark,
        row.name,
        row.runtime,
        f"{row.bytes / 1e6:.1f}",
        "-" if row.quality is None else f"{row.quality:.4f}",
        f"[{row.low:.4f}, {row.high:.4f}]" if known else "",
        "-" if row.touched is None else f"{row.touched:.0%}",
        "-" if row.rate is None else f"{row.rate:.1f}",
        "-" if row.speed is None else f"{row.speed:.2f}",
    ]


def _say(line: str) -> None:
    """Say what is going on, where somebody watches."""
    import sys

    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{line}\n")


def _source(name: str) -> str:
    """Return the model's name as another folder can use it."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _percent(text: str) -> float:
    """Read `1%` or `1` as 0.01.

    Raises:
        InputError: it is no percentage, or negative.
    """
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        raise InputError(f"--keep-ppl {text!r} is no percentage; write e.g. 1%") from None
    if not 0 <= value < 1000:
        raise InputError(f"--keep-ppl {text!r}: a rise of the perplexity lies between 0% and 1000%")
    return value / 100


def _bits(text: str) -> float:
    """Read `4bit`, `3.5 bits` or `4`.

    Raises:
        InputError: it is no number of bits, or not between 1 and 32.
    """
    known = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-?(?:bits?)?\s*", text, re.IGNORECASE)
    if known is None or not 1 <= float(known[1]) <= 32:
        raise InputError(f"--budget {text!r} is no number of bits between 1 and 32; write e.g. 4bit")
    return float(known[1])
