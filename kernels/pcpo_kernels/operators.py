"""How the Triton ops are called: registered with ``torch.library`` for tracing, and without its dispatcher in eager."""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import torch
import triton
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from pcpo_kernels.dispatch import interpreting
from pcpo_kernels.launch import traced

_SEEN = not triton.knobs.language.default_fp_fusion
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype))


class Operator:
    """One op, ``pcpo_kernels::name``, which is functional: fresh outputs, inputs untouched.

    It is registered for GPUs, for the interpreter on CPUs, and for tracing, in two forms: opaque, and as
    ``name_kernels`` with its launches visible (``torch.library.triton_op``), which Inductor takes up into its own code.
    Inductor compiles a kernel that it sees with Triton's default for fused multiply-add, and ours only have the same
    bits everywhere without it: they are shown where ``TRITON_DEFAULT_FP_FUSION=0`` was set before they were imported.

    A call with plain tensors in eager mode
    goes past the dispatcher, whose autograd costs several times as much host time as the launches: through an
    ``autograd.Function`` around the same implementation where a gradient is wanted, and straight to it elsewhere.

    Args:
        name: of the operator.
        implementation: takes the parameters in order; its annotations make the schema. Of several results some may be
            None in eager mode; where the op is registered an empty tensor stands for each, since schemas know no other.
        fake: the same without computing anything.
        setup_context: keeps for the backward what it needs, as ``torch.library.register_autograd`` describes.
        backward: returns one gradient, or None, per parameter; without it the op has no derivative.
        takes: named tuples whose fields are the parameters that the implementation takes as ``*arguments``.
    """

    def __init__(
        self,
        name: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        *,
        takes: tuple[type, ...] = (),
    ) -> None:
        qualified = f"pcpo_kernels::{name}"
        complete = _without_none(implementation)
        prototype = traced(complete)
        prototype.__signature__ = _signature(implementation, takes)  # type: ignore[attr-defined]
        schema = torch.library.infer_schema(prototype, mutates_args=())
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, ("cuda", "cpu"), complete)
        torch.library.register_fake(qualified, _without_none(fake))
        names = [name]
        if not interpreting():
            torch.library.triton_op(f"{qualified}_kernels", prototype, mutates_args=())
            names.append(f"{name}_kernels")
        self.opaque, *visible = (getattr(torch.ops.pcpo_kernels, one).default for one in names)
        self.visible = visible[0] if visible else self.opaque
        self.implementation = implementation
        self.apply: Callable[..., Any] | None = None
        if setup_context is not None and backward is not None:
            for one in names:
                torch.library.register_autograd(f"pcpo_kernels::{one}", backward, setup_context=setup_context)
            # Past Function's own apply, which looks for torch.func in each argument; __call__ has done so.
            self.apply = super(Function, _function(name, implementation, setup_context, backward)).apply  # type: ignore[misc]

    def __call__(self, *arguments: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or not _PLAIN.issuperset(map(type, arguments))
            or is_in_torch_dispatch_mode()
            or torch._C._are_functorch_transforms_active()  # torch.func
        ):
            return self._dispatch(arguments)
        if self.apply is not None and torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return self.apply(*arguments)
        return self.implementation(*arguments)

    def _dispatch(self, arguments: tuple[Any, ...]) -> Any:
        registered = self.visible if _SEEN else self.opaque
        if self.apply is not None:
            return registered(*arguments)
        with torch.no_grad():  # an op without a derivative would warn
            return registered(*arguments)


def _signature(implementation: Callable[..., Any], takes: tuple[type, ...]) -> inspect.Signature:
    own = inspect.signature(implementation)
    listed = [one for one in own.parameters.values() if one.kind is not one.VAR_POSITIONAL]
    for fields in takes:
        for name, kind in get_type_hints(fields).items():
            listed.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind))
    results = own.return_annotation
    if get_origin(results) is tuple:
        results = tuple[(Tensor,) * len(get_args(results))]  # type: ignore[misc]
    return own.replace(parameters=listed, return_annotation=results)


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        results = function(*arguments)
        if not isinstance(results, tuple):
            return results
        return tuple(arguments[0].new_empty(0) if result is None else result for result in results)

    return run


def _function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> type[Function]:
    once = once_differentiable(backward)

    def run_forward(ctx: Any, *arguments: Any) -> Any:
        results = implementation(*arguments)
        setup_context(ctx, arguments, results)
        return results

    def run_backward(ctx: Any, *incoming: Any) -> Any:
        return once(ctx, *incoming) if torch.is_grad_enabled() else backward(ctx, *incoming)

    methods = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
    return type(name, (Function,), methods)
