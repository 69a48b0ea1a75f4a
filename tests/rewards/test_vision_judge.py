"""The judge behind an OpenAI-compatible endpoint, against one that writes down what it is asked."""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_servers import free_port, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pcpo_fast.rewards.retrying_client
from pcpo_fast.config.schema import RewardConfig, ScoringConfig
from pcpo_fast.errors import UserError
from pcpo_fast.rewards import RewardSet, load_reward
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.vision_judge import VisionJudge

KEY = "a-key-of-the-tests"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcpo_fast.rewards.retrying_client, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(pcpo_fast.rewards.retrying_client, "_LONGEST_PAUSE", 0.2)
    monkeypatch.delenv("PCPO_JUDGE_KEY", raising=False)


class Endpoint:
    """Answers with ``say(request's JSON)``: a text, or a whole response."""

    def __init__(self, say: Callable[[dict[str, Any]], Any]) -> None:
        self.say = say
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.wait_for = 0  # requests under way before the first is answered

    async def answer(self, request: Request) -> Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        for _ in range(3000):
            if self.most_at_once >= self.wait_for:
                break
            await asyncio.sleep(0.01)
        self.at_once -= 1
        said = self.say(body)
        if isinstance(said, Response):
            return said
        return JSONResponse({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]})


@contextmanager
def endpoint(say: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[str, Endpoint]]:
    made = Endpoint(say)
    with running(Starlette(routes=[Route("/v1/chat/completions", made.answer, methods=["POST"])])) as url:
        yield f"{url}/v1", made


def asked_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"][0]["text"])


def asked_image(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][-1]["content"][1]["image_url"]["url"]
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def completion(content: Any, reason: str = "stop") -> JSONResponse:
    return JSONResponse({"choices": [{"message": {"content": content}, "finish_reason": reason}]})


IMAGES = torch.rand(3, 3, 6, 4, generator=torch.Generator().manual_seed(3))
PROMPTS = ["a red {circle}", "a blue square", "a star"]
METADATA: list[dict[str, Any]] = [{"count": 2}, {"count": [1]}, {"count": "many"}]


