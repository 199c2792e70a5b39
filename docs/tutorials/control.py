# %% [markdown]
# # A controller for a cart-pole with an obstacle and learned parameters
#
# You know model predictive control (MPC). You have a model, a cost, bounds and an obstacle. Some parameters of the model are wrong.
# On this page you plan a motion, close the loop, see the obstacle hit, learn the parameters **through the controller**, and close the
# loop again. It needs no reinforcement learning and no training data apart from a short log.
#
# The idea in one formula: the controller's action is the solution of an optimisation problem with parameters θ.
#
# ```math
# a^\ast(s, \theta) = \arg\min_a \; J(a, s, \theta) \qquad \mathrm{subject\ to} \quad \mathrm{low} \leq a \leq \mathrm{high}, \quad g(a, s, \theta) \leq 0
# ```
#
# The library solves it for a batch of states s and also returns the derivative of the solution with respect to θ.

# %% [markdown]
# ## The solver in ten lines
#
# Find the point of the unit disc that is nearest to a target. Costs map `(B, n)` to `(B,)`: B independent problems of n variables.

# %%
import torch

from difftori.solver import Status, solve

target = torch.tensor([[0.6, 1.8]], dtype=torch.float64, requires_grad=True)
solution = solve(
    lambda x: (x - target).square().sum(-1),
    torch.zeros(1, 2, dtype=torch.float64),
    inequality=lambda x: x.square().sum(-1, keepdim=True) - 1,  # must be at most 0
)
print("x        ", solution.x.tolist(), Status(solution.status.item()).name)
print("gradient ", torch.autograd.grad(solution.x[0, 0], target)[0].tolist())
print("by hand  ", (target / target.norm()).tolist(), [0.9 / target.norm().item(), -0.3 / target.norm().item()])

# %% [markdown]
# `solve` found the nearest point and its exact derivative with respect to the target. A trajectory is the same problem with more variables.
#
# ## The model
#
# A cart of 1 kg carries a uniform pole of 1 m. The state is (position of the cart, angle of the pole, and their rates); angle 0 is upright.
# The model is a plain function of tensors. The last axis is the state, all others are batch axes. The mass of the pole and the viscous
# friction of the cart are arguments: they can be numbers, tensors that require a gradient, or one value for each row of the batch.

# %%
import difftori
from difftori.solver import AugmentedLagrangian, Box, Detached, Newton

F64 = torch.float64
DT, LENGTH, GOAL, LIMIT = 0.05, 1.0, 2.0, 25.0  # s, m, m, N


def cartpole(mass, friction):  # kg, N s/m
    def step(s, a):
        x, angle, speed, spin = s.unbind(-1)
        sin, cos, total, half = torch.sin(angle), torch.cos(angle), 1.0 + mass, LENGTH / 2
        push = (a[..., 0] - friction * speed + mass * half * spin**2 * sin) / total
        turn = (9.81 * sin - cos * push) / (half * (4 / 3 - mass * cos**2 / total))
        speed = speed + DT * (push - mass * half * turn * cos / total)
        spin = spin + DT * turn
        return torch.stack((x + DT * speed, angle + DT * spin, speed, spin), -1)

    return step


# %% [markdown]
# ## The task
#
# Drive from x = 0 m to x = 2 m and balance there, with at most 25 N. The reward is minus the stage cost.


# %%
def reward(s, a):  # (B, 4), (B, 1) -> (B,)
    x, angle, speed, spin = s.unbind(-1)
    cost = (x - GOAL) ** 2 + 2 * angle**2 + 0.1 * speed**2 + 0.1 * spin**2 + 0.01 * a[..., 0] ** 2
    return -DT * cost


def terminal_value(s):
    x, angle, speed, spin = s.unbind(-1)
    return -(4 * (x - GOAL) ** 2 + 20 * angle**2 + 2 * speed**2 + 2 * spin**2)


