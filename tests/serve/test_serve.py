"""The server: OpenAI's forms, edits per request, batches, and bad requests."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actlas.core.edits import Add
from actlas.core.errors import ActlasError, InputError, ModelError
from actlas.core.model import Model
from actlas.serve.engine import Engine, Event
from actlas.serve.jobs import Job, read_job
from tests.core.tiny import tiny

TestClient = pytest.importorskip("fastapi.testclient").TestClient

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def model() -> Model:
    made = tiny()
    made.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot: "
    )
    return made


@pytest.fixture(scope="module")
def edits(model: Model) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: Add(SITE, torch.randn(model.d_model or 0, generator=generator) * 20) for name in ("up", "down")
    }


@pytest.fixture(scope="module")
def client(model: Model, edits: dict[str, Any]) -> Iterator[Any]:
    from actlas.serve.app import make_app

    with TestClient(make_app(model, edits)) as found:
        yield found


def _expected(model: Model, prompt: str, edit: Any, n: int) -> str:
    if edit is None:
        return model.generate(prompt, max_new_tokens=n).texts[0]
    with model.edit(edit):
        return model.generate(prompt, max_new_tokens=n).texts[0]


def test_a_request_gets_the_tokens_of_generate(client: Any, model: Model, edits: dict[str, Any]) -> None:
    for asked, edit in (
        ([], None),
        (["up*1.5"], edits["up"] * 1.5),
        ([{"name": "down", "strength": -1}], -edits["down"]),
    ):
        body = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "edits": asked}
        reply = client.post("/v1/completions", json=body).json()
        assert reply["choices"][0]["text"] == _expected(model, "hello", edit, 6)
        assert reply["usage"]["prompt_tokens"] == 5 and reply["object"] == "text_completion"
    assert model.installed == ()


def test_the_models_name_can_carry_edits(client: Any, model: Model, edits: dict[str, Any]) -> None:
    body = {"model": f"{model.name}+up*2+down", "prompt": "hello", "max_tokens": 5, "temperature": 0}
    reply = client.post("/v1/completions", json=body).json()
    assert reply["choices"][0]["text"] == _expected(model, "hello", edits["up"] * 2 + edits["down"], 5)
    assert reply["edits"] == ["up*2", "down*1"]


def test_chats_and_streams_say_the_same(client: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
        "edits": ["up"],
    }
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["role"] == "assistant"
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    text = "".join(c["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_a_batch_with_other_edits_in_each_row_is_each_request_alone(
    model: Model, edits: dict[str, Any]
) -> None:
    engine = Engine(model, wait=0.5)
    asked = [
        ("hello", None),
        ("a longer prompt", edits["up"]),
        ("hi", edits["up"] * -1),
        ("hello", edits["down"]),
    ]
    events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in asked]
    sizes: list[int] = []
    inner = engine._generate

    def counted(batch: Any) -> None:
        sizes.append(len(batch))
        inner(batch)

    engine._generate = counted  # type: ignore[method-assign]
    for (prompt, edit), found in zip(asked, events, strict=True):
        engine.submit(Job(prompt, edit, [], 5, 0.0, 1.0, 0), found.put)
    for (prompt, edit), found in zip(asked, events, strict=True):
        text = ""
        while True:
            event = found.get(timeout=60)
            text += event.text
            if event.last:
                break
        assert event.error is None and text == _expected(model, prompt, edit, 5)
    assert max(sizes) > 1
    engine.close()


def test_stop_texts_end_a_reply_before_them(client: Any) -> None:
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "edits": []}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = text[4:6]
    reply = client.post("/v1/completions", json={**body, "stop": stop}).json()["choices"][0]
    assert reply["text"] == text[: text.find(stop)] and reply["finish_reason"] == "stop"
    with client.stream("POST", "/v1/completions", json={**body, "stop": stop, "stream": True}) as streamed:
        lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line]
    assert "".join(json.loads(x)["choices"][0]["text"] for x in lines[:-1]) == reply["text"]


def test_a_seed_gives_the_same_sample(client: Any) -> None:
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 1.0, "seed": 7}
    first, again, other = (
        client.post("/v1/completions", json={**body, "seed": s}).json()["choices"][0]["text"]
        for s in (7, 7, 8)
    )
    assert first == again and first != other


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": 3}, "'prompt' is missing"),
        ({"prompt": ""}, "'prompt' is missing"),
        ({"prompt": "x", "edits": ["upp"]}, "did you mean up"),
        ({"prompt": "x", "edits": ["up*much"]}, "must be a finite number"),
        ({"prompt": "x", "edits": "x/../../etc"}, "has no edit"),
        ({"prompt": "x", "edits": [{"name": "up", "path": "/"}]}, "not 'path'"),
        ({"prompt": "x", "model": "gpt-4"}, "not 'gpt-4'"),
        ({"prompt": "x", "temperature": "hot"}, "'temperature' is 'hot'"),
        ({"prompt": "x", "max_tokens": 10**9}, "'max_tokens'"),
        ({"prompt": "x" * 5000, "max_tokens": 2}, "context"),
        ({"prompt": "x", "n": 4}, "'n' is 4"),
        ({"prompt": "x", "tools": [{}]}, "not supported"),
        ({"prompt": "x", "stop": 3}, "'stop'"),
        ([], "not a JSON object"),
    ],
)
def test_bad_requests_get_one_line(client: Any, body: Any, said: str) -> None:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text
    assert "\n" not in reply.json()["error"]["message"]


def test_what_is_not_json_is_refused(client: Any) -> None:
    reply = client.post("/v1/chat/completions", content=b"{")
    assert reply.status_code == 400 and "not valid JSON" in reply.json()["error"]["message"]


def test_a_strength_that_breaks_the_model_is_said_and_the_server_goes_on(client: Any, model: Model) -> None:
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0}
    for _ in range(2):
        reply = client.post("/v1/completions", json={**body, "edits": [{"name": "up", "strength": 9e8}]})
        assert reply.status_code in (200, 400)
    engine = client.app.state.engine
    found: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(
        Job("hello", Add(SITE, torch.full((model.d_model or 0,), 1e38)) * 1e38, [], 3, 0.0, 1.0, 0), found.put
    )
    event = found.get(timeout=60)
    assert event.error is not None and "NaN or infinite" in str(event.error)
    assert client.post("/v1/completions", json={**body, "edits": []}).status_code == 200


def test_a_cancelled_request_ends(model: Model) -> None:
    engine = Engine(model)
    first: threading.Event = threading.Event()
    found: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def emit(event: Event) -> None:
        found.put(event)
        first.set()

    ticket = engine.submit(Job("hello", None, [], 50, 0.0, 1.0, 0), emit)
    first.wait(60)
    ticket.cancel()
    last = found.get(timeout=60)
    while not last.last:
        last = found.get(timeout=60)
    assert last.reason in ("cancelled", "length", "stop")
    engine.close()


def test_lists_and_page(client: Any, model: Model) -> None:
    names = [m["id"] for m in client.get("/v1/models").json()["data"]]
    assert names == [model.name, f"{model.name}+up", f"{model.name}+down"]
    listed = client.get("/v1/edits").json()
    assert [e["name"] for e in listed["edits"]] == ["up", "down"] and listed["chat"]
    page = client.get("/").text
    assert "<title>Actlas" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_default_that_is_not_there_is_refused(model: Model) -> None:
    from actlas.serve.app import make_app

    with pytest.raises(InputError, match="no edit 'happy'"):
        make_app(model, {}, default=["happy"])
    with pytest.raises(ModelError, match="does not generate"):
        Engine(Model(torch.nn.Linear(2, 2)))


def test_named_edits_of_the_command_line(model: Model, tmp_path: Any) -> None:
    from actlas.cli.serve import named_edits

    Add(SITE, torch.ones(model.d_model or 0)).save(tmp_path / "vec", model)
    found = named_edits([f"happy={tmp_path / 'vec'}*2", f"{tmp_path / 'vec'}"], model)
    assert list(found) == ["happy", "vec"] and "x 2" in found["happy"].describe()
    for wrong, said in (
        (["happy="], "names no path"),
        ([f"a b={tmp_path}"], "must not"),
        ([f"v={tmp_path / 'vec'}"] * 2, "two edits"),
    ):
        with pytest.raises(ActlasError, match=said):
            named_edits(wrong, model)


def test_defaults_apply_when_a_request_names_no_edits(edits: dict[str, Any]) -> None:
    job = read_job({"prompt": "x"}, edits, ["up*0.5"], chat=False, model="m", most_tokens=100)
    assert job.names == ["up*0.5"]
    job = read_job({"prompt": "x", "edits": []}, edits, ["up*0.5"], chat=False, model="m", most_tokens=100)
    assert job.edit is None
