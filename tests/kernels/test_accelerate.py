"""diffusers' transformers with the fused ops: same results, LoRA, checkpoints, gathered weights, and undone again."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from block_cases import normal
from pcpo_kernels import accelerate, restore
from pcpo_kernels.attention_processors import FluxProcessor, JointProcessor
from tiny_pipelines import TRANSFORMER
from torch import Tensor, nn


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=True,
    )


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(**TRANSFORMER)


MODELS = {"flux": (flux, 3), "flux2": (flux2, 3), "sd3": (sd3, 2)}
"""How each is built, and how many blocks it has."""


def randomized(build: Callable[[], nn.Module]) -> nn.Module:
    """Every weight away from its start: gates, shifts and the weights of norms too."""
    model = build()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            spread = 0.3 * normal(*parameter.shape, seed=100 + i).float()
            parameter.copy_(1 + spread if parameter.dim() == 1 and bool((parameter == 1).all()) else spread)
    return model


def call(model: nn.Module, name: str) -> Tensor:
    """The output for fixed inputs, in the dtype of the weights."""
    dtype = next(model.parameters()).dtype
    if name in ("flux", "flux2"):
        axes = 3 if name == "flux" else 4
        pooled = {"pooled_projections": normal(2, 6, seed=3).to(dtype)} if name == "flux" else {}
        return model(
            hidden_states=normal(2, 6, 4, seed=1).to(dtype),
            encoder_hidden_states=normal(2, 3, 12, seed=2).to(dtype),
            timestep=torch.tensor([0.3, 0.8]).to(dtype),
            guidance=torch.tensor([3.5, 1.0]).to(dtype),
            img_ids=torch.arange(6)[:, None].expand(6, axes).float(),
            txt_ids=torch.zeros(3, axes),
            **pooled,
        ).sample
    return model(
        hidden_states=normal(2, 4, 6, 4, seed=1).to(dtype),
        encoder_hidden_states=normal(2, 3, 32, seed=2).to(dtype),
        pooled_projections=normal(2, 24, seed=3).to(dtype),
        timestep=torch.tensor([300.0, 800.0]).to(dtype),
    ).sample


def results(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Output, and the gradient of every weight that wants one."""
    model.zero_grad()
    output = call(model, name)
    (output.double() * normal(*output.shape, seed=9)).sum().backward()
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"output": output.detach()}


