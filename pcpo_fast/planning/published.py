"""Architectures of the published models that the shipped configurations train, so that planning needs no download.

``published.json`` holds the values of the ``config.json`` files that the models' authors publish on the hub, with the
keys of diffusers and transformers, and the hub ids of the models. Four of these models are gated; their configurations
are also given by the libraries' defaults and conversion scripts. FLUX.3's network, VAE and scheduler are diffusers'
defaults, and its text encoder is Qwen3-VL-4B, whose width is an eighth of what the network reads. The resulting
parameter counts agree with model cards and papers: FLUX.1-dev 11,901,408,320; FLUX.2-klein 3.88 and 9.08 billion;
FLUX.2-dev 32.2 billion; FLUX.3 5.54 billion; Z-Image 6.15 billion; Qwen-Image 20.4 billion; Krea 2 12.8 billion;
SD3.5-medium 2.24 billion; Stable Diffusion 1.x 859,520,964. Krea 2's network is diffusers' default, too.
"""

import json
from pathlib import Path
from typing import Any

_ARCHITECTURES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, dict[str, Any]] = {model: known for known in _ARCHITECTURES.values() for model in known["models"]}
"""By hub id: pipeline class, sequence length of CLIP's tokenizer, and each part's class and configuration."""
