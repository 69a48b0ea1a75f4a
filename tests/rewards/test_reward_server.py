"""The reward server and its client: exact scores, load, repeated requests, refusals, death and restart."""

import json
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_servers import TOKEN, address_of, free_port, reward_server, start_server, wait_for
from safetensors.torch import save
from torch import Tensor

import pcpo_fast.rewards.retrying_client
from pcpo_fast.cli import main
from pcpo_fast.config.schema import RewardConfig, ScoringConfig
from pcpo_fast.errors import UserError
from pcpo_fast.rewards import RewardSet, load_reward
from pcpo_fast.rewards.failures import RewardFailure
from pcpo_fast.rewards.jpeg import jpeg_compressibility
from pcpo_fast.rewards.preprocessing import as_bytes
from pcpo_fast.rewards.remote import Remote
from pcpo_fast.rewards.serving.wire import CONTENT_TYPE, pack, unpack

httpx2 = pytest.importorskip("httpx2")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcpo_fast.rewards.retrying_client, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(pcpo_fast.rewards.retrying_client, "_LONGEST_PAUSE", 0.2)
    monkeypatch.delenv("PCPO_REWARD_TOKEN", raising=False)


def first_pixel(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    if "bad" in prompts:
        raise KeyError("bad is bad")
    return images[:, 0, 0, 0] + torch.tensor([float(row.get("n", 0)) for row in metadata])


def numbered(count: int, first: int = 0, size: int = 4) -> Tensor:
    """Images whose first pixel is their number in 1024ths."""
    images = torch.rand(count, 3, size, size)
    images[:, 0, 0, 0] = torch.arange(first, first + count) / 1024
    return images


def body_of(count: int = 2, **changes: Any) -> bytes:
    values = {"images": numbered(count), "prompts": ["a"] * count, "metadata": [{}] * count} | changes
    return pack(values["images"], values["prompts"], values["metadata"])


def post(url: str, body: bytes, name: str = "one", **headers: str) -> Any:
    everything = {"Content-Type": CONTENT_TYPE, "X-Request-Id": name} | headers
    return httpx2.post(url + "/v1/score", content=body, headers=everything, timeout=60)


# What travels


def test_a_request_is_read_back_exactly() -> None:
    images, prompts, metadata = numbered(3, size=5), ["a", "ä 雪 \n\"{}'", ""], [{}, {"n": [1, None, "x"]}, {"m": 0.1}]
    batch = unpack(pack(images, prompts, metadata), 3)
    assert torch.equal(batch.images, images) and batch.images.dtype == torch.float32
    assert (batch.prompts, batch.metadata) == (prompts, metadata)
    coarse = unpack(pack(as_bytes(images), prompts, metadata), 3).images
    assert (coarse - images).abs().max() <= 0.5 / 255 + 1e-6 and not torch.equal(coarse, images)


def header_of(header: bytes, rest: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


TEXTS = {"prompts": '["a"]', "metadata": "[{}]"}
MALFORMED = {
    "nothing": (b"", "header is cut"),
    "three bytes": (b"abc", "header is cut"),
    "a length beyond the end": ((2**62).to_bytes(8, "little") + b"{}", "header is cut"),
    "no JSON": (header_of(b"}{"), "header is not valid JSON"),
    "deep JSON": (header_of(b"[" * 100_000), "header is not valid JSON"),
    "a list": (header_of(b"[1]"), "no prompts and metadata"),
    "no texts": (save({"images": torch.zeros(1, 3, 4, 4)}), "no prompts and metadata"),
    "cut": (body_of(1)[:-5], "not a safetensors file"),
    "a tensor that lies": (
        header_of(
            json.dumps(
                {"__metadata__": TEXTS, "images": {"dtype": "F32", "shape": [1, 3, 9, 9], "data_offsets": [0, 4]}}
            ).encode(),
            b"0000",
        ),
        "not a safetensors file",
    ),
    "another tensor": (save({"picture": torch.zeros(1, 3, 4, 4)}, metadata=TEXTS), "one tensor named images"),
    "a dtype": (save({"images": torch.zeros(1, 3, 4, 4).double()}, metadata=TEXTS), "must be float32 or uint8"),
    "a shape": (save({"images": torch.zeros(1, 4, 4)}, metadata=TEXTS), "must be float32 or uint8"),
    "no images": (save({"images": torch.zeros(0, 3, 4, 4)}, metadata=TEXTS), "0 images in a request"),
    "no pixels": (save({"images": torch.zeros(1, 3, 0, 4)}, metadata=TEXTS), "0 x 4 pixels"),
    "too many": (body_of(5), "5 images in a request, but 1 to 4"),
    "prompts missing": (save({"images": torch.zeros(1, 3, 4, 4)}, metadata={"metadata": "[{}]"}), "prompts must be"),
    "a prompt too few": (body_of(2, prompts=["a"]), "prompts must be a JSON list of 2 strings"),
    "a prompt that is none": (body_of(1, prompts=[3]), "prompts must be a JSON list of 1 strings"),
    "metadata of another kind": (body_of(1, metadata=["x"]), "metadata must be a JSON list of 1 objects"),
}


@pytest.fixture(scope="module")
def strict() -> Iterator[str]:
    """A server with narrow limits and a token."""
    with reward_server(first_pixel, token=TOKEN, most_images=4, most_bytes=4000) as (url, _):
        yield url


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_body_is_refused_and_the_server_lives(case: str, strict: str) -> None:
    body, words = MALFORMED[case]
    if case == "deep JSON":
        with pytest.raises(ValueError, match=words):
            unpack(body, 4)
        return  # longer than this server allows
    answer = post(strict, body, Authorization=f"Bearer {TOKEN}")
    assert answer.status_code == 400 and words in answer.json()["error"]
    assert (
        post(strict, body_of(2), "alive-" + case.replace(" ", "-"), Authorization=f"Bearer {TOKEN}").status_code == 200
    )


def test_refusals(strict: str) -> None:
    good = {"Authorization": f"Bearer {TOKEN}"}
    for token in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer"}):
        answer = post(strict, body_of(), **token)
        assert answer.status_code == 401 and "token is wrong or missing" in answer.json()["error"]
        assert httpx2.get(strict + "/v1/reward", headers=token).status_code == 401
    assert httpx2.get(strict + "/health").json() == {"status": "ok"}
    assert httpx2.get(strict + "/v1/reward", headers=good).json()["most_bytes"] == 4000
    assert post(strict, body_of(), "", **good).status_code == 400
    assert post(strict, body_of(), "a/b", **good).status_code == 400
    assert post(strict, body_of(), **(good | {"Content-Type": "text/plain"})).status_code == 415
    assert httpx2.get(strict + "/v1/score", headers=good).status_code == 405
    large = post(strict, body_of(3, images=numbered(3, size=20)), **good)
    assert large.status_code == 413 and "at most 4000 are allowed" in large.json()["error"]
    unknown_length = post(strict, iter([body_of()]), **good)  # type: ignore[arg-type]
    assert unknown_length.status_code == 411


def test_a_body_that_does_not_arrive_gives_its_place_back() -> None:
    with reward_server(first_pixel, body_seconds=0.2) as (url, server):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3000\r\n"
            connection.sendall(f"{head}Content-Type: {CONTENT_TYPE}\r\nX-Request-Id: slow\r\n\r\nabc".encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b""))  # it may come in several packets
        assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.2 s" in answer
        assert server.waiting_bytes == 0


# Scores


def test_scores_are_those_of_the_reward_in_process() -> None:
    images = torch.rand(7, 3, 24, 16)
    prompts, metadata = [f"p{n}" for n in range(7)], [{"n": n} for n in range(7)]
    with reward_server(jpeg_compressibility) as (url, _):
        expected = jpeg_compressibility(images, prompts, metadata)
        for pixels in ("float32", "uint8"):  # a JPEG is made of rounded pixels
            remote = Remote(url, batch_size=3, pixels=pixels)
            assert torch.equal(remote(images, prompts, metadata), expected)
    with reward_server(lambda images, *_: [1e8 + row / 8 for row in range(len(images))]) as (url, _):
        assert Remote(url)(images, prompts, metadata).tolist() == [1e8 + row / 8 for row in range(7)]
    with reward_server(first_pixel) as (url, server):
        scores = RewardSet([RewardConfig(name="remote", options={"url": url})]).score(images, prompts, metadata)
        assert torch.equal(scores.total, first_pixel(images, prompts, metadata))
        assert server.work.images_scored == 7


@pytest.mark.parametrize("accepts", [True, False])
def test_a_served_reward_may_decline_predictions(accepts: bool) -> None:
    def judge(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return images[:, 0, 0, 0]

    judge.scores_predictions = accepts  # type: ignore[attr-defined]
    declined = pytest.raises(UserError, match="reward remote does not score the blurred images that steps predict")
    with reward_server(judge) as (url, _), nullcontext() if accepts else declined:
        RewardSet([RewardConfig(name="remote", options={"url": url})]).check_predictions()


def test_requests_under_load_are_joined_and_each_gets_its_own_scores() -> None:
    sizes: list[int] = []

    def counting(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        sizes.append(len(images))
        time.sleep(0.005)
        return first_pixel(images, prompts, metadata)

    with reward_server(counting, batch_size=8) as (url, server):
        results: dict[int, Tensor] = {}

        def client(number: int) -> None:
            remote = Remote(url, batch_size=3, parallel=2)
            size = 4 + 2 * (number % 2)  # images of two sizes, which cannot be joined
            for turn in range(2):
                first = 100 * number + 10 * turn
                results[first] = remote(numbered(8, first, size), ["p"] * 8, [{}] * 8)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for first, scores in results.items():
            assert torch.equal(scores, torch.arange(first, first + 8) / 1024)
        assert len(results) == 16 and sum(sizes) == server.work.images_scored == 16 * 8
        assert len(sizes) < 16 * 3 and max(sizes) <= 8
        assert server.waiting_bytes == 0


def test_a_repeated_request_is_scored_once() -> None:
    calls: list[int] = []
    hold = threading.Event()

    def slow(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        calls.append(len(images))
        hold.wait(20)
        return images[:, 0, 0, 0]

    with reward_server(slow) as (url, server):
        body, answers = body_of(2), []
        threads = [threading.Thread(target=lambda: answers.append(post(url, body, "same"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        with pytest.raises(httpx2.ReadTimeout):  # a client that gives up, too
            httpx2.post(
                url + "/v1/score",
                content=body,
                headers={"Content-Type": CONTENT_TYPE, "X-Request-Id": "same"},
                timeout=0.3,
            )
        hold.set()
        for thread in threads:
            thread.join(20)
        answers.append(post(url, body, "same"))
        assert [answer.json() for answer in answers] == [{"request": "same", "scores": [0.0, 1 / 1024]}] * 4
        assert calls == [2] and server.work.images_scored == 2
        other = post(url, body_of(2, prompts=["b", "c"]), "same")
        assert other.status_code == 409 and "was used for another request" in other.json()["error"]


def test_too_much_at_once_is_put_off_and_the_client_comes_back() -> None:
    hold = threading.Event()

    def slow(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        hold.wait(20)
        return images[:, 0, 0, 0]

    with reward_server(slow, most_waiting_bytes=600) as (url, server):
        first = threading.Thread(target=lambda: post(url, body_of(2), "first"))
        first.start()
        wait_for(lambda: server.waiting_bytes > 0)
        answer = post(url, body_of(2), "second")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        threading.Timer(0.2, hold.set).start()
        scores = Remote(url, retries=8)(numbered(2), ["a", "b"], [{}, {}])
        assert scores.tolist() == [0.0, 1 / 1024]
        first.join(20)


def test_a_failure_names_reward_and_prompt_and_spares_other_requests() -> None:
    with reward_server(first_pixel, linger=0.3) as (url, server):
        outcomes: dict[str, Any] = {}

        def client(prompt: str) -> None:
            try:
                outcomes[prompt] = Remote(url)(numbered(2), ["fine", prompt], [{}, {}]).tolist()
            except RewardFailure as failure:
                outcomes[prompt] = str(failure)

        threads = [threading.Thread(target=client, args=(prompt,)) for prompt in ("good", "bad")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert outcomes["good"] == [0.0, 1 / 1024]
        assert outcomes["bad"].startswith(f"reward remote: {url} answers 422: reward served failed on the prompt 'bad'")
        assert server.work.images_scored == 2
        settings = ScoringConfig(on_failure="drop_group")  # type: ignore[call-arg]
        rewards = RewardSet([RewardConfig(name="remote", options={"url": url})], settings)
        scores = rewards.score(numbered(4), ["fine", "bad", "fine", "bad"])
        assert scores.total[[0, 2]].tolist() == [0.0, 2 / 1024] and scores.total[[1, 3]].isnan().all()


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_reward_that_exits_is_answered_and_the_server_lives() -> None:
    """SystemExit is no Exception: it must not end the thread that answers."""

    def leaves(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if "leave" in prompts:
            raise SystemExit(3)
        return first_pixel(images, prompts, metadata)

    with reward_server(leaves) as (url, _):
        answer = post(url, body_of(1, prompts=["leave"]), "gone")
        assert answer.status_code == 422 and answer.json()["error"].endswith("(image 1 of 1): SystemExit: 3")
        assert post(url, body_of(1), "alive").json()["scores"] == [0.0]


def test_images_too_large_for_one_request_are_sent_in_smaller_ones() -> None:
    with reward_server(first_pixel, most_bytes=2000) as (url, server):
        remote = Remote(url, batch_size=8)
        assert remote(numbered(8, size=8), ["p"] * 8, [{}] * 8).tolist() == (torch.arange(8) / 1024).tolist()
        assert server.work.images_scored == 8
        with pytest.raises(UserError, match=r"an image is \d+ bytes, but http.* takes 2000 .*pixels to uint8"):
            remote(numbered(1, size=16), ["p"], [{}])


# Away


def test_a_server_that_is_killed_and_comes_back_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_reward.py").write_text(
        "import pathlib, time\n"
        "def pixel(images, prompts, metadata):\n"
        "    while pathlib.Path('dying').exists():\n"  # of 30 images some are left, however long the test takes to kill
        "        time.sleep(0.01)\n"
        "    with pathlib.Path('scored').open('a') as file:\n"
        "        file.write('x' * len(images))\n"
        "    if pathlib.Path('scored').stat().st_size == 5:\n"
        "        pathlib.Path('dying').touch()\n"
        "    return images[:, 0, 0, 0]\n"
    )
    port = free_port()
    arguments = ("slow_reward:pixel", "--port", str(port), "--batch-size", "1")
    monkeypatch.setenv("PCPO_REWARD_TOKEN", TOKEN)
    server = start_server(tmp_path, *arguments, PCPO_REWARD_TOKEN=TOKEN)
    results: list[Tensor] = []
    try:
        assert address_of(server) == {"url": f"http://127.0.0.1:{port}", "reward": "slow_reward:pixel", "token": True}
        remote = Remote(f"http://127.0.0.1:{port}", batch_size=1, parallel=3, retries=600)
        work = threading.Thread(target=lambda: results.append(remote(numbered(30), ["p"] * 30, [{}] * 30)), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work.start()
            wait_for(lambda: (tmp_path / "dying").exists(), 60)
            server.kill()
            server.wait()
            before = len((tmp_path / "scored").read_text())
            assert not results and before == 5
            (tmp_path / "dying").unlink()
            server = start_server(tmp_path, *arguments, PCPO_REWARD_TOKEN=TOKEN)
            work.join(90)
        assert results[0].tolist() == (torch.arange(30) / 1024).tolist()
        headers = {"Authorization": f"Bearer {TOKEN}"}
        counted = httpx2.get(f"http://127.0.0.1:{port}/v1/reward", headers=headers).json()["images_scored"]
        # The second server scored what the first had not answered: at most the three under way are scored by both.
        assert 30 <= before + counted <= 30 + 3
        server.terminate()
        assert server.wait(20) in (0, -15)
    finally:
        server.kill()
        server.wait()


def test_a_server_that_stays_away_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.warns(UserWarning, match=rf"reward remote: {url} cannot be reached .*; trying again for about"):  # noqa: SIM117
        with pytest.raises(
            RewardFailure, match=rf"^reward remote: {url} cannot be reached \(.*\), in 3 attempts over"
        ) as caught:
            Remote(url, retries=2)
    assert "\n" not in str(caught.value) and not caught.value.retry


def test_the_token_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    with reward_server(first_pixel, token=TOKEN) as (url, _):
        with pytest.raises(UserError, match="refuses requests without a token; set the environment variable OTHER"):
            Remote(url, token_env="OTHER")
        monkeypatch.setenv("OTHER", "wrong")
        with pytest.raises(UserError, match="refuses the token in the environment variable OTHER"):
            Remote(url, token_env="OTHER")
        monkeypatch.setenv("OTHER", f"{TOKEN}\n")
        assert Remote(url, token_env="OTHER")(numbered(1), ["p"], [{}]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8765"}, "url must be like http://host:8765, got 'localhost:8765'"),
        ({"url": "http://me:secret@host"}, "url must not hold a user name or password; put the token into the environ"),
        ({"url": "http://host", "timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"url": "http://host", "retries": -1}, "retries must be an integer of at least 0, got -1"),
        ({"url": "http://host", "batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"url": "http://host", "pixels": "png"}, "pixels must be float32 or uint8, got 'png'"),
        ({}, "missing a required argument: 'url'"),
        ({"url": "http://host", "token": "x"}, "got an unexpected keyword argument 'token'"),
    ],
)
def test_options_of_the_client(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward("remote", options)


def test_something_else_at_the_address(strict: str) -> None:
    with pytest.raises(UserError, match=r"answers 404 \(Not Found\); check url"):
        Remote(strict + "/v2")


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines, so the server needs a token: set"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid can be reached from other machines"),
        (["--port", "70000"], "cannot listen on --host 127.0.0.1 --port 70000"),
        (["--port", "0", "--device", "tpu"], "--device: there is no device 'tpu' here; available: cpu"),
        (["--port", "0", "--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--port", "0", "quality=5"], "does not take the options {'quality': 5}"),
        (["--port", "0", "5=quality"], "a reward's option must have the form name=value"),
    ],
)
def test_a_server_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert main(["serve-reward", "jpeg_compressibility", *arguments]) == 2
    answer = capsys.readouterr()
    assert answer.out == "" and answer.err.count("\n") == 1 and re.search(message, answer.err), answer.err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve-reward", "jpeg_compressibility", "--port", port]) == 2
    assert f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use" in capsys.readouterr().err
