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
    load_edits,
    load_model,
    new_app,
    session,
)

if TYPE_CHECKING:
    from actlas.core.model import Model

app = new_app()


@app.command(
    epilog=example(
        "actlas generate smollm2 'The capital of France is' --max-new-tokens 20",
        "actlas generate smollm2 'I think that' --edit happy*4 --compare",
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
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Generate text, with edits installed if you like."""
    with session(json=json, debug=debug) as out:
        check_prompt(prompt)
        loaded = load_model(model)
        edits = load_edits(edit, loaded)
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
        if compare or not edits:
            texts["base"] = _run(loaded, inputs, options, live)
        if edits:
            with installed(loaded, edits):
                texts["edited"] = _run(loaded, inputs, options, live)
        out.document = {
            "model": loaded.name,
            "prompt": prompt,
            "chat": chat,
            "edits": [e.describe() for e in edits],
            "options": options,
            **texts,
        }
        if len(texts) > 1:
            out.table(list(texts), [list(texts.values())])
        elif not live:
            out.say(next(iter(texts.values())))


def _run(model: Model, inputs: Any, options: dict[str, Any], live: bool) -> str:
    if not live:
        return model.generate(inputs, **options).texts[0]
    text = model.generate(inputs, on_token=_printer(model.tokenizer), **options).texts[0]
    print()
    return text


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
