"""What is Stable Diffusion's own: timesteps, schedulers, epsilon against v, the published UNet."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from pcpo_kernels import Endpoints, policy_loss
from tested_families import CPU, LATENTS, LORA, Family, random_latents
from tiny_pipeline import HEIGHT, PROMPTS, WIDTH
from tiny_pipelines import SCHEDULER
from torch import Tensor

from pcpo_fast.config.schema import LoraConfig, ModelConfig
from pcpo_fast.errors import UserError
from pcpo_fast.method.credit import credit_table
from pcpo_fast.method.samplers import build_transitions
from pcpo_fast.method.transitions import Transitions, ddim, stable_diffusion_alphas
from pcpo_fast.policies.lora import add_lora
from pcpo_fast.policies.stable_diffusion import StableDiffusionPolicy


@pytest.fixture(scope="module")
def family(sd_folder: Path) -> Family:
    return Family("sd", sd_folder)


@pytest.fixture(scope="module")
def policy(family: Family) -> Any:
    return family.policy("model.cfg_scale=1.0")


# ------------------------------------------------------------------------------------------------- timesteps


def test_every_timestep_reaches_the_unet_as_the_integer_it_is(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times travel as float32 fractions; all thousand of them come back."""
    asked: list[Tensor] = []

    def unet(latents: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        asked.append(timestep)
        return (latents,)

    monkeypatch.setattr(policy, "forward_module", unet)
    steps = torch.arange(1000)
    times = (steps.double() / 1000).float()
    policy.predict_halves(torch.zeros(1000, 4, 1, 1), times, {"prompt_embeds": torch.zeros(1000, 1, 32)})
    assert torch.equal(asked[0], steps.float())


def test_the_time_is_that_of_the_step(policy: Any) -> None:
    latents, conditioning = random_latents(1), policy.encode(PROMPTS[:1])
    outputs = [policy.predict(latents, torch.tensor([t]), conditioning) for t in (0.501, 0.5013, 0.502)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-6)


def with_scheduler(policy: Any, scheduler: Any) -> StableDiffusionPolicy:
    return StableDiffusionPolicy(policy.network, policy.vae, scheduler, ModelConfig(height=HEIGHT, width=WIDTH))


def test_published_schedulers_become_ddims(policy: Any) -> None:
    """The scheduler_config.json of Stable Diffusion 1.x is PNDM's; the table is DDPO's."""
    schedule = with_scheduler(policy, PNDMScheduler.from_config(SCHEDULER)).schedule(50)
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert torch.equal(schedule.alphas_cumprod, stable_diffusion_alphas())
    assert schedule.prediction == "epsilon"


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler.from_config({k: v for k, v in SCHEDULER.items() if k not in ("steps_offset", "clip_sample")}),
        DDIMScheduler.from_config({k: v for k, v in SCHEDULER.items() if k != "set_alpha_to_one"}),
        EulerDiscreteScheduler.from_config(SCHEDULER),  # linspace
        DPMSolverMultistepScheduler.from_config(SCHEDULER, use_karras_sigmas=True),
    ],
    ids=["no offset", "alpha to one", "Euler", "DPM"],
)
def test_other_schedulers_give_the_same_steps(policy: Any, scheduler: Any, capfd: pytest.CaptureFixture[str]) -> None:
    schedule = with_scheduler(policy, scheduler).schedule(50)
    assert schedule.timesteps.tolist() == list(range(981, 0, -20))
    assert torch.equal(schedule.alphas_cumprod, stable_diffusion_alphas())
    assert ddim(schedule.alphas_cumprod, schedule.timesteps, 1.0).steps == 50
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_a_pipelines_old_scheduler_is_mended_as_diffusers_does(family: Family, tmp_path: Path) -> None:
    """steps_offset 0 and clip_sample, as the first uploads had them."""
    pipeline = family.pipeline()
    old = {k: v for k, v in SCHEDULER.items() if k not in ("steps_offset", "clip_sample")}
    pipeline.register_modules(scheduler=PNDMScheduler.from_config(old))
    pipeline.save_pretrained(tmp_path / "pipeline")
    schedule = Family("sd", tmp_path / "pipeline").policy().schedule(4)
    assert schedule.timesteps.tolist() == [751, 501, 251, 1]


def test_trailing_timesteps_stay(policy: Any) -> None:
    schedule = with_scheduler(policy, DDIMScheduler.from_config(SCHEDULER, timestep_spacing="trailing")).schedule(4)
    assert schedule.timesteps.tolist() == [999, 749, 499, 249]
    ddim(schedule.alphas_cumprod, schedule.timesteps, 1.0)


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_another_prediction_is_refused(policy: Any, kind: str) -> None:
    scheduler = DPMSolverMultistepScheduler.from_config(SCHEDULER, prediction_type=kind)
    with pytest.raises(UserError, match=rf"^model\.path: .* {kind}; allowed are epsilon and v_prediction"):
        with_scheduler(policy, scheduler).schedule(4)


@pytest.mark.parametrize(("steps", "trained"), [(1000, 1000), (100, 64)])
def test_more_steps_than_the_model_knows_are_refused(policy: Any, steps: int, trained: int) -> None:
    scheduler = PNDMScheduler.from_config(SCHEDULER, num_train_timesteps=trained)
    with pytest.raises(UserError, match=rf"^sampler\.steps: {steps} steps do not fit the {trained} that the model"):
        with_scheduler(policy, scheduler).schedule(steps)


def test_as_many_steps_as_fit_are_taken(family: Family, policy: Any) -> None:
    settings = family.config("sampler.steps=999").sampler
    assert build_transitions(settings, policy.schedule(999)).steps == 999


# ------------------------------------------------------------------------------------- epsilon against v, float64