def test_every_image_is_judged_with_its_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {PROMPTS[0]: 7, PROMPTS[1]: 2.5, PROMPTS[2]: 0}

    def say(body: dict[str, Any]) -> str:
        prompt = next(prompt for prompt in PROMPTS if prompt in asked_text(body))
        return f'Well.\n```json\n{{"why": "{{}}", "score": {scores[prompt]}}}\n```'

    monkeypatch.setenv("PCPO_JUDGE_KEY", f" {KEY}\n")
    with endpoint(say) as (url, made):
        made.wait_for = 2
        judge = VisionJudge(url, "some-model", system="Be strict.", request={"seed": 4}, max_tokens=9)
        assert judge(IMAGES, PROMPTS, METADATA).tolist() == [7, 2.5, 0]
    assert set(made.keys) == {f"Bearer {KEY}"} and made.most_at_once >= 2
    for body in made.asked:
        row = next(row for row, prompt in enumerate(PROMPTS) if prompt in asked_text(body))
        expected = (IMAGES[row] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(asked_image(body), expected)
        assert (body["model"], body["seed"], body["max_tokens"], body["temperature"]) == ("some-model", 4, 9, 0)
        assert body["messages"][0] == {"role": "system", "content": "Be strict."}
        assert '{"score": S}' in asked_text(body)  # the braces of the example stay


def test_the_prompt_takes_metadata_and_the_regex_its_last_match() -> None:
    with endpoint(lambda body: f"I thought of 3/10, but {len(asked_text(body))}/10") as (url, made):
        judge = VisionJudge(url, "m", prompt="{metadata.count} of {prompt}?", regex=r"([\d.]+)/10", parallel=1)
        expected = ["2 of a red {circle}?", "[1] of a blue square?", "many of a star?"]
        assert judge(IMAGES, PROMPTS, METADATA).tolist() == [len(text) for text in expected]
    assert [asked_text(body) for body in made.asked] == expected and made.keys == [None] * 3
    with pytest.raises(RewardFailure, match=r"metadata of the prompt 'a star' has no count, which the judge's"):
        judge(IMAGES[:1], ["a star"], [{}])


@pytest.mark.parametrize(
    ("said", "options", "problem"),
    [
        ("seven", {}, "the answer 'seven' has no JSON with a number 'score'"),
        ('{"score": "high"}', {}, "has no JSON with a number 'score'"),
        ('{"score": NaN}', {}, "has no JSON with a number 'score'"),
        ('{"score": true}', {}, "has no JSON with a number 'score'"),
        ('{"score": 85}', {"lowest": 0, "highest": 10}, "is outside 0 to 10"),
        ("7", {"regex": "score: (.*)"}, r"the answer '7' has no match of score: \(\.\*\)"),
        ("score: x", {"regex": "score: (.*)"}, r"has no match of score: \(\.\*\)"),
        # What Python's float() takes and is no number that a judge writes.
        *(
            (f'{{"score": "{text}"}}', {}, "has no JSON with a number 'score'")
            for text in ("1_0", "nan", "-inf", "1e1", "\uff17", "0x7")
        ),
        ('{"score": ' + "9" * 400 + "}", {}, "has no JSON with a number 'score'"),
        ('{"score": "high", "parts": {"score": 3}}', {}, "has no JSON with a number 'score'"),
        ('{"score": [8], "parts": {"score": 3}}', {}, "has no JSON with a number 'score'"),
        # The outermost object is cut off, or no JSON: what lies in it is not the answer.
        ('{"score": 8, "parts": [{"score": 3}]', {}, "has no JSON with a number 'score'"),
        ('{"score": 8, "parts": {"score": 3},}', {}, "has no JSON with a number 'score'"),
        ('<think>perhaps {"score": 2}', {}, "has no JSON with a number 'score'"),
        ('{"score": 7} Had it been blurred: {"score": 1}.', {}, "has more than one 'score': '7, 1'"),
        ('[{"score": 7}, {"score": 1}]', {}, "has more than one 'score': '7, 1'"),
        ('{"score": 7, "score": 1}', {}, "has more than one 'score': '7, 1'"),
        (
            completion('{"score": 2', "length"),
            {},
            r"was cut off by its length \(finish_reason length\); raise .*max_tokens",
        ),
        (completion([{"type": "thinking", "thinking": "{}"}]), {}, "the endpoint's answer has no text"),
        (JSONResponse({"error": {"message": "overloaded"}}), {}, "the endpoint answers with an error: 'overloaded'"),
        (JSONResponse({"choices": []}), {}, "the endpoint's answer has no text"),
        (JSONResponse({"choices": [{"message": {"content": None}}]}), {}, "the endpoint's answer has no text"),
        (JSONResponse({"error": {"message": "image too\nlarge"}}, 400), {}, "answers 400: image too large"),
    ],
)
def test_an_answer_without_a_score_names_the_prompt(said: Any, options: dict[str, Any], problem: str) -> None:
    def say(body: dict[str, Any]) -> Any:
        return said if "square" in asked_text(body) else '{"score": 5} score: 5'

    with endpoint(say) as (url, _):
        specs = [RewardConfig(name="vision_judge", options={"url": url, "model": "m"} | options)]
        with pytest.raises(UserError, match=f"{problem}, for the prompt 'a blue square'$"):
            RewardSet(specs).score(IMAGES, PROMPTS)
        settings = ScoringConfig(on_failure="drop_group")  # type: ignore[call-arg]
        scores = RewardSet(specs, settings).score(IMAGES, PROMPTS)
    assert scores.total[[0, 2]].tolist() == [5, 5] and scores.total[1].isnan()


def test_json_values_of_other_names_and_as_text() -> None:
    with endpoint(lambda body: '{"score": 1, "details": {"beauty": "8.5"}}') as (url, _):
        assert VisionJudge(url, "m", json_key="beauty")(IMAGES[:1], ["a"], [{}]).tolist() == [8.5]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"score": 8, "details": [{"name": "colour", "score": 3}]}', 8),
        ('{"details": [{"score": 3}], "result": {"score": 7, "parts": {"score": 2}}}', 7),
        ('{"result": {"score": 7, "parts": [{"score": 2}]}}', 7),
        ('A {red} [circle]: {"score": " -7.5 "}', -7.5),
        ('<think>perhaps {"score": 2}</think>\n```json\n{"score": 1e1}\n```', 10),
        ('perhaps {"score": 2}</think>{"score": 7} or again {"score": 7.0}', 7),  # the opening tag is in the template
        (completion([{"type": "text", "text": '{"sco'}, {"type": "image"}, {"type": "text", "text": 're": 7}'}]), 7),
    ],
)
def test_the_outermost_value_of_the_answer_counts(said: Any, score: float) -> None:
    with endpoint(lambda body: said) as (url, _):
        assert VisionJudge(url, "m")(IMAGES[:1], ["a"], [{}]).tolist() == [score]


