import torch

from difftori.solver import Box, solve

target = torch.tensor([[0.5, 2.0], [-0.3, 0.1]], requires_grad=True)  # two problems of two variables


def cost(x):  # (B, n) -> (B): one number per problem
    return (x - target).square().sum(-1) + 0.5 * x[:, 0] ** 2 * x[:, 1] ** 2


solution = solve(cost, torch.zeros(2, 2), box=Box(-1.0, 1.0))
solution.x.sum().backward()

print("x        ", solution.x.tolist())
print("status   ", solution.status.tolist())
print("gradient ", target.grad.tolist())
