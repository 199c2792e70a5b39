# %% [markdown]
# # Refine a policy from a LeRobot data set and serve it
#
# You have a robot, some demonstrations, and a policy that was trained on them and succeeds too rarely. On this page you refine that policy
# with DiffTORI, compare the result with the obvious alternatives, and then use it: in Python, as an ONNX file, over the network, and as a folder that you
# can share. A small simulated task stands for the robot. Everything runs on a CPU in a few minutes.
#
# ## The task
#
# A drone, seen from above, flies through two gates. Each gate is a gap of 16 cm in a wall, at its own y. An episode succeeds if both gates are passed without
# touching a wall. The task is an ordinary `gymnasium.Env` in a file; it uses nothing of this library. Two things matter for imitation:
# `info` reports `is_success`, and all randomness comes from `self.np_random`, so that a seed repeats an episode.

# %%
# %%writefile gates.py
import gymnasium
import numpy as np
from gymnasium.spaces import Box

WALLS, HALF, DT, STEPS = (-0.2, 0.6), 0.08, 0.1, 60  # x of the walls (m), half of a gap (m), s, steps


class Gates(gymnasium.Env):
    """Observation: position (m), velocity (m/s), y of both gaps (m). Action: thrust along x and y in ±1."""

    observation_space = Box(-np.inf, np.inf, (6,))
    action_space = Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.speed = self.np_random.uniform((-1.0, -0.5), (-0.9, 0.5)), np.zeros(2)
        self.gaps, self.steps = self.np_random.uniform(-0.5, 0.5, 2), 0
        return self.observe(), {"is_success": False}

    def step(self, action):
        self.speed = self.speed + DT * (4.0 * np.clip(action, -1, 1) - self.speed)
        before, self.place = self.place, self.place + DT * self.speed
        self.steps += 1
        crashed = np.abs(self.place).max() > 1.2
        for x, gap in zip(WALLS, self.gaps, strict=True):
            if before[0] < x <= self.place[0]:
                y = np.interp(x, (before[0], self.place[0]), (before[1], self.place[1]))
                crashed |= abs(y - gap) > HALF
        passed = bool(not crashed and self.place[0] > WALLS[1])
        over = bool(crashed or passed)
        return self.observe(), float(passed), over, self.steps >= STEPS, {"is_success": passed}

    def observe(self):
        return np.concatenate((self.place, self.speed, self.gaps)).astype(np.float32)


# %% [markdown]
# ## Demonstrations as a LeRobot data set
#
# A script flies the drone. Like a person's, its actions are noisy. Twenty flights are tried, and the successful ones are kept.

# %%
import numpy as np
from gates import WALLS, Gates

from difftori.data.formats import write_lerobot
from difftori.data.trajectories import Trajectories

rng, env = np.random.default_rng(0), Gates()


def expert(obs):
    x, y, speed_x, speed_y, first, second = obs
    ahead = first if x < WALLS[0] else second
    thrust = np.array([0.63 - 0.8 * speed_x, 4.0 * (ahead - y) - 1.8 * speed_y])
    return np.clip(thrust + rng.normal(0, 0.2, 2), -1, 1)


# %%
states, actions, ends = [], [], []
for seed in range(20):
    flight, (obs, info), over = [], env.reset(seed=seed), False
    while not over:
        flight.append((obs, expert(obs)))
        obs, reward, terminated, truncated, info = env.step(flight[-1][1])
        over = terminated or truncated
    if info["is_success"]:
        states += [state for state, _ in flight]
        actions += [action for _, action in flight]
        ends.append(len(actions))
demos = Trajectories.of({"state": np.array(states)}, np.array(actions), ends)
write_lerobot(demos, "demos/gates", fps=10, task="fly through both gates")

# %% [markdown]
# `ends` is the step after the last one of each episode. The result is a folder in the LeRobot v3 format. Your own LeRobot folder is used in the same way from
# here on. Look into it first:

# %%
# !difftori data demos/gates

# %% [markdown]
# `name` is what the policy will call the observation. Other keys and cameras are chosen with `--obs-keys`.
#
# ## The base policy
#
# Behaviour cloning (`bc`): a network that maps the last 2 observations to the next 16 actions, of which 8 are executed before it is asked again. It is small and
# trained for only 300 updates, so it is imperfect. After training it is evaluated in 300 episodes of the environment.

# %%
# !difftori train bc --demos demos/gates --env gates:Gates --updates 300 --hidden 64 64 --eval-episodes 300 --out runs/base --quiet