def test_a_busy_endpoint_is_asked_again() -> None:
    busy = [JSONResponse({}, 429, {"Retry-After": "0"}), *(JSONResponse({}, status) for status in (503, 520, 529))]
    answers = iter([*busy, '{"score": 4}'])
    with endpoint(lambda body: next(answers)) as (url, made):
        assert VisionJudge(url, "m", retries=4)(IMAGES[:1], ["a"], [{}]).tolist() == [4]
    assert len(made.asked) == 5 and made.asked[0] == made.asked[4]


@pytest.mark.parametrize(
    ("wanted", "least", "most"),
    [
        ("7", 7, 7),
        ("3600", 60, 60),
        (timedelta(days=1), 60, 60),
        (timedelta(seconds=50), 0, 50),
        (timedelta(days=-1), 0, 0.2),
        ("soon", 0, 0.2),
    ],
)
def test_the_pause_that_an_endpoint_asks_for(
    wanted: str | timedelta, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(wanted, timedelta):
        wanted = format_datetime(datetime.now(UTC) + wanted, usegmt=True)
    pauses: list[float] = []
    monkeypatch.setattr(pcpo_fast.rewards.retrying_client.time, "sleep", pauses.append)
    answers = iter([JSONResponse({}, 429, {"Retry-After": wanted}), '{"score": 4}'])
    with endpoint(lambda body: next(answers)) as (url, _):
        VisionJudge(url, "m", retries=1)(IMAGES[:1], ["a"], [{}])
    (pause,) = (pause for pause in pauses if pause != 0.01)  # which is the endpoint's own
    assert least <= pause <= most


def test_a_redirect_names_its_target_and_nothing_is_sent_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCPO_JUDGE_KEY", KEY)
    with endpoint(lambda body: '{"score": 1}') as (there, other):
        location = there.replace("//", "//user:pass@") + "/chat/completions?key=secret"
        with (
            endpoint(lambda body: JSONResponse({}, 307, {"Location": location})) as (url, _),
            pytest.raises(
                UserError, match=f"{url} answers 307 with a redirect to {there}/chat/completions, "
            ) as caught,
        ):
            VisionJudge(url, "m")(IMAGES[:1], ["a"], [{}])
    assert "pass" not in str(caught.value) and "secret" not in str(caught.value) and not other.asked


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_the_time_limit_is_that_of_the_whole_answer(head: bytes) -> None:
    """A server that sends byte after byte, of its headers or of its body, and never comes to an end."""
    left = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(head or b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(1000):
                connection.sendall(b" ")
                left.wait(0.02)
            return
        left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, daemon=True).start()
        judge = VisionJudge(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m", timeout=0.3, retries=0)
        with pytest.raises(RewardFailure, match=r"does not answer within 0\.3 s, in 1 attempt"):
            judge(IMAGES[:1], ["a"], [{}])
        assert left.wait(60)  # the connection is given up, too


def test_a_refused_key_and_an_endpoint_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint(lambda body: JSONResponse({"error": "no"}, 401)) as (url, made):
        with pytest.raises(UserError, match="refuses requests without a token; set the environment variable MY_KEY"):
            VisionJudge(url, "m", key_env="MY_KEY")(IMAGES, PROMPTS, METADATA)
        monkeypatch.setenv("MY_KEY", "wrong")
        with pytest.raises(UserError, match="refuses the token in the environment variable MY_KEY"):
            VisionJudge(url, "m", key_env="MY_KEY", parallel=1)(IMAGES, PROMPTS, METADATA)
        assert made.keys[-1] == "Bearer wrong"
    gone = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(RewardFailure, match=r"cannot be reached .* in 1 attempt over") as caught:
        VisionJudge(gone, "m", retries=0)(IMAGES, PROMPTS, METADATA)
    assert not caught.value.retry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_key": "a", "regex": "(b)"}, "json_key and regex are two ways"),
        ({"regex": "("}, r"regex '\(' is not a valid regular expression"),
        ({"regex": "score"}, "must have a group"),
        ({"prompt": "How nice?"}, r"prompt must contain \{prompt\}"),
        ({"parallel": 0}, "parallel must be an integer of at least 1, got 0"),
        ({"url": "host"}, "url must be like http://host:8765, got 'host'"),
        ({"key": "sk-x"}, "unexpected keyword argument 'key'"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("vision_judge", {"url": "http://127.0.0.1:1/v1", "model": "m"} | options)


def test_the_request_is_json_of_the_documented_form() -> None:
    with endpoint(lambda body: '{"score": 1}') as (url, made):
        VisionJudge(f"{url}/", "m")(IMAGES[:1], ["a"], [{}])
    assert set(json.loads(json.dumps(made.asked[0]))) == {"model", "max_tokens", "temperature", "messages"}
    kinds = [part["type"] for part in made.asked[0]["messages"][0]["content"]]
    assert kinds == ["text", "image_url"]
