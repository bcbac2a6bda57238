"""`actlas generate MODEL PROMPT`: text, with edits installed or side by side with the plain model."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    load_with_edits,
    new_app,
    session,
)
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

app = new_app()
RUNTIMES = ("auto", "lean", "transformers")


@app.command(
    epilog=example(
        "actlas generate smollm2 'The capital of France is' --max-new-tokens 20",
        "actlas generate smollm2 'I think that' --edit happy*4 --compare",
        "actlas generate shrunk/ 'Once upon a time'           (a folder of actlas shrink)",
    )
)
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model goes on from.")],
    edit: Edits = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also without the edits, side by side.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many new tokens.")] = 50,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 is greedy; above 0 samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Nucleus, when sampling.")
    ] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, metavar="N", help="Beams; 1 is none.")] = 1,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="auto|lean|transformers",
            help="What generates: the lean loop where it can, that or nothing, or transformers.",
        ),
    ] = "auto",
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Generate text, with edits installed if you like."""
    with session(json=json, debug=debug) as out:
        check_prompt(prompt)
        if runtime not in RUNTIMES:
            raise InputError(f"--runtime is {runtime!r}; it must be one of {', '.join(RUNTIMES)}")
        loaded, edits = load_with_edits(model, edit)
        inputs: Any = [{"role": "user", "content": prompt}] if chat else prompt
        options = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "num_beams": num_beams,
            "seed": seed,
        }
        live = not json and not compare and num_beams == 1 and sys.stdout.isatty()
        texts: dict[str, str] = {}
        ran: dict[str, dict[str, str]] = {}
        for what, those in (("base", []), ("edited", edits)):
            if (what == "base" and (compare or not edits)) or (what == "edited" and edits):
                texts[what], ran[what] = _run(loaded, inputs, those, options, live, runtime)
        if not json:
            for why in dict.fromkeys(r["why_not_lean"] for r in ran.values() if "why_not_lean" in r):
                sys.stderr.write(f"actlas: transformers generated, not the lean loop: {why}\n")
        out.document = {
            "model": loaded.name,
            "prompt": prompt,
            "chat": chat,
            "edits": [e.describe() for e in edits],
            "options": options,
            "runtime": ran,
            **texts,
        }
        if len(texts) > 1:
            out.table(list(texts), [list(texts.values())])
        elif not live:
            out.say(next(iter(texts.values())))


def _run(
    model: Model, inputs: Any, edits: list[Edit], options: dict[str, Any], live: bool, runtime: str
) -> tuple[str, dict[str, str]]:
    """Generate, on the lean loop where it can; return the text, and what generated it."""
    show = _printer(model.tokenizer) if live else None
    reason: str | None = "transformers was asked for"
    if runtime != "transformers":
        from actlas.models.fast_generate import fast_generate, reason_against

        reason = reason_against(model, inputs, edits, num_beams=options["num_beams"])
        if reason is not None and runtime == "lean":
            raise InputError(f"the lean loop cannot run this: {reason}; leave out --runtime lean")
    if reason is None:
        own = {name: value for name, value in options.items() if name != "num_beams"}
        text = fast_generate(model, inputs, edits, on_token=show, **own).texts[0]
        ran = {"runtime": "lean loop"}
    else:
        with installed(model, edits):
            text = model.generate(inputs, on_token=show, **options).texts[0]
        ran = {"runtime": "transformers"} | ({} if runtime == "transformers" else {"why_not_lean": reason})
    if live:
        print()
    return text, ran


def _printer(tokenizer: Any) -> Callable[[Any], None]:
    """Return a function that prints the text that each new token completes."""
    ids: list[int] = []
    shown = ""

    def show(new: Any) -> None:
        nonlocal shown
        ids.extend(int(i) for i in new.flatten().tolist())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(shown):  # half a character waits for the rest
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text

    return show