# %% [markdown]
# A bar of radius 0.15 m crosses the way, too low for the upright pole. Four points of the upper part of the pole must stay outside. Each is one
# column of the constraint, in metres, and must be at most 0. `margin` is an extra clearance.

# %%
BAR, RADIUS = torch.tensor([1.0, 1.1], dtype=F64), 0.15
SHARE = torch.tensor([0.4, 0.6, 0.8, 1.0], dtype=F64)  # of the pole's length; 1 is the tip


def distance(s):  # (…, 4) -> (…, 4): from the surface of the bar to each point
    x, angle = s[..., :1], s[..., 1:2]
    points = torch.stack((x + LENGTH * SHARE * torch.sin(angle), LENGTH * SHARE * torch.cos(angle)), -1)
    return (points - BAR).norm(dim=-1) - RADIUS


def obstacle(margin):
    return lambda s, a=None: margin - distance(s)  # for steps (s, a) and for the last state (s)


# %% [markdown]
# ## A plan
#
# We do not know the parameters and guess: a pole of 0.15 kg, no friction. First plan without the bar, then with it, from there.
# An obstacle has two sides, and a solver finds the optimum on the side where it starts.

# %%
H = 30  # steps of 0.05 s


def limits(margin):
    return dict(low=-LIMIT, high=LIMIT, constraint=obstacle(margin), terminal_constraint=obstacle(margin))


def without_bar(mass, friction, start):
    small = torch.full((len(start), H, 1), 0.01, dtype=F64)
    return difftori.plan(
        cartpole(mass, friction), reward, terminal_value, start, small, -LIMIT, LIMIT, adjoint=Detached()
    )


guess = torch.tensor([0.15, 0.0, 0.0], dtype=F64, requires_grad=True)  # mass, friction, margin
mass, friction, margin = guess
start = torch.zeros(1, 4, dtype=F64)
free = without_bar(mass, friction, start)
plan = difftori.plan(cartpole(mass, friction), reward, terminal_value, start, free.actions, **limits(margin))
for name, found in (("without bar", free), ("with bar", plan)):
    status, clearance = Status(found.solution.status.item()).name, distance(found.states).amin().item()
    print(f"{name:11s} {status}  cost {-found.value.item():.3f}  clearance {clearance:.4f} m")
print(f"violation {plan.solution.violation.item():.0e} m, gradient valid {plan.solution.gradient_valid.item()}")

# %% [markdown]
# - `status`: `CONVERGED` is a local optimum within the tolerance. `MAX_STEPS` is the best plan found so far. `INFEASIBLE` means that the
#   bar could not be avoided from this guess.
# - `violation` is the largest constraint value above 0, in metres, because the constraint is in metres.
# - `gradient_valid` says whether the derivative of the plan can be trusted: the optimum is strict.
# - The clearance is 0: the bar is in the way, and the optimal plan touches it. The constraint holds at the steps, every 0.05 s.
#
# The derivative answers a question before any experiment: how do the parameters change the force at a given time?

# %%
for step in (2, 8, 14):
    (slope,) = torch.autograd.grad(plan.actions[0, step, 0], guess, retain_graph=True)
    values = ", ".join(f"{value:.2f}" for value in slope.tolist())
    print(f"t = {DT * step:.1f} s: d(force)/d(mass, friction, margin) = {values} N per kg, N s/m, m")

# %%
import matplotlib.pyplot as plt


def draw(axis, states, colour, label=None):
    axis.add_patch(plt.Circle(BAR.tolist(), RADIUS, color="0.75" if distance(states).min() > -1e-4 else "tab:red"))
    axis.axhline(0, color="0.8", linewidth=1)
    for number, (x, angle) in enumerate(states[:, :2].tolist()):
        tip = x + LENGTH * torch.tensor(angle).sin().item(), LENGTH * torch.tensor(angle).cos().item()
        axis.plot((x, tip[0]), (0, tip[1]), color=colour, alpha=0.6, linewidth=2, label=label if number == 0 else None)
        axis.plot(x, 0, "s", color="0.3", markersize=6)
    axis.set(xlim=(-0.8, 3.2), ylim=(-0.3, 1.4), aspect="equal")


