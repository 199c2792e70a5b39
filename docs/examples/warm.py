import torch

from difftori.solver import Box, solve

torch.manual_seed(0)
weights = torch.linspace(1.0, 30.0, 12).diag() + 0.5
target = 1.5 * torch.randn(32, 12)


def problem(goal):
    return lambda x: 0.5 * (((x - goal) @ weights) * (x - goal)).sum(-1)


box = Box(-1.0, 1.0)
cold = solve(problem(target), torch.zeros(32, 12), box=box, max_steps=200, history=True)
moved = target + 0.05 * torch.randn(32, 12)
again = solve(problem(moved), torch.zeros(32, 12), box=box, max_steps=200)
warm = solve(problem(moved), cold.x.detach(), box=box, max_steps=200)

print("steps, cold start:", again.steps.float().mean().item())
print("steps, warm start:", warm.steps.float().mean().item())
print(
    "history:", tuple(cold.history.x.shape), "costs of row 0:", [round(c, 3) for c in cold.history.cost[:5, 0].tolist()]
)
