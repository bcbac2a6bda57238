"""`actlas circuit MODEL --task TASK`: find a task's circuit, test it on other prompts, save and draw it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlas.cli.patch import read_task
from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, session
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.circuits.circuit import Circuit
    from actlas.cli.output import Output

app = new_app()


@app.command(
    epilog=example(
        "actlas circuit smollm2 --task ioi -o circuit/ --html c.html",
        "actlas circuit smollm2 --task capitals --target 0.9 --png c.png",
        "actlas circuit smollm2 --task pairs.jsonl --edges 200 --prompts 24 --held-out 24",
        "actlas circuit smollm2 --load circuit/ --svg c.svg      (draws a saved one)",
    )
)
def circuit(
    model: ModelName,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="TASK", help="A task, or JSON lines with clean, corrupt, answer and wrong."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Save the circuit here.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page that works offline.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a picture.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="The same as SVG.")] = None,
    edit: Annotated[
        Path | None,
        typer.Option("--edit", metavar="DIR", help="Save the edit that mean-ablates all other parts."),
    ] = None,
    target: Annotated[
        float,
        typer.Option("--target", metavar="F", help="Share of the behaviour that the circuit must carry."),
    ] = 0.85,
    edges: Annotated[
        int | None,
        typer.Option("--edges", min=1, metavar="N", help="Take N edges instead of searching for a size."),
    ] = None,
    steps: Annotated[
        int,
        typer.Option("--steps", min=0, metavar="N", help="Integrated gradients: runs in between; 0: EAP."),
    ] = 5,
    prompts: Annotated[int, typer.Option("--prompts", min=2, metavar="N", help="Pairs to search on.")] = 48,
    held_out: Annotated[
        int, typer.Option("--held-out", min=2, metavar="N", help="Pairs to test on, with other answers.")
    ] = 48,
    controls: Annotated[
        int, typer.Option("--controls", min=0, metavar="N", help="Random circuits of equal size.")
    ] = 5,
    load: Annotated[
        Path | None, typer.Option("--load", metavar="DIR", help="Show a saved circuit; nothing is searched.")
    ] = None,
    correct_only: Annotated[
        bool, typer.Option("--correct-only", help="Leave out prompts that the model gets wrong.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the model fails the task.")] = False,
    most: Annotated[int, typer.Option("--most", "-n", min=1, metavar="N", help="Parts to show.")] = 12,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Find the circuit of a task and test whether it is faithful.

    Edges between heads and MLPs are scored by attribution; the smallest set that carries the behaviour is
    then run by itself on prompts with other answers, beside random circuits of equal size.
    """
    with session(json=json, debug=debug) as out:
        for name, path in (("--html", html), ("--png", png), ("--svg", svg)):
            if path is not None and path.is_dir():
                raise InputError(f"{name} {path} is a folder; give the name of a file")
        if (task is None) == (load is None):
            raise InputError("give a task with --task, or a saved circuit with --load")
        source = None if task is None else read_task(task)
        loaded = load_model(model)
        if load is not None:
            from actlas.circuits.circuit import Circuit

            found = Circuit.load(load, loaded)
        else:
            from actlas.circuits.circuit_search import find_circuit

            assert source is not None
            found = find_circuit(
                loaded, source, n=prompts, held_out=held_out, target=target, edges=edges, steps=steps,
                controls=controls, correct_only=correct_only, force=force, seed=seed,
            )  # fmt: skip
        out.document = found.to_json()
        _show(out, found, most)
        if output is not None:
            _wrote(out, "output", found.save(output))
        if edit is not None:
            _wrote(out, "edit", found.ablate_rest().save(edit, loaded))
        if html is not None:
            _wrote(out, "html", found.to_html(html))
        if png is not None:
            _wrote(out, "png", found.save_png(png))
        if svg is not None:
            _wrote(out, "svg", found.save_svg(svg))


def _show(out: Output, found: Circuit, most: int) -> None:
    from actlas.core.measurement import format_number

    out.say(
        f"{found.model}, {found.task}: {len(found.nodes)} parts, {len(found.edges)} edges, {found.method}"
    )
    rows = []
    for m in found.scores:
        bounds = "" if m.low is None or m.high is None else f"[{m.low:.3f}, {m.high:.3f}]"
        rows.append([m.name, format_number(round(m.value, 3)), bounds, str(m.n)])
    out.table(["on prompts kept apart", "value", "95% interval", "n"], rows, right=("value", "n"))
    parts = [
        [m.group.get("part", ""), f"{m.value:+.3f}", f"[{m.low:+.3f}, {m.high:+.3f}]"]
        for m in found.losses[:most]
        if m.low is not None and m.high is not None
    ]
    out.table(["part", "loss without it", "95% interval"], parts, right=("loss without it",))
    out.say(*found.notes)


def _wrote(out: Output, name: str, path: Path) -> None:
    out.document[name] = str(path)
    out.say(f"wrote {path}")
