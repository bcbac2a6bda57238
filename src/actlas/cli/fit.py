"""`actlas fit METHOD MODEL [DATA]`: fit any method of the registry and save what it gives."""

from __future__ import annotations

import inspect
import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actlas.cli.calibrate import check_target
from actlas.cli.output import Output
from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_model, new_app, one_list, session
from actlas.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from actlas.core.methods import MethodInfo
    from actlas.core.model import Model

app = new_app()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=example(
        "actlas fit probe smollm2 sentiment --site blocks.15.resid_post -o probe/",
        "actlas fit pca smollm2 prose --site blocks.15.resid_post --option k=32 -o pca/",
        "actlas fit steer smollm2 pairs.jsonl -o vec/ --plot curve.html",
        "actlas fit sae smollm2 --site blocks.15.resid_post --corpus prose --width 8x --k 32 -o sae/",
        "actlas methods                                      (lists what can be fitted)",
    ),
)
def fit(
    context: typer.Context,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name that 'actlas methods' lists.")],
    model: ModelName,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="[DATA]", help="A corpus, a task, or a JSONL file; 'actlas methods NAME' says which."
        ),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", metavar="SITE", help="Where. Repeat for several.")
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to save it; default: METHOD/.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the method. Repeatable."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="DATA", help="The same as DATA, as an option.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Plot effect against price (.html, .png, .svg, .json)."),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Fit a method and save the lens or edit that it gives.

    Options of the method can be given as they are: --k 32 is the same as --option k=32.
    """
    with session(json=json, debug=debug) as out:
        from actlas.core.methods import find_method

        info = find_method(method)
        own, data = _own_options(context.args, data)
        if corpus is not None and data is not None:
            raise InputError(f"the data is given twice: {data!r} and --corpus {corpus!r}")
        data = corpus if data is None else data
        options = _options(info, one_list(site), [*(option or []), *own], seed)
        if info.data != "none" and data is None and not info.data_optional:
            raise InputError(f"{method} needs data ({_wanted(info)}); see 'actlas methods {method}'")
        target = out_folder or Path(method)
        if info.returns != "Measurement":
            check_target(target)
        if plot is not None:
            _check_plot(info, plot)
        if info.data in ("corpus", "requests") and data is not None:
            given: Any = _load_data(info, data, None, seed)  # before the model: it is quicker to be wrong
            loaded = load_model(model)
        else:
            loaded = load_model(model)
            given = None if data is None else _load_data(info, data, loaded, seed)
        arguments = (loaded,) if info.data == "none" else (loaded, given)
        made = info.fit(*arguments, **options)
        _finish(out, info, loaded, made, target)
        if plot is not None:
            _plot(out, loaded, given, made, options, plot)


def _finish(out: Output, info: MethodInfo, model: Model, made: Any, target: Path) -> None:
    """Save a lens or an edit, and show what was measured about it."""
    from actlas.core.measurement import Measurement

    out.document = {"method": info.name, "model": model.name, "returns": info.returns}
    if info.returns == "Measurement":
        found: Sequence[Measurement] = [made] if isinstance(made, Measurement) else list(made)
    else:
        made.save(target, model)
        found = tuple(getattr(made, "measurements", ()))
        said = made.describe() if hasattr(made, "describe") else f"{type(made).__name__} at {made.site}"
        out.document |= {"saved": str(target), "about": said}
        out.say(f"{said}, saved in {target}")
        out.say(*_use(made, model.name, model.kind, target))
    out.document["measurements"] = list(found)
    out.measurements(found)


def _check_plot(info: MethodInfo, plot: Path) -> None:
    """Refuse a plot that cannot be made, before anything is fitted."""
    from actlas.steering.curve import SUFFIXES

    if info.name != "steer":
        raise InputError(f"{info.name} has no effect and price to plot; --plot is for steer")
    if plot.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {plot}: a plot is one of {', '.join(SUFFIXES)}, e.g. curve.html")
    if not plot.parent.is_dir():
        raise InputError(f"--plot {plot}: there is no folder {plot.parent}; make it, or name another")


def _plot(out: Output, model: Model, pairs: Any, made: Any, options: dict[str, Any], plot: Path) -> None:
    """Draw what the edit buys and costs at several strengths, on the pairs that were kept apart."""
    from actlas.core.contrast import Contrast
    from actlas.core.direction import Direction
    from actlas.core.edits import Add
    from actlas.steering.curve import effect_curve, save_plot

    if not isinstance(made, Add):
        raise InputError(f"only one addition can be plotted, not {made.describe()}; leave out --plot")
    _, test = Contrast.of(pairs).split(options.get("held_out", 0.25), options.get("seed", 0))
    vector = (made.strength * made.vector).flatten()
    direction = Direction(site=made.site, vector=vector, method=options.get("method", "mean_diff"))
    rows = effect_curve(
        model, test, direction, (-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2), random=2, seed=options.get("seed", 0)
    )
    save_plot(rows, plot, f"{direction.method} at {made.site}, {len(test)} held-out pairs, strengths -2 to 2")
    out.document |= {"plot": str(plot), "curve": rows}
    out.say(f"effect against price: {plot}")


def _use(made: Any, model: str, kind: str, target: Path) -> list[str]:
    """Return how to go on with what was fitted, as command lines."""
    from actlas.core.edit import Edit
    from actlas.core.lens import Lens
    from actlas.core.tuned_lens import TunedLens

    if isinstance(made, Edit):
        if kind in ("causal-lm", "seq2seq"):
            return [f"use it: actlas generate {model} PROMPT --edit {target}"]
        return [f"use it: with model.edit(actlas.Edit.load('{target}')): ... in Python"]
    if isinstance(made, TunedLens):
        return [f"use it: actlas trace {model} PROMPT --lens {target}"]
    if type(made).direction is not Lens.direction:
        return [f"steer along a feature: actlas generate {model} PROMPT --edit '{target}#0*4'"]
    return []


def _own_options(words: list[str], data: str | None) -> tuple[list[str], str | None]:
    """Return the method's own options (`--k 32`, `--k=32`) as KEY=VALUE, and the data if it came late.

    Raises:
        InputError: a word that is no option, or an option without a value.
    """
    found: list[str] = []
    given = iter(words if data is None or not data.startswith("--") else [data, *words])
    data = None if data is not None and data.startswith("--") else data
    for word in given:
        if not word.startswith("--"):
            if data is not None:
                raise InputError(f"{word!r} is one word too many; options are given as --name value")
            data = word
            continue
        name, sign, value = word[2:].partition("=")
        if not sign:
            value = next(given, "")
            if not value or value.startswith("--"):
                raise InputError(f"--{name} needs a value, e.g. --{name} 32; 'actlas methods' lists options")
        found.append(f"{name}={value}")
    return found, data


def _options(info: MethodInfo, sites: list[str], given: list[str], seed: int) -> dict[str, Any]:
    """Return the method's keyword arguments.

    Raises:
        InputError: not KEY=VALUE, an option that the method has not got, or a required one missing.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, sign, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key:
            raise InputError(f"--option {text!r} is not KEY=VALUE, e.g. --option k=32")
        if key not in info.options and not info.open:
            has = ", ".join(info.options) or "none"
            raise InputError(
                f"{info.name} has no option {key!r}{did_you_mean(key, info.options)} (it has {has})"
            )
        options[key] = _checked(info, key, _value(value))
    if sites:
        if "site" not in info.options:
            raise InputError(f"{info.name} is not fitted at a site; leave out --site")
        options["site"] = sites[0] if len(sites) == 1 else sites
    if info.needs_site and "site" not in options:
        raise InputError(f"{info.name} is fitted at a site; give one, e.g. --site blocks.15.resid_post")
    if "seed" in info.options:
        options.setdefault("seed", seed)
    missing = [name for name, default in info.options.items() if default is ... and name not in options]
    if missing:
        raise InputError(
            f"{info.name} needs the option {missing[0]!r}; give it as --option {missing[0]}=VALUE"
        )
    return options


