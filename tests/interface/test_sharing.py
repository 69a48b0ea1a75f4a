"""What is shared: the model card of an export, and its upload to a hub that this machine plays."""

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_runs import Run, call

from pcpo_fast.config.loading import load_config
from pcpo_fast.config.shipped import configurations
from pcpo_fast.errors import UserError
from pcpo_fast.files.hub_upload import upload
from pcpo_fast.reporting.model_card import LICENSES, write_model_card
from pcpo_fast.reporting.run_files import RunFiles

pytest_plugins = ["cli_fixtures"]
Capture = pytest.CaptureFixture[str]


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files takes."""

    status = 200
    created: dict[str, Any]
    files: dict[str, bytes]

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "me/it", "siblings": []}, 200 if self.status == 200 else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            type(self).created = json.loads(body) | {"authorization": self.headers["Authorization"]}
            self._answer({"url": f"{self._address}/me/it"}, self.status)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            type(self).files = {v["path"]: base64.b64decode(v["content"]) for v in lines if "path" in v}
            self._answer({"commitUrl": f"{self._address}/me/it/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"errors": [], "warnings": []})

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    class Own(Hub):
        pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield Own
        server.shutdown()


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_an_export_is_uploaded_with_its_card(lora: Run, hub: type[Hub], tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "it"
    answer = call(capsys, "export", lora.folder, "--output", target, "--push-to-hub", "me/it", "--private")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1].startswith("uploaded to http://127.0.0.1:")
    assert hub.created["visibility"] == "private" and hub.created["authorization"] == "Bearer hf_of_a_test"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == hub.files
    assert hub.files.keys() == {
        "README.md",
        "provenance.json",
        "pytorch_lora_weights.safetensors",
        "samples.png",
    }
    card = hub.files["README.md"].decode()
    assert front_matter(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "reinforcement-learning", "pcpo"],
    }  # no base model of this name is on the hub
    assert 'pipe.load_lora_weights("me/it")' in card and "models/loras" in card
    assert re.search(
        r'pipe\(prompt="a prompt", height=\d+, width=\d+, guidance_scale=3\.5, num_inference_steps=\d', card
    )
    assert str(tmp_path) not in card and "`tiny_pipeline:redness`" in card
    assert f"- libraries: torch {torch.__version__}" in card
    records = map(json.loads, (lora.folder / "metrics.jsonl").read_text().splitlines())
    before, after = (r["heldout/reward/mean"] for r in records if r["kind"] == "evaluation" and r["epoch"] in (0, 2))
    assert f"| reward that was trained | {before:.4g} | {after:.4g} |" in card


@pytest.mark.parametrize(
    ("kind", "base", "license", "words"),
    [
        ("LoRA", "black-forest-labs/FLUX.2-klein-base-4B", {"license": "apache-2.0"}, "load_lora_weights"),
        ("pipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", {"license": "creativeml-openrail-m"}, 'd("folder"'),
        (
            "transformer",
            "black-forest-labs/FLUX.1-dev",
            {"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
            'AutoModel.from_pretrained("folder", subfolder="transformer"',
        ),
        ("LoRA", "somebody/a-model", {}, "The license of [somebody/a-model]"),
    ],
)
def test_a_card_names_the_base_model_and_its_license(
    kind: str, base: str, license: dict[str, str], words: str, tmp_path: Path
) -> None:
    config = load_config(None, [f"model.path={base}"])
    folder = tmp_path / "folder"
    folder.mkdir()
    write_model_card(folder, RunFiles(tmp_path), config, 3, kind, None, None)
    card = (folder / "README.md").read_text()
    assert 'pipe(prompt="a prompt", height=32, width=32, num_inference_steps=' in card
    found = front_matter(card)
    assert found["base_model"] == base
    assert found["base_model_relation"] == ("adapter" if kind == "LoRA" else "finetune")
    assert {key: value for key, value in found.items() if key in ("license", "license_name")} == license
    assert words in card and "Held-out images were not scored" in card
    named = license.get("license_name", license.get("license"))
    assert named is None or f"The license of [{base}](https://huggingface.co/{base}), {named}, holds" in card


def test_a_card_says_that_the_code_had_changes_which_its_commit_lacks(tmp_path: Path) -> None:
    start = {"pcpo_fast": "0.0.9", "commit": "abc123", "commit_dirty": True, "gpu": None, "libraries": {"torch": "2"}}
    (tmp_path / "provenance.json").write_text(json.dumps([start]))
    write_model_card(tmp_path, RunFiles(tmp_path), load_config(None), 3, "LoRA", None, None)
    card = (tmp_path / "README.md").read_text()
    assert "- pcpo_fast 0.0.9, seed 0\n- commit: abc123 with changes that are not in it\n- libraries: torch 2\n" in card


def test_a_card_of_a_modular_pipeline_shows_no_call_that_it_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a shipped path looks like a hub id
    config = load_config(None, ["sampler.steps=6", "model.cfg_scale=4"])
    write_model_card(tmp_path, RunFiles(tmp_path), config, 3, "LoRA", None, {})
    card = (tmp_path / "README.md").read_text()
    assert "`ModularPipeline`" in card and "height 32, width 32, scale 4, 6 steps" in card and "```" not in card
    assert "base_model" not in front_matter(card) and "The license of the base model holds" in card


@pytest.mark.parametrize(
    ("readers", "says", "silent"),
    [
        (["ComfyUI"], "an export with `--format diffusers` is for it", "load_lora_weights"),
        (["diffusers"], "an export with `--format comfyui` is for it", "In ComfyUI"),
    ],
)
def test_a_card_shows_no_program_that_does_not_read_the_file(
    readers: list[str], says: str, silent: str, tmp_path: Path
) -> None:
    config = load_config(None, ["model.path=somebody/a-model"])
    write_model_card(tmp_path, RunFiles(tmp_path), config, 3, "LoRA", None, None, readers)
    card = (tmp_path / "README.md").read_text()
    assert says in card and silent not in card


def test_the_licenses_of_the_models_of_shipped_configurations_are_known() -> None:
    paths = {load_config(name).model.path for name in configurations()}
    unread = {"black-forest-labs/flux-3-image-klein-base"}  # its card then names the model and no license
    assert {path for path in paths if not path.startswith("assets/")} == LICENSES.keys() & paths | unread


def test_what_the_hub_refuses_is_a_sentence_and_the_files_stay(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Run, capsys: Capture
) -> None:
    (tmp_path / "README.md").touch()
    for status, words in (
        (403, "does not let you write to me/it: run `hf auth login`"),
        (500, "the hub refused me/it"),
    ):
        hub.status = status
        with pytest.raises(UserError, match=words) as caught:
            upload(tmp_path, "me/it", "x", private=False)
        assert "\n" not in str(caught.value) and f"The files are in {tmp_path}" in str(caught.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    with pytest.raises(UserError, match=r"me/it could not be uploaded: .*The files are in"):
        upload(tmp_path, "me/it", "x", private=False)
    for options, words in (
        (("--push-to-hub", "it"), "error: --push-to-hub: it is not a hub id of the form owner/name\n"),
        (("--private",), "error: --private: only takes effect with --push-to-hub\n"),
    ):
        answer = call(capsys, "export", full.folder, "--output", tmp_path / "no", *options)
        assert (answer.code, answer.err) == (2, words) and not (tmp_path / "no").exists()
