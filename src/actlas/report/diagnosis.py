"""Find out why a model does not work: run it stage by stage and name the one that fails, with the fix.

    for check in doctor("path/to/model"): print(check)

The stages are the obstacles that people who reuse models report: files, config, tokenizer, memory,
loading, input, dtype, output, chat template. After a stage that later ones need, the rest is skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actlas.core.errors import ActlasError, FailureError, InputError
from actlas.report.content import plain
from actlas.report.folder import ModelFolder

if TYPE_CHECKING:
    from actlas.core.model import Model

Status = Literal["ok", "failed", "warning", "skipped"]
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Check:
    """One stage.

    Attributes:
        stage: what was tried.
        status: `"ok"`, `"failed"`, `"warning"` (it works, but look at it) or `"skipped"`.
        detail: what was found.
        fix: what to do about it, if anything.
    """

    stage: str
    status: Status
    detail: str = ""
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.status:>7}  {self.stage}: {self.detail}".rstrip(": ")
        return f"{text}; {self.fix}" if self.fix else text


def doctor(model: str | Path | Model) -> list[Check]:
    """Try everything that using a model needs, in order.

    Args:
        model: a folder, a name that `actlas.load` takes, or a loaded Model.

    Returns:
        One `Check` a stage. No exception: whatever goes wrong is in the checks.
    """
    done: list[Check] = []
    loaded: Model | None = None
    if hasattr(model, "module"):
        loaded = model  # type: ignore[assignment]
    else:
        path = Path(str(model)).expanduser()
        if path.exists():
            done += _files(path)
        if not _broken(done):
            loaded, check = _load(path if path.exists() else str(model))
            done.append(check)
    if loaded is None:
        return [
            *done,
            *(Check(stage, "skipped") for stage in ("tokenizer", "input", "forward pass", "output")),
        ]
    for stage in (_tokenizer, _forward, _template, _generate):
        done += stage(loaded)
        if _broken(done):
            break
    return done


def _broken(checks: list[Check]) -> bool:
    return any(c.status == "failed" for c in checks)


def _files(path: Path) -> list[Check]:
    """Files, config, tokenizer files and memory of a folder, without loading anything."""
    if path.is_file():
        if path.suffix == ".gguf":
            return [Check("files", "ok", f"GGUF file of {path.stat().st_size:,} bytes")]
        return [Check("files", "failed", f"{path.name} is a file", "give the folder that holds config.json")]
    folder = ModelFolder(path)
    if not folder.has_model:
        return [
            Check(
                "files",
                "failed",
                f"{path} holds no config.json and no weights",
                "download the whole repository",
            )
        ]
    out = []
    complete, note = folder.weights_complete()
    if complete is False:
        fix = "run: git lfs pull" if "LFS" in note else "download the weights again"
        out.append(Check("files", "failed", note, "" if "git lfs" in note else fix))
    elif complete is None:
        out.append(Check("files", "warning", note, "prefer safetensors: loading a pickle can run code"))
    else:
        out.append(Check("files", "ok", note))
    if folder.config is None:
        fix = (
            "add the model's config.json"
            if "missing" in folder.config_problem
            else "download config.json again"
        )
        out.append(Check("config", "failed", folder.config_problem, fix))
        return out
    known = folder.config.get("architectures") or folder.config.get("model_type")
    if not known:
        out.append(
            Check(
                "config",
                "failed",
                "config.json names no architecture",
                "add `architectures` and `model_type`",
            )
        )
    elif folder.config.get("auto_map"):
        out.append(
            Check("config", "warning", f"{plain(known)} comes with its own code", "Actlas does not run it")
        )
    else:
        out.append(Check("config", "ok", plain(known[0] if isinstance(known, list) else known)))
    for stage, (ok, said), fix in (
        ("tokenizer files", folder.tokenizer_fits(), "use the tokenizer that belongs to these weights"),
        ("embedding", folder.embedding_fits(), "set vocab_size in config.json to the embedding's rows"),
        ("data type", folder.dtype_fits(), "pass dtype= when loading if it matters"),
    ):
        status: Status = (
            "ok" if ok else "skipped" if ok is None else "warning" if stage == "data type" else "failed"
        )
        out.append(Check(stage, status, said, fix if ok is False else ""))
    return out + _memory(folder)


def _memory(folder: ModelFolder) -> list[Check]:
    needed = sum((folder.path / name).stat().st_size for name in folder.safetensors)
    free = _free_memory()
    if not needed or free is None:
        return []
    detail = f"the weights take {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB are free"
    if needed > free:
        return [
            Check("memory", "failed", detail, "load with dtype='bfloat16', or on a machine with more memory")
        ]
    return [Check("memory", "ok", detail)]


def _free_memory() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
        found = re.search(r"MemAvailable:\s*(\d+) kB", text)
        if found:
            return int(found.group(1)) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _load(name: str | Path) -> tuple[Model | None, Check]:
    from actlas.models import load

    try:
        model = load(name)
    except ActlasError as error:
        return None, Check("loading", "failed", plain(error), "")
    except MemoryError:
        return None, Check("loading", "failed", "out of memory", "load with dtype='bfloat16'")
    except Exception as error:
        return None, Check("loading", "failed", _said(error), _load_fix(str(error)))
    return model, Check("loading", "ok", repr(model).strip("<>"))


def _load_fix(message: str) -> str:
    for sign, fix in (
        ("size mismatch", "config.json and the weights are of two models; download both again"),
        ("does not recognize this architecture", "upgrade transformers: pip install -U transformers"),
        ("trust_remote_code", "the model brings its own code, which Actlas does not run"),
        ("No module named", "install the missing package"),
        ("Connection", "there is no network; give a local folder"),
    ):
        if sign in message:
            return fix
    return "look at the message; `--debug` shows the traceback"


def _tokenizer(model: Model) -> list[Check]:
    if model.kind not in ("causal-lm", "encoder", "seq2seq"):
        return []
    if model.tokenizer is None:
        return [Check("tokenizer", "warning", "there is none", "put tokenizer.json beside config.json")]
    return [_try("tokenizer", lambda: _round_trip(model), "use the tokenizer that belongs to these weights")]


def _round_trip(model: Model) -> str:
    ids = model.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    text = model.tokenizer.decode(ids)
    largest, size = max(ids), model.vocab_size
    if size is not None and largest >= size:
        raise InputError(f"token id {largest:,} is outside the model's vocabulary of {size:,}")
    same = text.strip().casefold() == PROMPT.casefold()
    return f"{len(ids)} tokens for {PROMPT!r}" + ("" if same else f", decoded as {text!r}")


def _forward(model: Model) -> list[Check]:
    import torch

    from actlas.measure.complexity import forward_arguments
    from actlas.report.example import example_for

    try:
        if model.tokenizer is not None:
            encoded: Any = model.encode(PROMPT)
            run: Callable[[], Any] = lambda: model.forward(encoded)  # noqa: E731
        else:
            module, args, kwargs = forward_arguments(model, example_for(model).inputs, 8, 0)
            run = lambda: module(*args, **kwargs)  # noqa: E731
    except Exception as error:
        return [Check("input", "failed", _said(error), "give an input of the kind that the model reads")]
    out = [Check("input", "ok")]
    try:
        with torch.no_grad():
            output = run()
    except Exception as error:
        return [*out, Check("forward pass", "failed", _said(error), _forward_fix(str(error)))]
    out.append(Check("forward pass", "ok", f"returns {type(output).__name__}"))
    tensor = (
        output
        if isinstance(output, torch.Tensor)
        else next(
            (
                v
                for v in (output.values() if hasattr(output, "values") else output)
                if isinstance(v, torch.Tensor)
            ),
            None,
        )
    )
    if tensor is None or not tensor.is_floating_point():
        return [*out, Check("output", "ok", "no floating-point tensor to check")]
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        dtype = str(tensor.dtype).removeprefix("torch.")
        fix = (
            "load with dtype='float32'"
            if dtype != "float32"
            else "the weights hold NaN or infinity; download again"
        )
        return [*out, Check("output", "failed", f"{bad:,} values are NaN or infinite in {dtype}", fix)]
    return [*out, Check("output", "ok", f"finite, shape {list(tensor.shape)}")]


def _forward_fix(message: str) -> str:
    for sign, fix in (
        (
            "not implemented for 'Half'",
            "this operator has no float16 form on the CPU: load with dtype='float32'",
        ),
        ("same dtype", "mixed data types: load with one dtype, e.g. dtype='float32'"),
        ("out of memory", "use a shorter input, a smaller dtype, or more memory"),
        (
            "index out of range",
            "token ids exceed the embedding: tokenizer and weights do not belong together",
        ),
        ("size mismatch", "weights and config do not belong together"),
        ("same device", "move the model to one device"),
    ):
        if sign in message:
            return fix
    return "look at the message; `--debug` shows the traceback"


def _template(model: Model) -> list[Check]:
    """A chat template is optional; a broken one is the most silent failure of chat models."""
    tokenizer = model.tokenizer
    if model.kind != "causal-lm" or tokenizer is None:
        return []
    if not getattr(tokenizer, "chat_template", None):
        return [Check("chat template", "skipped", "there is none: the model completes text")]
    chat = [{"role": "user", "content": "Hello"}]

    def render() -> str:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if "Hello" not in text:
            raise FailureError("the rendered chat does not hold the message")
        return f"{len(text)} characters for one message"

    return [_try("chat template", render, "take the chat template of the model's repository")]


def _generate(model: Model) -> list[Check]:
    if model.kind != "causal-lm" or model.tokenizer is None:
        return []

    def run() -> str:
        text = model.generate(PROMPT, max_new_tokens=4).texts[0]
        return f"{PROMPT!r} goes on with {text!r}"

    return [_try("generation", run, "check generation_config.json")]


def _try(stage: str, action: Callable[[], str], fix: str) -> Check:
    try:
        return Check(stage, "ok", plain(action()))
    except Exception as error:
        return Check(stage, "failed", _said(error), fix)


def _said(error: BaseException) -> str:
    text = plain(error).strip() or type(error).__name__
    return text[:300] if isinstance(error, ActlasError) else f"{type(error).__name__}: {text[:300]}"