def _checked(info: MethodInfo, key: str, value: Any) -> Any:
    """Return a value; where the method takes nothing but numbers, text is refused.

    Raises:
        InputError: text instead of a number.
    """
    parameter = inspect.signature(info.fit).parameters.get(key)
    kinds = set() if parameter is None else {k.strip() for k in str(parameter.annotation).split("|")}
    if isinstance(value, str) and kinds <= {"int", "float", "None"} and kinds & {"int", "float"}:
        raise InputError(f"{key} must be a number, not {value!r}")
    return value


def _value(text: str) -> Any:
    """Read a value: JSON where it is JSON (numbers, true, lists), else text."""
    try:
        return jsonlib.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _load_data(info: MethodInfo, name: str, model: Model | None, seed: int) -> Any:
    """Turn a name or path into what the method takes."""
    from actlas import data as room

    tokenizer = None if model is None else model.tokenizer
    if info.data == "corpus":
        if _is_store(name):
            from actlas.store import Store

            return Store(name)
        return room.corpus(name, seed=seed)
    if info.data == "task":
        return room.task(name, tokenizer, n=128, seed=seed)
    if info.data == "requests":
        return room.edit_requests(name)
    return room.labelled(name, tokenizer, seed=seed, only_pairs=info.data == "pairs")


def _is_store(name: str) -> bool:
    """Say whether a name is the folder of a store of activations."""
    manifest = Path(name) / "manifest.json"
    try:
        return manifest.is_file() and jsonlib.loads(manifest.read_text(encoding="utf-8"))["kind"] == "store"
    except (ValueError, KeyError, TypeError, OSError):
        return False


def _wanted(info: MethodInfo) -> str:
    return {
        "corpus": "a corpus: prose, code, docs, mixed, a file or a folder; or the folder of a store",
        "task": "a task's name",
        "labelled": "JSONL with text and label, or a task's name",
        "pairs": "JSONL with positive and negative, or a task's name",
        "requests": "JSONL with prompt and target",
        "none": "none",
    }[info.data]