class AsEpsilon(StableDiffusionPolicy):
    """The model of a policy that predicts v, asked for the epsilon that this v means."""

    def run_network(self, latents: Tensor, times: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        v = super().run_network(latents, times, conditioning)
        alpha = stable_diffusion_alphas()[(times * 1000).round().long()].reshape(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * latents + alpha.sqrt() * v


@torch.no_grad()
def trajectory(
    policy: Any, table: Transitions, start: Tensor, noise: Tensor, conditioning: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents before and after every step, and outputs, in float64."""
    latents, outputs = [start], []
    for step in range(table.steps):
        outputs.append(policy.predict(latents[-1], table.times[step].expand(len(start)), conditioning))
        a, b, std = (float(column[step]) for column in (table.a, table.b, table.std))
        latents.append(a * latents[-1] + b * outputs[-1] + std * noise[step])
    return latents, outputs


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_v_and_the_epsilon_that_it_means_are_one_model(sd_v_folder: Path, scale: float) -> None:
    """The same trajectories, log-ratios and native gradients: the sampler does not see what the network predicts."""
    family = Family("sd_v", sd_v_folder)
    policies, outcomes = [], []
    for kind in ("v", "epsilon"):
        policy = family.policy(f"model.cfg_scale={scale}")
        if kind == "epsilon":
            scheduler = PNDMScheduler.from_config(SCHEDULER)
            policy = AsEpsilon(
                policy.network, policy.vae, scheduler, policy.settings, folder=policy.folder, cache=policy.cache,
            )  # fmt: skip
        policy.module.double()
        policies.append(policy)
    conditioning = policies[0].encode(PROMPTS[:3])
    start, noise = random_latents(3).double(), random_latents(4 * 3, seed=1).double().reshape(4, 3, *LATENTS)
    advantage = torch.tensor([1.0, -0.7, 0.3], dtype=torch.float64)
    for policy in policies:
        table = build_transitions(family.config().sampler, policy.schedule(4))
        latents, old = trajectory(policy, table, start, noise, conditioning)
        with torch.no_grad():
            for p in policy.module.parameters():  # as an optimizer step would
                p.mul_(1.01)
        credit = credit_table(table, "native")
        ratios = []
        for step in range(3):
            halves = policy.predict_halves(latents[step], table.times[step].expand(3), conditioning)
            guided = halves.unconditional is not None
            a, b, std, linear, quadratic = (
                column[step].expand(3).double()
                for column in (table.a, table.b, table.std, credit.linear, credit.quadratic)
            )
            result = policy_loss(
                halves.conditional, old[step], Endpoints(latents[step], latents[step + 1], a, b, std), linear,
                quadratic, torch.ones(3, dtype=torch.float64), advantage, clip_range=0.1, objective="clip",
                unconditional=halves.unconditional,
                guidance_scale=torch.full((3,), scale, dtype=torch.float64) if guided else None,
            )  # fmt: skip
            result.loss.backward()
            ratios.append(result.log_ratio.detach())
        gradients = torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None])
        outcomes.append((torch.stack(latents), torch.stack(ratios), gradients))
    (latents, ratios, gradients), (other_latents, other_ratios, other_gradients) = outcomes
    assert latents.dtype == ratios.dtype == gradients.dtype == torch.float64
    assert torch.allclose(latents, other_latents, rtol=1e-10, atol=1e-10)
    assert ratios.abs().min() > 1e-6
    assert torch.allclose(ratios, other_ratios, rtol=1e-7, atol=1e-12)
    assert gradients.norm() > 1e-4
    assert torch.allclose(gradients, other_gradients, rtol=1e-6, atol=1e-9 * float(gradients.norm()))


# ---------------------------------------------------------------------------------- published configuration


def test_published_unet_on_the_meta_device(policy: Any) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    vae: Any = SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512)})  # nothing else is asked of it here
    stable = StableDiffusionPolicy(unet, vae, policy.scheduler, ModelConfig(height=512, width=768, cfg_scale=5.0))
    assert stable.latent_shape == (4, 64, 96)
    stable._negative = {"prompt_embeds": torch.empty(1, 77, 768, device="meta")}
    add_lora(unet, LoraConfig(rank=16, alpha=16), StableDiffusionPolicy.lora_targets)
    adapted = {name.removesuffix(".lora_A") for name, _ in unet.named_modules() if name.endswith(".lora_A")}
    assert len(adapted) == 16 * 2 * 4  # transformer blocks, self and cross attention, four layers each
    assert all(("lora_" in name) == p.requires_grad for name, p in unet.named_parameters())
    with torch.no_grad():
        conditioning = {"prompt_embeds": torch.empty(2, 77, 768, device="meta")}
        halves = stable.predict_halves(
            torch.empty(2, 4, 64, 96, device="meta"), torch.ones(2, device="meta"), conditioning
        )
    assert halves.conditional.shape == halves.unconditional.shape == (2, 4, 64, 96)


def test_lora_of_the_published_run_is_what_is_trained(policy: Any, family: Family) -> None:
    """DDPO and DanceGRPO adapt the attention's four projections."""
    names = {name for name, p in family.policy(*LORA).module.named_parameters() if p.requires_grad}
    assert names and all("attn" in name and ".to_" in name for name in names)


def test_the_safety_checker_is_never_loaded(family: Family, tmp_path: Path) -> None:
    """The published folder has one, with a gigabyte of weights that no policy needs."""
    folder = Path(shutil.copytree(family.folder, tmp_path / "pipeline"))
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    index.write_text(json.dumps(parts))
    for name in ("safety_checker", "feature_extractor"):
        (folder / name).mkdir()  # empty: loading it would fail
    policy = Family("sd", folder).policy()
    assert policy.encode(PROMPTS[:1])["prompt_embeds"].device == CPU
