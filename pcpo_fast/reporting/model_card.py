"""The model card of exported weights: a README.md with the front matter that the Hugging Face hub reads."""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

import pcpo_fast
from pcpo_fast.config.schema import Config
from pcpo_fast.config.shipped import find
from pcpo_fast.config.wording import counted
from pcpo_fast.reporting.run_files import RunFiles
from pcpo_fast.runs.provenance import read_provenance

SAMPLES = "samples.png"
LICENSES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "black-forest-labs/FLUX.2-dev": "flux-dev-non-commercial-license",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-9B": "flux-non-commercial-license",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux-non-commercial-license",
    "Qwen/Qwen-Image": "apache-2.0",
    "Qwen/Qwen-Image-2512": "apache-2.0",
    "Tongyi-MAI/Z-Image": "apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "apache-2.0",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
}
"""The hub's names of the licenses of base models; they hold for what is trained from them, too."""
READERS = frozenset(("diffusers", "ComfyUI"))
"""The programs whose use a card describes."""
_OWN_NAMES = ("apache-2.0", "creativeml-openrail-m")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def write_model_card(
    folder: Path,
    run: RunFiles,
    config: Config,
    epoch: int,
    kind: str,
    name: str | None,
    call: Mapping[str, Any] | None,
    readers: Collection[str] = READERS,
) -> None:
    """Write ``README.md`` and, if the run has one, the sample grid of that epoch beside exported weights.

    Args:
        folder: the exported weights.
        run: the run that they come from.
        config: its configuration.
        epoch: epochs trained.
        kind: "pipeline", "LoRA", "transformer" or "unet".
        name: the hub repository that the weights go to; None: they are loaded from the folder.
        call: arguments of diffusers' pipeline for images as the run sampled them; empty if it takes none; None if the
            base model, which says how its pipeline is called, is not here.
        readers: those of :data:`READERS` that read a LoRA with the names that it has.
    """
    grid = dict(run.grids()).get(epoch)
    if grid is not None:
        shutil.copyfile(grid, folder / SAMPLES)
    path = config.model.path
    on_hub = _HUB_ID.fullmatch(path) is not None and not find(path).exists()
    base = path if on_hub else Path(path).name
    epochs = f"{epoch} epoch{'s' if epoch != 1 else ''}"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(base if on_hub else None, kind), sort_keys=False)}---",
        f"# {Path(name or folder.name).name}",
        f"{_ARTICLES[kind]} of {base}, trained by reinforcement learning to raise {_rewards(config)} on its images: "
        f"{epochs} of {config.algorithm or 'policy optimization'} with pcpo_fast.",
    ]
    if grid is not None:
        parts.append(f"![Held-out prompts after {epochs}]({SAMPLES})")
    parts += ["## What the training changed", _results(run, config, epoch)]
    parts += [
        "## Use",
        "No trigger word is needed.",
        _usage(folder, config, kind, base, name or str(folder.name), call, readers),
    ]
    what = f"[{base}](https://huggingface.co/{base})" if on_hub else "the base model"
    license = LICENSES.get(base)
    named = f", {license}," if license is not None else ""
    parts += ["## Origin", _origin(run, config), f"The license of {what}{named} holds for these weights as well."]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


_ARTICLES = {
    "LoRA": "A LoRA",
    "pipeline": "A version",
    "transformer": "The fine-tuned transformer",
    "unet": "The fine-tuned UNet",
}


def _front_matter(base: str | None, kind: str) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if base is not None:
        matter |= {"base_model": base, "base_model_relation": "adapter" if kind == "LoRA" else "finetune"}
        license = LICENSES.get(base)
        if license in _OWN_NAMES:
            matter["license"] = license
        elif license is not None:
            matter |= {
                "license": "other",
                "license_name": license,
                "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE.md",
            }
    return matter | {"tags": ["text-to-image", *(["lora"] if kind == "LoRA" else []), "reinforcement-learning", "pcpo"]}