# %% [markdown]
# `success` is the success rate of the last weights, and `success_low` and `success_high` bound its 95 % interval (Wilson). Evaluation episodes have
# the seeds 100000, 100001, …, which no demonstration uses. They are the same for every policy, so results can be compared episode by episode.
#
# ## Refine it
#
# DiffTORI defines the policy by an optimisation problem. A network f scores an action sequence a in a state s, and the policy's action is where a few gradient
# steps on that score lead to, from the action of the base policy:
#
# ```math
# a_0 = \mathrm{base}(s), \quad a_{k+1} = a_k + \alpha \, \nabla_a f_\theta(s, a_k), \quad \mathrm{action} = a_5
# ```
#
# The loss compares that action with the demonstrated one. Its gradient passes through the five steps and trains f. The base policy stays as it is. Environment, data,
# seed and window are taken from the base's run.

# %%
# !difftori train difftori-il --base runs/base --updates 1000 --hidden 64 64 --latent-dim 32 --eval-episodes 300 --out runs/refined --quiet

# %% [markdown]
# ## Compare with the alternatives
#
# Is it the optimisation that helps, or would any further training do? Two controls have the same number of further updates: `residual` adds the output of a
# network to the base's actions, and `bc` is simply trained for 1300 updates from the start.

# %%
# !difftori train residual --base runs/base --updates 1000 --hidden 64 64 --eval-episodes 300 --out runs/residual --quiet
# !difftori train bc --demos demos/gates --env gates:Gates --updates 1300 --hidden 64 64 --eval-episodes 300 --out runs/longer --quiet
# !difftori report runs

# %% [markdown]
# `runs/report/report.html` is the whole comparison on one page, with intervals, paired differences, curves and the protocol. The same numbers are in CSV files
# next to it. Plot the success rates, and print the paired differences:

# %%
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt

names = {"base": "base", "refined": "DiffTORI", "residual": "residual", "longer": "bc, 1300 updates"}
plt.figure(figsize=(5, 2), dpi=80)
for row, run in enumerate(names):
    found = json.loads(Path("runs", run, "summary.json").read_text())
    rate, low, high = (found[f"last/{name}"] for name in ("success", "success_low", "success_high"))
    plt.errorbar(rate, row, xerr=[[rate - low], [high - rate]], fmt="o", capsize=4)
plt.yticks(range(4), names.values())
plt.ylim(3.5, -0.5)
plt.xlim(0, 1)
plt.xlabel("success rate, 300 episodes, 95 % interval")
plt.show()
for pair in csv.DictReader(Path("runs/report/pairs.csv").open()):
    difference, low, high = (float(pair[name]) for name in ("value", "low", "high"))
    print(f"{pair['method']} minus {pair['reference']}: {difference:+.2f} [{low:+.2f}, {high:+.2f}]")

# %% [markdown]
# Every kind of further training helps: the success rate rises from about 0.4 to about 0.7. DiffTORI is clearly above its base, but it does not
# win here. The residual is better by about 0.1, with an interval that excludes 0, and trains several times faster. More updates of `bc` alone gain as much as DiffTORI, so
# this base was mainly undertrained. On MetaWorld the order was another one: the same
# `residual` did not improve its base, DiffTORI did, and so did a residual that was trained with noise (`--base-noise`):
# [imitation studies](../imitation-studies.md). Which one suits your robot is a matter of measuring, with these four commands.
#
# We continue with the DiffTORI policy. Everything below works in the same way for `runs/residual`.
#
# ## Watch it
#
# `difftori.load` makes a policy of a run directory. It acts for any number of environments at once: here for the
# first six evaluation episodes.

# %%
import difftori