figure, axis = plt.subplots(figsize=(7, 3), layout="constrained", dpi=80)
draw(axis, plan.states[0, ::2].detach(), "tab:blue")
axis.set(xlabel="x [m]", ylabel="height [m]", title="The plan, one pole every 0.1 s")
plt.show()

# %% [markdown]
# The cart first moves back, so that the pole falls forward. Then it accelerates and overtakes the tip: the pole passes under the bar leaning back.
#
# ## The closed loop
#
# The true system has a pole of 0.3 kg and friction of 1.5 N s/m, and small random disturbances. `difftori.Controller` measures the state, plans
# with a warm start, and applies the first force. Eight starts run as one batch.

# %%
TRUE = (0.3, 1.5)
plant = cartpole(*TRUE)
draws = torch.Generator().manual_seed(0)
starts = torch.zeros(8, 4, dtype=F64)
starts[:, :2] = torch.tensor([0.2, 0.05]) * (2 * torch.rand(8, 2, generator=draws, dtype=F64) - 1)
NOISE = torch.tensor([1e-4, 1e-3, 1e-3, 1e-3], dtype=F64)


def closed_loop(parameters, starts, steps=50, **settings):
    mass, friction, margin = parameters
    controller = difftori.Controller(
        cartpole(mass, friction),
        reward,
        terminal_value,
        horizon=H,
        action_dim=1,
        init_actions=without_bar(mass, friction, starts).actions,  # the first guess of each row
        **limits(margin),
        **settings,
    )
    noise = torch.Generator().manual_seed(1)
    state, states, forces = starts, [starts], []
    for _ in range(steps):
        forces.append(controller(state))
        state = plant(state, forces[-1]) + NOISE * torch.randn(len(starts), 4, generator=noise, dtype=F64)
        states.append(state)
    return torch.stack(states, 1), torch.stack(forces, 1)


# %% [markdown]
# The clearance is measured on the true system. A run succeeds if no point touches the bar and it ends balanced within 0.3 m of the goal.


# %%
def score(name, states, forces):
    clearance = distance(states).amin((1, 2))
    cost = -reward(states[:, :-1], forces).sum(1)
    end = states[:, -1]
    success = (clearance > 0) & ((end[:, 0] - GOAL).abs() < 0.3) & (end[:, 1].abs() < 0.2)
    print(
        f"{name:8s} clearance: least {1e3 * clearance.min():6.1f} mm, median {1e3 * clearance.median():6.1f} mm"
        f"   median cost {cost.median():6.2f}   success {int(success.sum())} of {len(success)}"
    )
    return clearance


before = closed_loop(guess.detach(), starts, max_steps=4)
clearance_before = score("guess", *before)

# %% [markdown]
# The model promises a clearance of 0 or more at every step. The true system does not keep the promise: the pole hits the bar in all eight runs,
# by some millimetres. Replanning at every step corrects much of the wrong model, but not all.
#
# ## The log of an operator
#
# Someone who knows the system well has operated it and kept a margin of 0.03 m. Here a controller with the true parameters plays this part. We have
# four logs of states and forces, from other starts. The parameters and the margin of the operator are unknown to us.

# %%
OPERATOR = (*TRUE, 0.03)
precise = {"max_steps": 20, "tolerance": 1e-8, "augmented": AugmentedLagrangian(tolerance=1e-8)}
others = torch.tensor([[-0.2, 0.05, 0, 0], [-0.1, -0.05, 0, 0], [0.0, 0.02, 0, 0], [0.1, 0.0, 0, 0]], dtype=F64)
log_states, log_forces = closed_loop(OPERATOR, others, **precise)
score("operator", log_states, log_forces)
# %% [markdown]
# ## Learn the parameters through the plan
#
# For each measured state, plan with the present parameters. The first planned force should be the operator's. Each plan starts from what the
# operator did next, which selects the same side of the bar.

