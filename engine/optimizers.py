"""Which optimizer trains what: Muon the blocks' matrices, AdamW all else."""
import torch

from engine.hardware import multiplies_bf16


def optimizers(model, lr, muon_lr, matrices=None, pieces=(), momentum=None):
    """([AdamW, Muon], leaves): Muon for `matrices` (None: those of model.blocks) and AdamW for the
    rest; AdamW for all if muon_lr is 0. leaves: [(leaf, matrix, piece)], the pieces of matrices
    that Muon takes for matrices of their own, see train.fit. momentum: SGD instead of AdamW.
    """
    if not muon_lr:
        matrices = []
    elif matrices is None:
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    by_muon, in_pieces = {id(p) for p in matrices}, {id(p) for p, _ in pieces}
    rest = [p for p in model.parameters() if id(p) not in by_muon]
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    fused = rest[0].device.type in ("cuda", "cpu")
    made = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
            if momentum is None else torch.optim.SGD(rest, lr=lr, momentum=momentum, fused=fused)]
    leaves = [(torch.nn.Parameter(p.detach()[at]), p, at) for p, at in pieces if id(p) in by_muon]
    assert sum(leaf.numel() for leaf, *_ in leaves) == sum(
        p.numel() for p in matrices if id(p) in in_pieces)                 # each entry once
    if matrices:
        made.append(Muon([p for p in matrices if id(p) not in in_pieces]
                         + [leaf for leaf, *_ in leaves],
                         lr=muon_lr, momentum=0.9, weight_decay=0.0))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made, leaves


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), but matrices of one shape are orthogonalised together: a
    small matrix does not fill a machine, and each product has to be launched. In bfloat16 where
    that is faster, else in float32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in shapes.values():
                self.update(params, group)

    def update(self, params, group):
        """A step for matrices that have one shape, or its transpose."""
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)                       # Nesterov's
        wide = torch.stack([x if x.size(0) <= x.size(1) else x.T for x in ahead])
        for p, x in zip(params, orthogonalised(wide, group["ns_coefficients"], group["ns_steps"],
                                               group["eps"])):
            tall = p.size(0) > p.size(1)
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(x.T if tall else x, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)


def orthogonalised(X, coefficients, steps, eps):
    """(k, m, n) matrices, m <= n, with their singular values near 1, by steps of Newton and Schulz:
    X <- a X + (b A + c A^2) X, A = X X^T, where a, b, c are the coefficients."""
    a, b, c = coefficients
    X = X.bfloat16() if multiplies_bf16(X.device) else X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.float()
