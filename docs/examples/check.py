import torch

from difftori.solver import Box, Detached, Implicit, ProjectedGradient, Truncated, Unrolled, check_gradients

torch.manual_seed(0)
B, n = 8, 6
matrix = torch.randn(n, n, dtype=torch.float64)
curvature = (matrix @ matrix.T / n + 0.2 * torch.eye(n)).requires_grad_()
target = torch.randn(B, n, dtype=torch.float64, requires_grad=True)


def cost(x):
    d = x - target
    return 0.5 * ((d @ curvature) * d).sum(-1) + 0.1 * x.pow(4).sum(-1)


print("steps  adjoint        cosine  relative error")
for steps in (10, 60):
    for adjoint in (Implicit(), Implicit(linear="cg"), Unrolled(), Truncated(5), Detached()):
        check = check_gradients(
            cost,
            torch.zeros(B, n, dtype=torch.float64),
            solver=ProjectedGradient(),
            adjoint=adjoint,
            box=Box(-1.0, 1.0),
            max_steps=steps,
        )
        name = type(adjoint).__name__ + ("(cg)" if getattr(adjoint, "linear", "") == "cg" else "")
        print(f"{steps:5d}  {name:13s} {check.cosine:7.4f}  {check.relative_error:.1e}")