# %%
times = range(6, 17, 2)  # from t = 0.3 s to t = 0.8 s; the bar is passed at about t = 0.85 s
measured = torch.cat([log_states[:, t] for t in times])
future = torch.cat([log_forces[:, t : t + H] for t in times])


def plans(parameters, init_actions, multipliers=None):
    mass, friction, margin = parameters
    return difftori.plan(
        cartpole(mass, friction),
        reward,
        terminal_value,
        measured,
        init_actions,
        multipliers=multipliers,
        **precise,
        **limits(margin),
    )


def usable(plan):
    away = (plan.actions.detach() - future).abs().mean((1, 2))  # large where the plan passes the bar in another way
    valid = plan.solution.gradient_valid & (plan.solution.violation <= 1e-6)
    return valid & (away <= 3 * away[valid].median())


# %% [markdown]
# The samples are taken just before the bar, where the force says most about the parameters. Gauss-Newton uses the errors and their derivatives J, one row for each plan. Rows whose plan is infeasible, whose gradient is not valid, or
# whose plan is far from the log are left out.

# %%
learned = guess.detach().clone()
largest = torch.tensor([0.1, 1.0, 0.02], dtype=F64)  # the largest change in one iteration
for iteration in range(8):
    learned.requires_grad_()
    plan = plans(learned, future)
    used = usable(plan)
    error = (plan.actions[:, 0, 0] - future[:, 0, 0])[used]
    (J,) = torch.autograd.grad(error, learned, torch.eye(len(error), dtype=F64), is_grads_batched=True)
    change = torch.linalg.lstsq(J, error.detach()[:, None]).solution[:, 0]
    print(
        f"{iteration}  mass {learned[0]:.4f} kg  friction {learned[1]:.4f} N s/m  margin {learned[2]:.4f} m"
        f"  median error {error.abs().median():.0e} N  rows {len(error)} of {len(used)}"
    )
    if (change.abs() < 1e-3).all():
        break
    learned = (learned.detach() - change.maximum(-largest).minimum(largest)).clamp_min(0.01)
learned = learned.detach()
print("true", OPERATOR, " learned", [round(value, 4) for value in learned.tolist()])

# %% [markdown]
# ## Check the gradient
#
# Compare J, of the last iteration, with central differences: solve again with each parameter moved a little. The plans and the
# multipliers of the last iteration are the warm start, so that the solver stays at the same local optimum.

# %%
step = 1e-4
for column, name in enumerate(("mass", "friction", "margin")):
    move = step * torch.eye(3, dtype=F64)[column]
    with torch.no_grad():
        above, below = (
            plans(learned + sign * move, plan.actions.detach(), plan.solution.multipliers) for sign in (1, -1)
        )
    difference = ((above.actions - below.actions)[:, 0, 0] / (2 * step))[used]
    wrong = (J[:, column] - difference).abs() / difference.abs()
    print(
        f"{name:9s} relative error: median {wrong.median():.0e}; below 1 % in {int((wrong < 0.01).sum())} of {len(wrong)} rows"
    )

# %% [markdown]
# ## Is this needed? Compare least squares
#
# The log contains consecutive states. So the mass and the friction also follow from one-step prediction errors, without a controller. This is
# simpler: do it first if you can.

# %%
s, a, following = log_states[:, :-1].flatten(0, 1), log_forces.flatten(0, 1), log_states[:, 1:].flatten(0, 1)


def prediction_error(p):  # (B, 2) -> (B,)
    return ((cartpole(p[:, :1], p[:, 1:])(s[None], a[None]) - following) / NOISE).square().mean((1, 2))


