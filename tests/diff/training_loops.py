"""A plain PyTorch training step, written without anything of ours, and the mistakes people make."""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class HandMadeAdamW(torch.optim.Optimizer):
    """AdamW line by line; `fault` is one of the known ways to get it wrong."""

    def __init__(self, groups, fault: str = ""):
        super().__init__(groups, SETTINGS)
        self.fault = fault

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            if self.fault == "betas swapped":
                beta1, beta2 = beta2, beta1
            rate = group["lr"] * (0.5 if self.fault == "rate of another step" else 1)
            for p in group["params"]:
                g, state = p.grad, self.state[p]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(p)}
                    state["exp_avg_sq"] = torch.zeros_like(p)
                if self.fault == "coupled decay":
                    g = g + group["weight_decay"] * p
                else:
                    p.mul_(1 - rate * group["weight_decay"])
                state["step"] += 1
                state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
                state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
                m, v = state["exp_avg"], state["exp_avg_sq"]
                if self.fault == "eps before the correction":
                    root = v.sqrt() + group["eps"]
                    late = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                    p -= rate * late * m / root
                    continue
                if self.fault != "no bias correction":
                    m, v = m / (1 - beta1 ** state["step"]), v / (1 - beta2 ** state["step"])
                inside = self.fault == "eps inside the root"
                p -= rate * (
                    m / (v + group["eps"]).sqrt() if inside else m / (v.sqrt() + group["eps"])
                )


def groups_of(model, fault: str = ""):
    """Matrices decay, everything with one axis does not."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    kept = SETTINGS["weight_decay"] if fault == "decay on norms" else 0.0
    return [{"params": matrices}, {"params": others, "weight_decay": kept}]


def loss_of(logits, targets, fault: str = ""):
    if fault == "labels shifted twice":
        logits, targets = logits[:, :-1], targets[:, 1:]
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    if fault == "mean over padding":
        return F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum") / len(wanted)
    return F.cross_entropy(flat, wanted, ignore_index=IGNORED)


def plain_step(forward, model, optimizer, inputs, targets, *, clip=0.5, fault=""):
    """One step of the loop of any tutorial, as a function for `record_step`."""

    def step():
        if fault != "gradient not zeroed":
            optimizer.zero_grad()
        loss = loss_of(forward(inputs), targets, fault)
        loss.backward()
        if clip and fault != "not clipped":
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if fault == "gradient divided":
            for p in model.parameters():
                p.grad /= 8
        optimizer.step()
        return loss

    return step


def accumulated_step(model, optimizer, inputs, targets, rows, *, fault="", clip=0.5):
    """A step that takes the batch in passes of `rows`, each loss a sum over the batch's targets."""
    count = (targets != IGNORED).sum()

    def step():
        optimizer.zero_grad()
        total = 0.0
        parts = list(zip(inputs.split(rows), targets.split(rows), strict=True))
        for x, y in parts:
            mean = loss_of(model(x), y)
            own = 1 / len(parts) if fault == "mean of means" else (y != IGNORED).sum() / count
            (mean * own).backward()
            total = total + (mean * own).detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return total

    return step