def fly(run, seeds):
    """Positions (T B 2) of the drones, their gaps (B 2) and the outcomes."""
    policy, envs = difftori.load(run), [Gates() for _ in seeds]
    obs = np.array([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    path, success, flying = [obs[:, :2].copy()], [False] * len(envs), [True] * len(envs)
    while any(flying):
        for row, action in enumerate(policy.act(obs)):
            if flying[row]:
                obs[row], _, terminated, truncated, info = envs[row].step(action)
                success[row], flying[row] = info["is_success"], not (terminated or truncated)
        path.append(obs[:, :2].copy())
    return np.array(path), obs[:, 4:], success


seeds = range(100000, 100006)
flights = {run: fly(f"runs/{run}", seeds) for run in ("base", "refined")}
for run, (_, _, success) in flights.items():
    print(f"{names[run]}: {sum(success)} of {len(seeds)}")

# %%
from IPython.display import Image
from matplotlib.animation import FuncAnimation, PillowWriter

figure, axes = plt.subplots(2, 6, figsize=(7.2, 2.7), dpi=80, layout="constrained")
marks = []
for axis, (run, row) in zip(axes.flat, [(run, row) for run in flights for row in range(6)], strict=True):
    path, gaps, success = flights[run]
    for x, gap in zip(WALLS, gaps[row], strict=True):
        axis.plot([x, x, np.nan, x, x], [-1.2, gap - 0.08, np.nan, gap + 0.08, 1.2], color="0.3")
    axis.set(xlim=(-1.1, 0.9), ylim=(-0.9, 0.9), xticks=[], yticks=[], aspect="equal")
    axis.set_title(names[run], fontsize=9, color="green" if success[row] else "red")
    marks.append((axis.plot([], [])[0], axis.plot([], [], "ko", ms=3)[0], path[:, row]))


def draw(step):
    for trail, drone, path in marks:
        trail.set_data(*path[: step + 1].T)
        drone.set_data(*path[[min(step, len(path) - 1)]].T)


film = FuncAnimation(figure, draw, frames=38)
film.save("film.gif", writer=PillowWriter(fps=10))
plt.close(figure)
Image("film.gif", format="gif")

# %% [markdown]
# Above the base policy, below DiffTORI, from the same six starts. A green title is a success.
#
# ## Use it on your robot
#
# Three lines are enough in your own loop. Observations are what the environment returns, and actions have its units. The history of observations and the rest of a
# predicted chunk are kept inside.

# %%
policy = difftori.load("runs/refined")
policy.reset()  # at the beginning of each episode
print(policy.act(env.reset(seed=100000)[0]))


def play(act):
    """Actions of one episode."""
    obs, over, chosen = env.reset(seed=100000)[0], False, []
    while not over:
        chosen.append(act(obs))
        obs, _, terminated, truncated, info = env.step(chosen[-1])
        over = terminated or truncated
    return np.array(chosen), info["is_success"]


policy.reset()
wanted, success = play(policy.act)
print(f"{len(wanted)} steps, success: {success}")

# %% [markdown]
# ### Without this package: ONNX
#
# `difftori export` writes base policy, networks and optimisation as one graph, and compares it with the original before it keeps the file.
# The times are those of one decision of 8 actions on one thread of a busy machine.

# %%
# !difftori export runs/refined --out refined.onnx --quiet

# %% [markdown]
# The file needs ONNX Runtime only. It takes the last two observations (rows, 2, 6) and returns the 8 actions to execute (rows, 8, 2).

# %%
import onnxruntime

session, last, chunk = onnxruntime.InferenceSession("refined.onnx"), [], []


def act_onnx(obs):
    last.append(obs)
    if not chunk:
        window = np.stack([last[max(len(last) - 2, 0)], last[-1]])
        chunk.extend(session.run(["actions"], {"state": window[None]})[0][0])
    return chunk.pop(0)


print("largest difference of an action:", np.abs(play(act_onnx)[0] - wanted).max())

# %% [markdown]
# ### Over the network
#
# The robot's program often runs in another process, without PyTorch. `difftori serve` answers it, in the protocol of openpi. `--port 0` chooses a free port; the first line
# of the output names it.

# %%
import subprocess

from difftori.serving import Client

server = subprocess.Popen(["difftori", "serve", "runs/refined", "--port", "0"], stdout=subprocess.PIPE, text=True)
line = server.stdout.readline()
print(line, end="")
with Client(line.split(" at ")[1].split(";")[0]) as remote:
    served, success = play(remote.act)
server.terminate()
print(server.communicate()[0])
print("equal actions:", np.array_equal(served, wanted))

# %% [markdown]
# ### Share it
#
# `difftori publish` writes a folder with the weights, a model card with the evaluation, and checksums, without your paths. A last evaluation with more episodes
# becomes part of the card. `--to hub:USER/NAME` publishes the same on the Hugging Face Hub.

# %%
# !difftori eval runs/refined --episodes 500 --quiet
# !difftori publish runs/refined --to published --license mit

# %%
published = difftori.load("published")
print("equal actions:", np.array_equal(play(published.act)[0], wanted))
print(*Path("published/README.md").read_text().split("\n# ")[1].splitlines()[:5], sep="\n")

# %% [markdown]
# Loading a published folder executes nothing that it contains.
#
# ## What to change for your own problem
#
# | your situation | change |
# |---|---|
# | a LeRobot, robomimic, ManiSkill or zarr data set | `--demos PATH`, and `--obs-keys` if the names differ: [your own demonstrations](../imitation.md#your-own-demonstrations) |
# | no simulator | leave `--env` out: the error of the actions on held-out episodes is reported, and success is measured on the robot |
# | your own simulator | `--env my_file:MyEnv`: [your own environment](../environments.md#your-own-environment) |
# | a base policy in your own code | `refine(my_function, demos, …)`: [refining a policy](../imitation.md#refining-a-policy) |
# | demonstrations that go several ways | `diffusion` as the base policy |
# | camera images | the same commands; use a GPU |
#
# Train longer than here, keep the two controls, and use several `--seed`s before you believe a difference: the intervals above are over episodes of one training
# each. More: [imitation learning](../imitation.md), [acting](../acting.md), [exporting](../export.md), [serving](../serving.md), [publishing](../publishing.md),
# [reports](../reports.md), and [the imitation studies](../imitation-studies.md) with results for and against the method.
