import torch

from difftori.solver import Objective, solve

gain = torch.tensor(2.0, requires_grad=True)  # shared by all rows
data = torch.tensor([[0.5], [float("nan")], [-0.2]])


class Fit(Objective):
    def __init__(self, gain, data):
        self.gain, self.data = gain, data

    def cost(self, x):
        return (x - self.gain * self.data).square().sum(-1)

    def select(self, rows):
        return Fit(self.gain, self.data[rows])


whole = Fit(gain, data)
for name, objective in (("plain callable", whole.cost), ("with select   ", whole)):
    solution = solve(objective, torch.zeros(3, 1))
    (grad,) = torch.autograd.grad(solution.x.sum(), gain)
    print(name, "status", solution.status.tolist(), "d(sum x)/d(gain)", round(grad.item(), 4))
