"""Which heads of multi-head attention matter, and removing those that do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.utils import parametrize

from dlkern.nn.modules.attention import PrunedMultiheadAttention

__all__ = ["head_importance", "prune_heads"]

Modules = dict[str, torch.nn.MultiheadAttention]


def _by_head(module: torch.nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """[*, all heads' width] as [n, heads, head's width]."""
    return x.detach().double().reshape(-1, module.num_heads, module.head_dim)


def head_importance(
    model: torch.nn.Module, loss: Callable[[Any], torch.Tensor], batches: Iterable[Any], method: str = "gradient_norm"
) -> dict[str, torch.Tensor]:
    """A score for each head of each torch.nn.MultiheadAttention in a model (dlkern's included): larger matters more.

    Args:
        model: what the loss runs; its mode and gradients are left as they are. Evaluation mode gives the same scores again.
        loss: function of a batch that runs the model and returns a number.
        batches: what to measure on.
        method: with h the head's output before the output projection:
            "variance": how much h varies over batch and positions, the mean over its elements. 0: the head is a constant.
            "gradient_norm": the 2-norm of ∂loss/∂h, the mean over batches; how sharply the loss reacts to the head (cf.
            Michel et al. 2019, "Are sixteen heads really better than one?", equation 2, which multiplies it by h).
            "ablation": the mean loss with h set to 0 minus that of the whole model (ibid., section 3.2); one run of the
            batches a head. May be negative.

    Returns:
        float64 [heads] by the module's name, on the CPU. Modules that the loss never calls have zeros.

    Raises:
        ValueError: another method, no batches, or no such modules.
    """
    methods = {"variance": _variance, "gradient_norm": _gradient_norm, "ablation": _ablation}
    if method not in methods:
        raise ValueError(f"head_importance: expected method to be one of {tuple(methods)}, got {method!r}")
    modules: Modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.MultiheadAttention)}
    data = list(batches)
    if not modules or not data:
        raise ValueError(f"head_importance: {len(modules)} modules of multi-head attention, {len(data)} batches")
    return methods[method](modules, loss, data)


def _variance(modules: Modules, loss: Callable[[Any], torch.Tensor], batches: list[Any]) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    inside = False

    def watch(name: str, module: torch.nn.MultiheadAttention) -> Any:
        unit = torch.eye(module.num_heads * module.head_dim, dtype=module.out_proj.weight.dtype)
        unit = unit.to(module.out_proj.weight.device)

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal inside
            if inside:
                return
            inside = True
            try:  # again, with nothing behind the heads
                plain = {"out_proj.weight": unit}
                if module.out_proj.bias is not None:
                    plain["out_proj.bias"] = unit.new_zeros(len(unit))
                with torch.random.fork_rng():
                    found[name].append(_by_head(module, torch.func.functional_call(module, plain, args, kwargs)[0]))
            finally:
                inside = False

        return module.register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(name, module) for name, module in modules.items()]
    try:
        for batch in batches:  # with gradients on: without, torch's encoder layers call none of their modules
            with torch.enable_grad():
                loss(batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {
        n: torch.cat(parts).var(0, correction=0).mean(-1).cpu() if parts else torch.zeros(m.num_heads, dtype=torch.float64)
        for (n, m), parts in zip(modules.items(), found.values())
    }


def _gradient_norm(modules: Modules, loss: Callable[[Any], torch.Tensor], batches: list[Any]) -> dict[str, torch.Tensor]:
    total = {name: torch.zeros(m.num_heads, dtype=torch.float64) for name, m in modules.items()}
    for batch in batches:
        outputs: list[tuple[str, torch.Tensor]] = []
        hooks = [
            m.register_forward_hook(lambda _, args, y, name=name, into=outputs: into.append((name, y[0])))
            for name, m in modules.items()
        ]
        try:
            with torch.enable_grad():
                value = loss(batch)
        finally:
            for handle in hooks:
                handle.remove()
        reached = [(name, y) for name, y in outputs if y.requires_grad]
        gradients = torch.autograd.grad(value, [y for _, y in reached], allow_unused=True) if reached else ()
        squares = {name: torch.zeros_like(t) for name, t in total.items()}
        for (name, _), gradient in zip(reached, gradients):
            if gradient is not None:
                m = modules[name]
                behind = gradient.double() @ m.out_proj.weight.detach().double()  # with respect to the heads' outputs
                squares[name] += _by_head(m, behind).square().sum((0, 2)).cpu()
        for name, square in squares.items():
            total[name] += square.sqrt()
    return {name: t / len(batches) for name, t in total.items()}


@torch.no_grad()
def _ablation(modules: Modules, loss: Callable[[Any], torch.Tensor], batches: list[Any]) -> dict[str, torch.Tensor]:
    def mean() -> float:
        return sum(float(loss(batch)) for batch in batches) / len(batches)

    whole, scores = mean(), {}
    for name, m in modules.items():
        weight, found = m.out_proj.weight, []
        kept = weight.detach().clone()
        for head in range(m.num_heads):
            try:
                weight[:, head * m.head_dim : (head + 1) * m.head_dim] = 0.0
                found.append(mean() - whole)
            finally:
                weight.copy_(kept)
        scores[name] = torch.tensor(found, dtype=torch.float64)
    return scores


def prune_heads(module: torch.nn.MultiheadAttention, heads: Iterable[int]) -> None:
    """Removes heads from a torch.nn.MultiheadAttention (dlkern's or torch's), in place: its weights become smaller.

    The output is what it was with those heads' outputs set to 0; inputs and outputs keep their widths. Masks of a shape with
    heads in it count those that are left. The parameters are new ones: make optimizers afterwards. The module becomes a
    PrunedMultiheadAttention, which may be pruned again. Michel et al. 2019, section 4.

    Args:
        module: whose heads to remove.
        heads: their numbers, 0 to num_heads - 1.

    Raises:
        TypeError: another module. IndexError: no such head. ValueError: no head would be left, or the module is parametrized.
    """
    if not isinstance(module, torch.nn.MultiheadAttention):
        raise TypeError(f"prune_heads: expected a torch.nn.MultiheadAttention, got {type(module).__name__}")
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        raise ValueError("prune_heads: the module is parametrized; remove that first")
    removed = set(heads)
    for head in removed:
        if not 0 <= head < module.num_heads:
            raise IndexError(f"prune_heads: there is no head {head} of {module.num_heads}")
    if not removed:
        return
    left = [head for head in range(module.num_heads) if head not in removed]
    if not left:
        raise ValueError(f"prune_heads: none of {module.num_heads} heads would be left")

    def smaller(holder: torch.nn.Module, name: str, dim: int, stacked: int = 1) -> None:
        """Keeps what belongs to heads in one dimension, where `stacked` projections lie one after another."""
        old = getattr(holder, name)
        if old is not None:
            parts = old.detach().unflatten(dim, (stacked, module.num_heads, module.head_dim))
            axis = dim % old.dim()
            kept = parts.index_select(axis + 1, torch.tensor(left, device=old.device)).flatten(axis, axis + 2)
            setattr(holder, name, torch.nn.Parameter(kept.contiguous(), requires_grad=old.requires_grad))

    smaller(module, "in_proj_weight", 0, 3)
    smaller(module, "in_proj_bias", 0, 3)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        smaller(module, name, 0)
    for name in ("bias_k", "bias_v"):
        smaller(module, name, 2)
    smaller(module.out_proj, "weight", 1)
    module.num_heads = len(left)
    module.out_proj.in_features = len(left) * module.head_dim
    # torch's encoder layers hand the weights of a module where this is True to an op that would take them for whole.
    module._qkv_same_embed_dim = False
    module.__class__ = PrunedMultiheadAttention
