"""`actlas serve MODEL`: an OpenAI-compatible server with edits per request, and a web page."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actlas.cli.shared import Debug, Json, ModelName, Seed, example, load_edits, load_model, new_app, session
from actlas.core.errors import InputError

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model

app = new_app()


@app.command(
    epilog=example(
        "actlas serve smollm2 --edit happy=vec/",
        "actlas serve smollm2 --edit happy=vec/ --edit brief=brief.gguf --default 'happy*0.5'",
        """curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", """
        """"content": "Hello"}], "edits": ["happy*1.5"]}'""",
    )
)
def serve(
    model: ModelName,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="NAME=PATH[*STRENGTH]",
            help="An edit that requests may ask for by name. Repeat for several.",
        ),
    ] = None,
    default: Annotated[
        list[str] | None,
        typer.Option("--default", metavar="NAME[*STRENGTH]", help="Edits of requests that name none."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at; this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port; 0 is any.")
    ] = 8000,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="The most new tokens that a request may ask for.")
    ] = 2048,
    max_batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="The most requests that are generated together.")
    ] = 8,
    json: Json = False,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with edits per request, and a web page."""
    with session(json=json, debug=debug) as out:
        try:
            import uvicorn
        except ImportError as error:
            raise InputError("serving needs uvicorn; install it: pip install 'actlas[serve]'") from error
        make_app = importlib.import_module("actlas.serve.app").make_app  # the rooms stand side by side
        listening = _listen(host, port)
        port = listening.getsockname()[1]
        loaded = load_model(model)
        edits = named_edits(edit, loaded)
        made = make_app(loaded, edits, default=default or [], max_tokens=max_tokens, max_batch=max_batch)
        where = f"http://{host}:{port}"
        out.document = {"model": loaded.name, "url": where, "edits": list(edits)}
        out.say(f"{loaded.name} at {where} (web page) and {where}/v1 (OpenAI's API); Ctrl-C ends it")
        for name, which in edits.items():
            out.say(f"  edit {name}: {which.describe()}")
        config = uvicorn.Config(made, log_level="debug" if debug else "warning")
        uvicorn.Server(config).run(sockets=[listening])


def named_edits(given: list[str] | None, model: Model) -> dict[str, Edit]:
    """Load `NAME=PATH[*STRENGTH]`; without a name it is the file's or folder's.

    Raises:
        InputError: two edits of one name, a name that the API could not spell, an unreadable edit.
    """
    found: dict[str, Edit] = {}
    for text in given or ():
        name, sign, path = text.partition("=")
        if not sign:
            name, path = "", text
        if not path:
            raise InputError(f"--edit {text!r} names no path; write NAME=PATH, e.g. happy=vec/")
        name = name.strip() or Path(path.split("*")[0].split("#")[0]).stem
        if not name or set(name) & set("*+=# "):
            raise InputError(
                f"--edit {text!r}: the name {name!r} must not be empty or hold * + = # or spaces"
            )
        if name in found:
            raise InputError(f"--edit: two edits are called {name!r}; name them NAME=PATH")
        found[name] = load_edits([path], model)[0]
    return found


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: it is quicker to be wrong."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); give another --port, or 0 for any"
        ) from error
    return listening
