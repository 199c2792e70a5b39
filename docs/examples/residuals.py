import torch

from difftori.solver import GaussNewton, LeastSquaresObjective, ProjectedGradient, solve


class Ranging(LeastSquaresObjective):
    """Where am I? Distances to four known beacons, one residual each."""

    def __init__(self, beacons, distances):
        self.beacons, self.distances = beacons, distances

    def residual(self, x):  # (B, 2) -> (B, 4)
        return torch.cdist(x, self.beacons) - self.distances

    def select(self, rows):
        return Ranging(self.beacons, self.distances[rows])


torch.manual_seed(0)
beacons = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]], dtype=torch.float64, requires_grad=True)
truth = 4 * torch.rand(64, 2, dtype=torch.float64)
distances = torch.cdist(truth, beacons.detach()) + 0.01 * torch.randn(64, 4, dtype=torch.float64)
start = torch.full_like(truth, 2.5)
for solver in (GaussNewton(), ProjectedGradient()):
    solution = solve(Ranging(beacons, distances), start, solver=solver)
    error = (solution.x - truth).norm(dim=-1).mean()
    (grad,) = torch.autograd.grad(error, beacons)
    print(type(solver).__name__, "steps", solution.steps.float().mean().item(), "mean error", round(error.item(), 4))
    print("  d(error)/d(beacon 0) =", [round(g, 4) for g in grad[0].tolist()])
