import torch

from difftori.solver import Box, ProjectedGradient, Status, solve

# Row 0 is a bowl, row 1 the same with NaN in its data, row 2 a saddle: it starts where the gradient is zero.
sign = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
shift = torch.tensor([[0.3, 0.2], [float("nan"), 0.0], [0.0, 0.0]], requires_grad=True)


def cost(x):
    return 0.5 * (sign * (x - shift).square()).sum(-1)


x0 = torch.zeros(3, 2)
solution = solve(cost, x0, box=Box(-1.0, 1.0))
for row in range(3):
    print(row, Status(int(solution.status[row])).name, solution.x[row].tolist(), bool(solution.gradient_valid[row]))

short = solve(cost, x0, solver=ProjectedGradient(first_step=0.1), box=Box(-1.0, 1.0), max_steps=1)
print("after one step:", [Status(int(s)).name for s in short.status], short.gradient_valid.tolist())
