"""`actlas trace MODEL PROMPT`: the logit lens over tokens and layers, and activations at any sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.calibrate import check_target
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
    one_list,
    session,
)
from actlas.core.errors import InputError, ModelError

if TYPE_CHECKING:
    from actlas.core.model import Model
    from actlas.core.sites import Site
    from actlas.core.trace import Trace

app = new_app()


@app.command(
    epilog=example(
        "actlas trace smollm2 'The capital of France is'",
        "actlas trace smollm2 'The capital of France is' --top 5 --html lens.html",
        "actlas trace smollm2 'Hello there' --sites 'blocks.*.mlp.act' --save acts/",
    )
)
def trace(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text; for a model of images, a file.")],
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--sites",
            metavar="SITE",
            help="Sites to read, e.g. 'blocks.*.mlp.act'. Default: every resid_post.",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, max=100, metavar="N", help="Next tokens to show of each layer.")
    ] = 3,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that works offline.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the activations as safetensors.")
    ] = None,
    lens: Annotated[Path | None, typer.Option(metavar="DIR", help="Look through a saved tuned lens.")] = None,
    edit: Edits = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Look at activations and the logit lens.

    The grid shows which token the model would answer after each token of the prompt if it had to answer
    from each layer; the shade is the probability. The last column has the best tokens with theirs.
    """
    with session(json=json, debug=debug) as out:
        if save is not None:
            check_target(save)
        if html is not None and html.is_dir():
            raise InputError(f"--html {html} is a folder; give the name of a file, e.g. {html / 'lens.html'}")
        loaded = load_model(model)
        edits = load_edits(edit, loaded)
        asked = one_list(sites)
        resolved = loaded.resolve(asked) if asked else _default_sites(loaded)
        reader, reason = _lens(loaded, lens)
        wanted = {site.name: site for site in resolved}
        residual = [site for site in resolved if site.kind in _residual_kinds()] if reader else []
        if residual:
            wanted.update({site.name: site for site in loaded.resolve(_last(loaded))})
        with installed(loaded, edits):
            found = loaded.trace(_inputs(loaded, prompt, chat), list(wanted.values()))
        table = reader.top(found, k=top, sites=[site.name for site in residual]) if residual else None
        summaries = [_summary(site, found) for site in resolved]
        out.document = {
            "model": loaded.name,
            "prompt": prompt,
            "edits": [e.describe() for e in edits],
            "tokens": found.token_strings() if found.tokens is not None and loaded.tokenizer else None,
            "lens": None if table is None else list(table.rows()),
            "sites": summaries,
        }
        if table is not None and not json:
            from actlas.cli.lens_grid import draw_grid

            out.draw(draw_grid(table, out.console))
        elif reason:
            out.say(f"no logit lens: {reason}")
        if asked or table is None:
            columns = list(dict.fromkeys(column for s in summaries for column in s))
            out.table(columns, [[_cell(s.get(c, "")) for c in columns] for s in summaries], right=columns[2:])
        if html is not None:
            if table is None:
                raise InputError(
                    f"--html shows the logit lens, and there is none: {reason or 'no residual site'}"
                )
            from actlas.cli.lens_html import page
            from actlas.core.artifact import atomic_write

            atomic_write(html, page(table, loaded.name, prompt, [e.describe() for e in edits]))
            out.document["html"] = str(html)
            out.say(f"wrote {html}")
        if save is not None:
            _save(save, loaded, prompt, found, [site.name for site in resolved], edits)
            out.document["saved"] = str(save)
            out.say(f"saved {len(resolved)} sites in {save}")


def _residual_kinds() -> frozenset[str]:
    from actlas.core.layout import RESIDUAL_KINDS

    return frozenset(RESIDUAL_KINDS)


def _default_sites(model: Model) -> list[Site]:
    if model.layout is None:
        raise InputError(
            f"{model.name} has no layout, so say where to read, e.g. --sites module:NAME;"
            f" 'actlas sites {model.name}' lists them"
        )
    return [site for site in model.sites() if site.kind == "resid_post" and site.absent is None]


def _last(model: Model) -> str:
    tower = model.tower
    prefix = f"{tower.name}." if tower is not None and tower.name else ""
    return f"{prefix}blocks.{(model.n_blocks or 1) - 1}.resid_post"


def _lens(model: Model, tuned: Path | None) -> tuple[Any, str]:
    """Return the logit lens, or `None` and why there is none."""
    from actlas.core.logit_lens import LogitLens

    if tuned is not None:
        from actlas.core.tuned_lens import TunedLens

        return TunedLens.load(tuned, model).on(model), ""
    try:
        return LogitLens(model=model), ""
    except ModelError as error:
        return None, str(error)


def _inputs(model: Model, prompt: str, chat: bool) -> Any:
    """Return the prompt as the model reads it: text, a chat, or an image that the prompt names."""
    if model.tokenizer is not None:
        if not prompt.strip():
            raise InputError("the prompt is empty; give at least one word")
        return [{"role": "user", "content": prompt}] if chat else prompt
    path = Path(prompt)
    if not prompt or not path.is_file():
        raise InputError(f"{model.name} does not read text, and there is no image file {prompt!r}; give one")
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("reading an image needs Pillow; run: pip install 'actlas[vision]'") from error
    try:
        with Image.open(path) as image:
            return [image.convert("RGB")]
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _summary(site: Site, found: Trace) -> dict[str, Any]:
    """Return what a person asks first about an activation: its size and where it is largest."""
    import torch

    x = found[site.name].detach().to(torch.float32)
    finite = x[x.isfinite()]  # masked attention scores are minus infinity
    tokens = found.token_strings() if site.has_tokens and found.tokens is not None else []
    record: dict[str, Any] = {"site": site.name, "shape": "x".join(map(str, x.shape))}
    record |= {"root mean square": float(finite.square().mean().sqrt()), "largest": float(finite.abs().max())}
    if len(tokens) and x.ndim >= 3 and x.shape[1] == len(tokens):
        sizes = x[0].flatten(1).norm(dim=1)
        record |= {"norm, first token": float(sizes[0]), "norm, median": float(sizes.median())}
    return record


def _cell(value: Any) -> str:
    from actlas.core.measurement import format_number

    return format_number(value) if isinstance(value, float) else str(value)


def _save(path: Path, model: Model, prompt: str, found: Trace, names: list[str], edits: list[Any]) -> None:
    from actlas.core.artifact import save_artifact

    manifest = {
        "model": model.name,
        "fingerprint": model.fingerprint.to_json(),
        "prompt": prompt,
        "tokens": None if found.tokens is None else found.tokens.tolist(),
        "edits": [e.describe() for e in edits],
        "sites": names,
    }
    save_artifact(path, "trace", manifest, {name: found[name] for name in names})