fit = solve(prediction_error, guess.detach()[None, :2], solver=Newton(), box=Box(0.0, 5.0), max_steps=50)
print("mass, friction", [round(value, 4) for value in fit.x[0].tolist()], Status(fit.status.item()).name)

# %% [markdown]
# Least squares cannot find the margin, because the margin is not part of the dynamics. It is part of the decision. Learning through the plan
# finds everything that the decision depends on: dynamics, weights of the cost, margins. It needs the forces and the measured states only.
#
# ## The closed loop again
#
# Is it the model or the margin that helps? The middle line has the guessed model and the operator's margin.

# %%
between = closed_loop((0.15, 0.0, 0.03), starts, max_steps=4)
after = closed_loop(learned, starts, max_steps=4)
score("guess", *before)
clearance_between = score("margin", *between)
clearance_after = score("learned", *after)

# %%
t = DT * torch.arange(51)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", dpi=80)
for states, colour, name in ((before[0], "tab:red", "guess"), (after[0], "tab:blue", "learned")):
    axes[0].plot(t, 1e3 * distance(states).amin(2).T, color=colour, alpha=0.6)
    axes[1].plot(t, states[:, :, 0].T, color=colour, alpha=0.6)
    axes[0].plot([], [], color=colour, label=name)
axes[0].axhline(0, color="black", linewidth=1)
axes[0].set(xlabel="time [s]", ylabel="clearance [mm]", ylim=(-100, 400))
axes[0].legend()
axes[1].axhline(GOAL, color="black", linewidth=1, linestyle=":")
axes[1].set(xlabel="time [s]", ylabel="position of the cart [m]", ylim=(-1, 4))
plt.show()

# %% [markdown]
# Each line is one of the eight starts.
#
# - With the guess, every run touches the bar.
# - The margin alone avoids contact, but 7 to 9 mm of the 30 mm are lost, and one run does not end at the goal in time.
# - With the learned model the clearance is within about 1 mm of the margin, and all runs succeed. The median cost is above that of the guess,
#   because keeping clear costs something, and below that of the margin alone.
#
# These are eight starts and one seed of the noise: an illustration, not a statistic. The film shows the start with the least clearance before learning, in both loops, at half
# speed. A red bar means contact.

# %%
import io

import numpy as np
from IPython.display import Image
from PIL import Image as Picture

worst, frames = int(clearance_before.argmin()), []
for step in range(0, 51):
    figure, axes = plt.subplots(2, 1, figsize=(4.4, 4.0), layout="constrained", dpi=60)
    loops = ((before, "tab:red", "guess"), (after, "tab:blue", "learned"))
    for axis, ((states, _), colour, name) in zip(axes, loops, strict=True):
        draw(axis, states[worst, step : step + 1], colour)
        axis.set_title(f"{name}, {DT * step:.2f} s", fontsize=9)
    figure.canvas.draw()
    image = Picture.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    frames.append(image.convert("P", palette=Picture.Palette.ADAPTIVE, colors=32))
    plt.close(figure)
film = io.BytesIO()
frames[0].save(film, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
Image(film.getvalue(), format="gif")

# %% [markdown]
# ## What to change for your own problem
#
# - **Your system:** replace `cartpole` by a discrete-time function `(state (B, S), action (B, A)) -> (B, S)`. Integrate a continuous model
#   yourself. Index the last axis from the end, so that batch axes pass through.
# - **Your task:** `reward`, `terminal_value`, bounds. `constraint` has one column for each condition, at most 0, in a unit that means something.
# - **Your unknowns:** whatever you give `requires_grad` can be learned: masses, weights, margins, a small network inside the dynamics.
# - **If a plan is `INFEASIBLE`:** start from another `init_actions`, for example a plan without the obstacle.
# - **Between two steps** nothing is constrained. Use a margin, or a shorter step.
#
# More: [Control](../control.md) (tracking, LQR, identification, choosing a solver), [The solver](../solver.md) (statuses, constraints, gradients).