def _rewards(config: Config) -> str:
    names = [f"`{reward.name}`" for reward in config.rewards if not reward.evaluation_only]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _results(run: RunFiles, config: Config, epoch: int) -> str:
    """A table of the held-out metrics before and after, or a sentence if they were not measured."""
    evaluations = {record["epoch"]: record for record in run.records if record.get("kind") == "evaluation"}
    before, after = evaluations.get(0), evaluations.get(epoch)
    if before is None or after is None:
        return "Held-out images were not scored at this point of the training."
    judges = [f"heldout/reward/{one.column}" for one in config.rewards if one.evaluation_only]
    labels = {"heldout/reward/mean": "reward that was trained"}
    labels |= {key: f"{key.rsplit('/', 1)[-1]} (never trained on)" for key in judges}
    labels |= {"heldout/diversity": "diversity: pixel distance between two images of a prompt"}
    rows = [
        f"| {label} | {before[key]:.4g} | {after[key]:.4g} |"
        for key, label in labels.items()
        if isinstance(before.get(key), float) and isinstance(after.get(key), float)
    ]
    said = "Means over images of held-out prompts, which were not trained on, with the same seeds before and after."
    caveat = "Training maximized the first line, so its rise proves nothing more than that. Look at the images."
    return "\n".join(["| | before | after |", "|---|---|---|", *rows]) + f"\n\n{said} {caveat}"


def _usage(
    folder: Path,
    config: Config,
    kind: str,
    base: str,
    source: str,
    call: Mapping[str, Any] | None,
    readers: Collection[str],
) -> str:
    model = config.model
    given = {"height": model.height, "width": model.width} if call is None else dict(call)
    given["num_inference_steps"] = config.sampler.steps
    options = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items())
    lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
    if kind == "LoRA":
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")']
        lines += [f'pipe.load_lora_weights("{source}")']
    elif kind == "pipeline":
        lines += [f'pipe = DiffusionPipeline.from_pretrained("{source}", dtype=torch.bfloat16).to("cuda")']
    else:
        lines[1] = "from diffusers import AutoModel, DiffusionPipeline"
        lines += [f'network = AutoModel.from_pretrained("{source}", subfolder="{kind}", dtype=torch.bfloat16)']
        lines += [
            f'pipe = DiffusionPipeline.from_pretrained("{base}", {kind}=network, dtype=torch.bfloat16).to("cuda")'
        ]
    code = "\n".join([*lines, f'image = pipe(prompt="a prompt", {options}).images[0]'])
    guidance = "" if call is None else ", the guidance"
    text = f"```python\n{code}\n```\n\nThese are the size{guidance} and the number of steps of the training."
    if call == {}:
        text = (
            f"{base} is a modular pipeline of diffusers (`ModularPipeline`). Size, guidance and steps of the training: "
            f"height {model.height}, width {model.width}, scale {model.cfg_scale:g}, "
            f"{counted(config.sampler.steps, 'step')}."
        )
    if "diffusers" not in readers:
        text = (
            "diffusers does not read the names of layers in this file; an export with `--format diffusers` is for it."
        )
    if kind == "LoRA" and "ComfyUI" not in readers:
        text += (
            "\n\nComfyUI does not read the names of layers in this file; an export with `--format comfyui` is for it."
        )
    elif kind == "LoRA":
        file = next((path.name for path in sorted(folder.glob("*.safetensors"))), "the .safetensors file")
        text += (
            f"\n\nIn ComfyUI: put `{file}` into `models/loras` and load it with *LoraLoaderModelOnly* at strength 1, "
            "the strength that was trained."
        )
    return text


def _origin(run: RunFiles, config: Config) -> str:
    starts = read_provenance(run.folder)
    last = starts[-1] if starts else {}
    lines = [f"- pcpo_fast {last.get('pcpo_fast', pcpo_fast.__version__)}, seed {config.seed}"]
    if config.model.base_weights == "nf4":
        lines.append("- trained beside the base model in 4 bits (NF4)")
    changed = " with changes that are not in it" if last.get("commit_dirty") else ""
    shown = {
        "started": last.get("started"),
        "commit": last.get("commit") and f"{last['commit']}{changed}",
        "GPU": last.get("gpu"),
        "libraries": ", ".join(f"{name} {version}" for name, version in (last.get("libraries") or {}).items()),
    }
    lines += [f"- {label}: {value}" for label, value in shown.items() if value]
    if starts:
        lines.append("- the whole record of what made it: `provenance.json`")
    return "\n".join(lines)
