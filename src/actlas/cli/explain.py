"""`actlas explain MODEL PROMPT`: which tokens of a prompt an answer rests on."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.shared import (
    Debug,
    Edits,
    Json,
    ModelName,
    Seed,
    check_prompt,
    example,
    installed,
    load_edits,
    load_model,
    new_app,
    session,
)
from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from actlas.explain.integrated_gradients import IntegratedGradients

BASELINES = ("mean", "pad", "zero")
app = new_app()


@app.command(
    epilog=example(
        "actlas explain smollm2 'The capital of France is'",
        "actlas explain smollm2 'The capital of France is' --answer ' Paris' --instead ' Rome'",
    )
)
def explain(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text.")],
    answer: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The answer to explain; default: the most probable token."),
    ] = None,
    instead: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Explain why the answer and not this one.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Points on the path.")] = 64,
    baseline: Annotated[
        str, typer.Option(metavar="WHAT", help="The prompt that says nothing: " + ", ".join(BASELINES) + ".")
    ] = "mean",
    site: Annotated[
        str, typer.Option(metavar="SITE", help="Attribute to this activation instead of the embeddings.")
    ] = "embed",
    edit: Edits = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that works offline.")
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Save the attributions as a lens.")] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Show which tokens of a prompt an answer rests on.

    Integrated gradients of the answer's log probability (or of the difference of two answers'), in nats:
    positive tokens speak for the answer. The last line says how far they are from adding up.
    """
    with session(json=json, debug=debug) as out:
        check_prompt(prompt)
        if baseline not in BASELINES:
            raise InputError(f"there is no baseline {baseline!r}{did_you_mean(baseline, BASELINES)}")
        if instead is not None and answer is None:
            raise InputError("--instead compares with an answer; give it with --answer")
        if html is not None and html.is_dir():
            raise InputError(f"--html {html} is a folder; give the name of a file, e.g. {html / 'why.html'}")
        if save is not None:
            from actlas.cli.calibrate import check_target

            check_target(save)
        from actlas.explain.integrated_gradients import integrated_gradients

        loaded = load_model(model)
        edits = load_edits(edit, loaded)
        target: Any = answer if instead is None else (answer, instead)
        with installed(loaded, edits):
            found = integrated_gradients(loaded, prompt, target, baseline, steps, site=site)
        tokens = list(zip(found.tokens, found.scores.tolist(), strict=True))
        out.document = {
            "model": loaded.name,
            "prompt": prompt,
            "target": found.target,
            "site": found.site,
            "baseline": baseline,
            "edits": [e.describe() for e in edits],
            "tokens": [{"token": t, "score": s} for t, s in tokens],
            "value": found.value,
            "baseline_value": found.baseline_value,
            "measurements": list(found.measurements),
        }
        largest = max((abs(s) for _, s in tokens), default=0.0) or 1.0
        rows = [
            (repr(t)[1:-1], f"{s:+.3f}", ("+" if s > 0 else "-") * round(20 * abs(s) / largest))
            for t, s in tokens
        ]
        out.table(["token", "nats", ""], rows, right=["nats"], title=found.target)
        change = found.value - found.baseline_value
        out.say(
            f"sum {float(found.scores.sum()):+.3f} of a change of {change:+.3f} nats "
            f"(error {found.error:.1%}, {steps} steps)"
        )
        if found.error > 0.05:
            out.say("the attributions do not add up; use more --steps")
        if html is not None:
            from actlas.core.artifact import atomic_write

            atomic_write(html, page(found, loaded.name, prompt))
            out.document["html"] = str(html)
            out.say(f"wrote {html}")
        if save is not None:
            found.save(save, loaded)
            out.document["saved"] = str(save)
            out.say(f"saved in {save}")


def page(found: IntegratedGradients, model: str, prompt: str) -> str:
    """Return the prompt as an HTML page, its tokens shaded by attribution."""
    largest = float(found.scores.abs().max()) or 1.0
    spans = []
    for token, score in zip(found.tokens, found.scores.tolist(), strict=True):
        colour = "31,119,180" if score >= 0 else "214,39,40"
        shade = f"rgba({colour},{abs(score) / largest:.3f})"
        text = escape(token).replace("\n", "&#9166;\n")
        spans.append(f'<span style="background:{shade}" title="{score:+.3f} nats">{text}</span>')
    change = found.value - found.baseline_value
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>'
        f"{escape(found.target)}</title>\n<style>body{{font:16px/1.8 system-ui,sans-serif;max-width:50em;"
        "margin:3em auto;padding:0 1em;color:#222;background:#fff}pre{font:inherit;white-space:pre-wrap}"
        "span{border-radius:.2em;padding:.1em 0}</style>\n"
        f"<h1>{escape(found.target)}</h1>\n<p>{escape(model)}, attributions to {escape(found.site)}; blue "
        f"speaks for it, red against it. Point at a token for its number.</p>\n<pre>{''.join(spans)}</pre>\n"
        f"<p>Sum {float(found.scores.sum()):+.3f} of a change of {change:+.3f} nats "
        f"(error {found.error:.1%}, {found.steps} steps).</p>\n</html>\n"
    )
