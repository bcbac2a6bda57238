"""`actlas patch MODEL --task TASK --over WHAT`: which parts of a model carry a behaviour."""

from __future__ import annotations

import json as jsonlib
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
    session,
)
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.circuits.batch import PromptPairs
    from actlas.circuits.effects import Effects
    from actlas.cli.output import Output
    from actlas.core.dictionary import Dictionary
    from actlas.core.measurement import Measurement
    from actlas.core.model import Model

HOW = ("exact", "attribution", "ig")
_SCREENED = ("neurons", "features")
_STEPS = 5
app = new_app()


@app.command(
    epilog=example(
        "actlas patch smollm2 --task ioi --over heads --html out.html",
        "actlas patch smollm2 --task capitals --over positions --mode noise --png out.png",
        "actlas patch smollm2 --task ioi --over neurons --layers 17-23 --screen 50",
        "actlas patch smollm2 --task ioi --over features --lens sae/",
        "actlas patch smollm2 --task pairs.jsonl --over components --how attribution",
    )
)
def patch(
    model: ModelName,
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="TASK", help="A task, or JSON lines with clean, corrupt, answer and wrong."
        ),
    ],
    over: Annotated[
        str,
        typer.Option(
            "--over",
            metavar="WHAT",
            help="components, heads, mlps, attn, layers, positions, neurons, features, or sites.",
        ),
    ] = "components",
    mode: Annotated[
        str, typer.Option("--mode", metavar="MODE", help="denoise, noise, resample, mean or zero.")
    ] = "denoise",
    metric: Annotated[
        str, typer.Option("--metric", metavar="METRIC", help="logit_difference, log_prob or kl.")
    ] = "logit_difference",
    how: Annotated[
        str,
        typer.Option("--how", metavar="HOW", help="exact, attribution or ig (integrated gradients)."),
    ] = "exact",
    prompts: Annotated[int, typer.Option("--prompts", min=1, metavar="N", help="Pairs of prompts.")] = 32,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="L", help="Only these blocks, e.g. 0-5,7.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option("--positions", metavar="P", help="all, last, changed or -1,-2,... Default: all."),
    ] = None,
    lens: Annotated[
        Path | None, typer.Option("--lens", metavar="DIR", help="A dictionary, for --over features.")
    ] = None,
    screen: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Neurons, features: patch the N with the largest estimate."),
    ] = 50,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Corrupt by this attribute of the task (ioi: IO, S, Pos)."),
    ] = None,
    correct_only: Annotated[
        bool, typer.Option("--correct-only", help="Leave out prompts that the model gets wrong.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the model fails the task.")] = False,
    most: Annotated[int, typer.Option("--most", "-n", min=1, metavar="N", help="How many to show.")] = 10,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page that works offline.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a picture.")] = None,
    edit: Edits = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Find the parts of a model that carry a behaviour.

    By activation patching: each part's activation is written into a run on other prompts; its effect is
    the share of the difference between the two kinds of prompts that it moves. Exact, or estimated from
    one gradient.
    """
    with session(json=json, debug=debug) as out:
        for name, path in (("--html", html), ("--png", png)):
            if path is not None and path.is_dir():
                raise InputError(f"{name} {path} is a folder; give the name of a file")
        if how not in HOW:
            raise InputError(f"--how is {how!r}; it must be {', '.join(HOW[:-1])} or {HOW[-1]}")
        from actlas.circuits.batch import PromptPairs
        from actlas.circuits.sources import check_mode

        check_mode(mode)
        chosen = _layers(layers)
        source = read_task(task)
        loaded = load_model(model)
        edits = load_edits(edit, loaded)
        dictionary = _dictionary(lens, loaded) if lens is not None else None
        with installed(loaded, edits):
            pairs = PromptPairs.from_task(
                loaded, source, n=prompts, seed=seed, variant=variant, correct_only=correct_only, force=force
            )
            options: dict[str, Any] = {
                "mode": mode, "metric": metric, "layers": chosen, "positions": _positions(positions),
                "lens": dictionary, "seed": seed,
            }  # fmt: skip
            effects, agreed = _measure(loaded, pairs, over, how, screen, options)
        out.document = {**effects.to_json(), "agreement": agreed, "edits": [e.describe() for e in edits]}
        _show(out, effects, pairs, most, agreed)
        if html is not None:
            from actlas.cli.patch_html import page
            from actlas.core.artifact import atomic_write

            atomic_write(html, page(effects, pairs, agreed, [e.describe() for e in edits]))
            out.document["html"] = str(html)
            out.say(f"wrote {html}")
        if png is not None:
            from actlas.circuits.views import save_png

            save_png(effects, png, pairs)
            out.document["png"] = str(png)
            out.say(f"wrote {png}")


def _measure(
    model: Model, pairs: PromptPairs, over: str, how: str, top: int, options: dict[str, Any]
) -> tuple[Effects, Measurement | None]:
    """Return the effects, and how well the estimate agrees with exact ones where both were made."""
    from actlas.circuits.attribution_patching import attribute
    from actlas.circuits.effects import agreement
    from actlas.circuits.patching import patch as patch_parts
    from actlas.circuits.screening import screen

    if how != "exact":
        return attribute(model, pairs, over, steps=_STEPS if how == "ig" else 0, **options), None
    no_gradient = options["metric"] == "kl" and options["mode"] != "denoise"
    if over in _SCREENED:
        steps = _STEPS if no_gradient else 0
        exact, estimated = screen(model, pairs, over, top=top, steps=steps, **options)
    else:
        exact = patch_parts(model, pairs, over, **options)
        if no_gradient or len(exact) < 3:
            return exact, None
        estimated = attribute(
            model, pairs, list(exact.parts), **{**options, "layers": None, "positions": None}
        )
    return exact, agreement(exact, estimated) if len(exact) > 2 else None


def _show(out: Output, effects: Effects, pairs: PromptPairs, most: int, agreed: Measurement | None) -> None:
    clean, corrupt = (float(x.mean()) for x in (effects.clean, effects.corrupt))
    unit = f" {effects.unit}" if effects.unit else ""
    name, n = effects.metric.replace("_", " "), len(pairs)
    out.say(
        f"{effects.model}, {effects.task}: {n} pairs, right on {pairs.accuracy:.0%} of the clean prompts",
        f"{name}: {clean:.3f}{unit} on clean prompts, {corrupt:.3f} on corrupted ones",
        f"{len(effects)} parts, {effects.mode}, {effects.method}",
    )
    rows = [[e.label, f"{e.value:+.3f}", f"[{e.low:+.3f}, {e.high:+.3f}]"] for e in effects.top(most)]
    out.table(["part", "effect", "95% interval"], rows, right=("effect",))
    if agreed is not None:
        bounds = f"[{agreed.low:.2f}, {agreed.high:.2f}]"
        out.say(
            f"estimates by attribution: rank correlation {agreed.value:.2f} {bounds};"
            f" {agreed.note.split('; ')[-1]}"
        )
    out.say(*effects.notes)


def read_task(given: str) -> Any:
    """Return a task's name, or the records of a file of pairs.

    Raises:
        InputError: a file that cannot be read, or a line that is no record.
    """
    path = Path(given)
    if path.suffix not in (".jsonl", ".ndjson"):
        return given
    if not path.is_file():
        raise InputError(f"there is no file {given!r}; give a task's name or JSON lines")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = jsonlib.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: give an object with clean, corrupt, answer and wrong")
        records.append(record)
    if not records:
        raise InputError(f"{path} holds no pair; give one a line")
    return records


def _layers(given: str | None) -> list[int] | None:
    if given is None:
        return None
    found: list[int] = []
    for part in given.split(","):
        ends = part.strip().split("-")
        if not all(e.isdigit() for e in ends) or len(ends) > 2:
            raise InputError(f"--layers {given!r}: cannot read {part.strip()!r}; write e.g. 0-5,7")
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return found


def _positions(given: str | None) -> list[str | int] | None:
    if given is None:
        return None
    found: list[str | int] = []
    for part in (p.strip() for p in given.split(",")):
        found.append(int(part) if part.lstrip("-").isdigit() else part)
    return found


def _dictionary(path: Path, model: Model) -> Dictionary:
    from actlas.core.dictionary import Dictionary
    from actlas.core.lens import Lens

    lens = Lens.load(path, model)
    if not isinstance(lens, Dictionary):
        raise InputError(
            f"{path} holds a {type(lens).__name__}, which has no sparse features; give a dictionary"
        )
    return lens
