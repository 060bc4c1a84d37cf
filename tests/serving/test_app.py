"""The Ray Serve application: what is refused before Ray starts, and the real thing, live.

The live tests use OpenAI's own client.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml
from openai import OpenAI

from raytune_ft.chat import ChatModel
from raytune_ft.errors import CheckpointError, ServeError
from raytune_ft.serving.app import ServeArgs, _cause, _check_replicas, build, serve
from raytune_ft.serving.guard import hash_key
from tests.conftest import ROOT
from tests.serving.conftest import Live

QUESTION = [{"role": "user", "content": "red river?"}]


def test_a_wrong_path_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        serve(str(tmp_path / "nothing"))


def test_others_need_a_key(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYTUNE_API_KEY", raising=False)
    with pytest.raises(ServeError, match=r"--host 192\.168\.1\.2: .* set RAYTUNE_API_KEY"):
        serve(str(tiny_model), host="192.168.1.2")


def test_ray_must_ask_for_its_token_where_others_reach_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_API_KEY", "key")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ServeError, match="RAY_AUTH_MODE=disabled opens Ray itself"):
        serve(str(tiny_model), host="0.0.0.0")


def test_a_cluster_is_deployed_to_in_another_way(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ServeError, match=r"RAY_ADDRESS is set.*serve deploy"):
        serve(str(tiny_model))


def test_a_file_of_keys_is_read_before_ray_starts(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("keys: [{name: a, sha256: x}]")
    with pytest.raises(ServeError, match=r"keys\.yaml: keys\.0\.sha256"):
        serve(str(tiny_model), options={"keys": str(tmp_path / "keys.yaml")})


def test_a_port_in_use_is_refused(tiny_model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1:{port}: cannot listen there"):
            serve(str(tiny_model), port=port)
    with pytest.raises(ServeError, match="--port 70000: not a port"):
        serve(str(tiny_model), port=70000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own classes
def test_the_key_itself_never_enters_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTUNE_API_KEY", "canary-key")
    application = build({"path": "x", "gpus": 0})
    args = application._bound_deployment.init_args
    assert args[1] == hash_key("canary-key")
    assert "canary-key" not in repr(args)


def test_the_shipped_config_fits_the_application() -> None:
    config = yaml.safe_load((ROOT / "serve" / "chat.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "raytune_ft.serving.app:build"
    assert ServeArgs.model_validate(application["args"]).path == "smollm2-135m-instruct"
    assert config["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"pth": "y"}, r"args\.pth: .* see serve/chat\.yaml"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is less than min_replicas"),
        ({"origins": ["*"]}, r"args\.origins\.0"),
        ({"engine": "sglang"}, r"args\.engine"),
        ({"keys": "/no/such/keys.yaml"}, "keys /no/such/keys.yaml: cannot be read"),
    ],
)
def test_a_wrong_argument_is_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ServeError, match=words):
        build({"path": "x", **args})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_how_many_replicas() -> None:
    def of(**args: Any) -> Any:
        return build({"path": "x", "gpus": 0, **args})._bound_deployment

    assert of(min_replicas=2).num_replicas == 2
    scaled = of(min_replicas=1, max_replicas=4, requests_per_replica=3)._deployment_config
    assert scaled.autoscaling_config.max_replicas == 4
    assert scaled.autoscaling_config.target_ongoing_requests == 3
    for one in (of(), of(max_replicas=3)):
        assert one._deployment_config.max_queued_requests == -1


def test_more_replicas_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    _check_replicas(ServeArgs(path="x", min_replicas=2, gpus=0.5))
    with pytest.raises(
        ServeError, match=r"--replicas 3: each takes 1 CPU, .* has 2; ask for fewer"
    ):
        _check_replicas(ServeArgs(path="x", min_replicas=3, gpus=0))
    with pytest.raises(ServeError, match="--replicas 2: each takes 1 GPU"):
        _check_replicas(ServeArgs(path="x", min_replicas=2))


def test_a_failed_deployment_is_one_line() -> None:
    trace = (
        "The deployment failed to start 1 times in a row. Error:\n"
        "Traceback (most recent call last):\n  File ...\n"
        "raytune_ft.errors.ModelError: m: no weights; model.safetensors is needed\n\n"
    )
    assert _cause("m", trace) == (
        "m: the endpoint did not start: no weights; model.safetensors is needed"
    )


@pytest.fixture(scope="module")
def client(live: Live) -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.ray
def test_what_serve_prints(live: Live) -> None:
    shown = live.output.read_text()
    assert f"{live.model} answers at {live.url}" in shown
    assert f"chat page:  {live.url}/" in shown
    assert f"curl {live.url}/v1/chat/completions" in shown
    assert len(shown.splitlines()) <= 8, shown


@pytest.mark.ray
def test_openai_client_whole_answer(client: OpenAI, live: Live, endless: ChatModel) -> None:
    assert [model.id for model in client.models.list()] == [live.model]
    answer = client.chat.completions.create(
        model=live.model, messages=QUESTION, max_tokens=8, seed=7, temperature=1.5
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(endless.encode(QUESTION))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.ray
def test_openai_client_stream_equals_the_whole(client: OpenAI, live: Live) -> None:
    options = {"model": live.model, "messages": QUESTION, "max_tokens": 20, "seed": 7}
    whole = client.chat.completions.create(**options, temperature=1.5)
    chunks = list(
        client.chat.completions.create(
            **options, temperature=1.5, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


@pytest.mark.ray
def test_openai_client_stop_and_seed(client: OpenAI, live: Live) -> None:
    def text(seed: int, stop: list[str] | None = None) -> tuple[str, str]:
        choice = client.chat.completions.create(
            model=live.model,
            messages=QUESTION,
            max_tokens=40,
            seed=seed,
            temperature=2,
            top_p=1,
            stop=stop,
            extra_body={"top_k": 0},
        ).choices[0]
        return choice.message.content or "", choice.finish_reason

    whole, _ = text(1)
    assert text(1)[0] == whole
    assert text(2)[0] != whole
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    assert text(1, ["never said", middle]) == (whole[: whole.find(middle)], "stop")


@pytest.mark.ray
def test_a_long_prompt_is_told_to_the_client(client: OpenAI, live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model=live.model, messages=[{"role": "user", "content": "red " * 5000}]
        )
    assert long.value.code == "context_length_exceeded"


@pytest.mark.ray
def test_serves_own_routes_tell_nothing(live: Live) -> None:
    assert httpx.get(f"{live.url}/-/routes").status_code == 404
    assert httpx.get(f"{live.url}/-/healthz").status_code == 200
    headers = {"X-Request-Timeout-Seconds": "\xff", "X-Session-Id": "\xff"}
    response = httpx.get(
        f"{live.url}/readyz", headers={k: v.encode("latin-1") for k, v in headers.items()}
    )
    assert response.status_code == 200
    assert len(response.headers.get_list("x-request-id")) == 1
    metrics = httpx.get(f"{live.url}/metrics").text
    assert "raytune_requests_total{" in metrics


@pytest.mark.ray
def test_a_client_that_leaves_frees_the_model(client: OpenAI, live: Live) -> None:
    """Twenty long answers, left after the first piece, must not delay a short one."""
    for seed in range(20):
        stream = client.chat.completions.create(
            model=live.model, messages=QUESTION, stream=True, seed=seed, temperature=2
        )
        next(iter(stream))
        stream.close()
    start = time.monotonic()
    client.chat.completions.create(model=live.model, messages=QUESTION, max_tokens=1)
    assert time.monotonic() - start < 5


@pytest.mark.ray
def test_other_host_names_are_refused(live: Live) -> None:
    for path in ("/", "/v1/models"):
        response = httpx.get(live.url + path, headers={"Host": "evil.example"})
        assert response.status_code == 403
    assert httpx.get(live.url + "/").headers["content-security-policy"]