@pytest.fixture(scope="module", params=MODELS)
def original(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, randomized(MODELS[request.param][0])


@pytest.fixture
def model(original: tuple[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    yield original[0], copy.deepcopy(original[1])


def relative_errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == exact.keys()
    return {
        name: ((got[name].double() - exact[name].double()).norm() / exact[name].double().norm().clamp_min(1e-30)).item()
        for name in got
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_original(model, dtype) -> None:
    """Against float64: no output or gradient is further off than twice what the original is, and a rounding."""
    name, module = model
    module = module.to(dtype)
    exact = results(copy.deepcopy(module).double(), name)
    own = relative_errors(results(module, name), exact)
    assert accelerate(module) == MODELS[name][1]
    ours = relative_errors(results(module, name), exact)
    worst = {n: (ours[n], own[n]) for n in ours if ours[n] > 2 * own[n] + 4 * torch.finfo(dtype).eps}
    assert worst == {}
    assert ours["output"] > 0


def test_same_function_in_float64(model) -> None:
    """diffusers turns heads (FLUX) and takes their mean square (SD3) in float32 whatever they are; the rest agrees."""
    name, module = model
    expected = results(module.double(), name)
    accelerate(module)
    errors = relative_errors(results(module, name), expected)
    assert max(errors.values()) < 2e-6, errors


def test_restored_completely(model) -> None:
    name, module = model
    before = {n: (dict(vars(m)), type(m)) for n, m in module.named_modules()}
    expected = results(module, name)
    count = accelerate(module)
    blocks = [m for m in module.modules() if type(m).__name__.endswith("TransformerBlock")]
    assert count == len(blocks)
    processors = [m.processor for m in module.modules() if hasattr(m, "processor")]
    assert all(isinstance(processor, FluxProcessor | JointProcessor) for processor in processors)
    changed = {n: m.forward for n, m in module.named_modules() if "forward" in vars(m)}
    assert accelerate(module) == count
    assert {n: m.forward for n, m in module.named_modules() if "forward" in vars(m)} == changed
    assert [m.processor for m in module.modules() if hasattr(m, "processor")] == processors
    assert restore(module) == count
    assert restore(module) == 0
    for n, m in module.named_modules():
        attributes, kind = before[n]
        assert type(m) is kind
        assert vars(m).keys() == attributes.keys()
        assert vars(m).get("processor") is attributes.get("processor")
    again = results(module, name)
    assert all(torch.equal(again[n], expected[n]) for n in expected)


def test_copies_are_accelerated_on_their_own(model) -> None:
    name, module = model
    accelerate(module)
    with torch.no_grad():
        expected = call(module, name)
        other = copy.deepcopy(module)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(call(other, name), torch.zeros_like(expected))
    assert restore(other) > 0
    assert restore(module) > 0


def test_gradient_checkpointing(model) -> None:
    name, module = model
    accelerate(module)
    expected = results(module, name)
    module.enable_gradient_checkpointing()
    module.train()
    got = results(module, name)
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_with_lora(model) -> None:
    """peft puts its layers into the blocks before or after; only they get gradients."""
    from peft import LoraConfig

    name, module = model
    module.requires_grad_(False)
    targets = ["to_q", "to_k", "to_out.0", "to_qkv_mlp_proj", "linear_in"]
    module.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    expected = results(module, name)
    assert expected.keys() - {"output"} == {n for n, _ in module.named_parameters() if "lora_" in n}
    accelerate(module)
    errors = relative_errors(results(module, name), expected)
    assert max(errors.values()) < 1e-4, errors


def test_blocks_of_flux2_compile_into_one_graph_each() -> None:
    model = randomized(flux2)
    accelerate(model)
    expected = results(model, "flux2")
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    errors = relative_errors(results(model, "flux2"), expected)
    torch._dynamo.reset()
    assert max(errors.values()) < 1e-5, errors


def test_modulation_of_flux2_that_is_not_one_row_per_image() -> None:
    """One per token, as with reference images, or one for all images: diffusers' own forward, bit for bit."""
    model = randomized(flux2)
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    image, text = normal(2, 6, 16, seed=1).float(), normal(2, 3, 16, seed=2).float()

    def outputs(*shape: int) -> list[Tensor]:
        rows = normal(*shape, 96, seed=3).float()
        both = double(image, text, rows, rows[..., :1, :].expand(*shape[:-1], 3, 96) if len(shape) > 1 else rows)
        return [*both, single(image, None, rows[..., :48]), *single(image, text, rows[..., :1, :48], None, None, True)]

    shapes = [(2, 6), (1, 1), (1,)]
    with torch.no_grad():
        expected = [value for shape in shapes for value in outputs(*shape)]
        accelerate(model)
        found = [value for shape in shapes for value in outputs(*shape)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_weights_gathered_for_a_call(model) -> None:
    """As under ZeRO-3: every weight is there only while its own module, or one below, is called."""
    name, module = model
    with torch.no_grad():
        accelerate(module)
        expected = call(module, name)
        full: dict[nn.Parameter, Tensor] = {}

        def gather(owner: nn.Module, *_: object) -> None:
            for parameter in owner.parameters(recurse=False):
                parameter.data = full[parameter]

        def release(owner: nn.Module, *_: object) -> None:
            for parameter in owner.parameters(recurse=False):
                parameter.data = torch.empty(0)

        for owner in module.modules():
            if list(owner.parameters(recurse=False)):
                full |= {parameter: parameter.data for parameter in owner.parameters(recurse=False)}
                owner.register_forward_pre_hook(gather)
                owner.register_forward_hook(release)
        for owner in module.modules():
            if "LayerNorm" in type(owner).__name__ or type(owner).__name__ in ("Linear", "RMSNorm"):
                release(owner)
        assert torch.equal(call(module, name), expected)


def test_half_precision_is_clipped_as_before() -> None:
    model = randomized(flux).to(torch.float16)
    accelerate(model)
    block = model.single_transformer_blocks[0]
    with torch.no_grad():
        block.proj_out.bias.fill_(60000.0)
        text, image = block(
            normal(1, 4, 16).half(), normal(1, 2, 16).half(), 100 * torch.ones(1, 16, dtype=torch.float16), None
        )
    largest = torch.cat((text, image), dim=1).abs().max().item()
    assert largest == 65504.0


def test_half_precision_of_flux2_is_clipped_as_before() -> None:
    block = randomized(flux2).to(torch.float16).single_transformer_blocks[0]
    tokens = 65000 * normal(1, 6, 16).sign().half()
    rows = torch.cat((torch.zeros(1, 32), torch.full((1, 16), 3000.0)), dim=1).half()  # of the gate alone
    with torch.no_grad():
        expected = block(tokens, None, rows).abs().max().item()
        accelerate(block)
        assert block(tokens, None, rows).abs().max().item() == expected == 65504.0


def test_attention_of_others_is_left_alone(original) -> None:
    """A processor that is not the model's own stays, with its norms; blocks around it are accelerated."""
    name, module = original[0], copy.deepcopy(original[1])

    class Foreign:
        def __init__(self, inner: object) -> None:
            self.inner = inner

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
            rest = () if image_rotary_emb is None else (image_rotary_emb,)
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *rest)

    expected = results(module, name)
    block = next(m for m in module.modules() if type(m).__name__.endswith("TransformerBlock"))
    foreign = block.attn.processor = Foreign(block.attn.processor)
    accelerate(module)
    assert block.attn.processor is foreign
    assert "forward" not in vars(block.attn.norm_q)
    assert "forward" in vars(block)
    assert max(relative_errors(results(module, name), expected).values()) < 1e-4


def test_attention_backend_set_by_name_goes_with_it() -> None:
    model = flux()
    accelerate(model)
    model.set_attention_backend("native")
    chosen = model.transformer_blocks[0].attn.processor._attention_backend
    assert chosen is not None
    restore(model)
    assert model.transformer_blocks[0].attn.processor._attention_backend == chosen


def test_what_cannot_be_accelerated() -> None:
    with pytest.raises(ValueError, match="Linear has no block that can be accelerated; supported: FluxTrans"):
        accelerate(nn.Linear(2, 2))
    model = flux()
    block = model.transformer_blocks[0]
    block.forward = lambda *_: None
    with pytest.raises(ValueError, match="another library has replaced the forward of a FluxTransformerBlock"):
        accelerate(model)
    assert "forward" not in vars(model.single_transformer_blocks[0])
    assert "forward" in vars(block)
    model = flux2()
    model.single_transformer_blocks[1].norm = nn.LayerNorm(16)
    with pytest.raises(
        ValueError, match="a Flux2SingleTransformerBlock can only be accelerated if its layer norms have"
    ):
        accelerate(model)
    assert not any("forward" in vars(module) for module in model.modules())
