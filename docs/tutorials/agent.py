# %% [markdown]
# # Train an agent on your own Gymnasium task
#
# You write a task as an ordinary `gymnasium.Env`, train DiffTORI on it, compare it with TD-MPC over three seeds on one page, and act with the
# trained agent in your own loop. Everything runs on a CPU in a few minutes.
#
# ## The task
#
# A boat crosses a river and stops at a dock, in 40 steps of 0.25 s. The current is strongest in the middle; it is not in the observation, so the
# agent has to learn it from what happens. The file needs nothing of this library. Four things matter: spaces are `Box`es, actions have bounds, the time limit
# is `truncated` and not `terminated`, and all randomness comes from `self.np_random`, so that a seed repeats an episode.

# %%
# %%writefile river.py
import gymnasium
import numpy as np
from gymnasium.spaces import Box

DT, STEPS, DOCK = 0.25, 40, np.array([0.0, 5.5])  # s, steps, m; the banks are at y = 0 m and y = 6 m


def current(y, strongest):
    """Speed of the water in m/s, along x."""
    return strongest * np.clip(4 * (y / 6) * (1 - y / 6), 0, 1)


class River(gymnasium.Env):
    """Observation: position relative to the dock (m), velocity (m/s). Action: acceleration (m/s²) in ±1."""

    observation_space = Box(-np.inf, np.inf, (4,))
    action_space = Box(-1.0, 1.0, (2,))

    def __init__(self, strongest: float = 1.0):
        self.strongest = strongest

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.array([self.np_random.uniform(-3.0, 3.0), 0.5])
        self.velocity, self.steps = np.zeros(2), 0
        return self.observe(), {}

    def step(self, action):
        water = np.array([current(self.position[1], self.strongest), 0.0])
        self.velocity = self.velocity + DT * (action - 0.5 * (self.velocity - water))
        self.position = self.position + DT * self.velocity
        self.steps += 1
        reward = 1 - np.linalg.norm(self.position - DOCK) / 6  # 1 at the dock
        return self.observe(), float(reward), False, self.steps == STEPS, {}

    def observe(self):
        return np.concatenate((self.position - DOCK, self.velocity)).astype(np.float32)


# %% [markdown]
# Measure first what is bad and what is good. The return of an episode is its sum of rewards, at most 40. These are the mean returns of random
# actions and of a hand-written controller that steers to the dock and brakes, over 20 episodes:

# %%
import numpy as np
from river import DOCK, River, current


def returns(act, episodes=20):
    """The return of each episode, with the seeds 0, 1, …"""
    env, found = River(), []
    for seed in range(episodes):
        (obs, _), total, over = env.reset(seed=seed), 0.0, False
        while not over:
            obs, reward, _, over, _ = env.step(act(obs))
            total += reward
        found.append(total)
    return np.array(found)


random = np.random.default_rng(0)
by_chance = returns(lambda obs: random.uniform(-1, 1, 2)).mean()
by_hand = returns(lambda obs: np.clip(-2 * obs[:2] - 2 * obs[2:], -1, 1)).mean()
print(f"random actions {by_chance:.1f}, hand-written controller {by_hand:.1f}")

# %% [markdown]
# ## Train, interrupt, resume
#
# `--env river:River` means the class `River` in `river.py`. This task is small, so the other options make the run short:
#
# - `--preset small`: networks of width 64; `--horizon 3`: plan three actions ahead.
# - `--action-repeat 2`: each action is executed for two steps, 0.5 s. `--steps` counts steps of the environment, so 560 are 280 actions, or 14 episodes.
# - `--seed-steps 80`: the first 80 actions are random. `--schedule-steps 200`: exploration falls over 200 actions.
# - `--eval-every 80`: every second episode, evaluate without exploration on five episodes whose seeds training does not use.
#
# In a terminal you would press Ctrl-C. Here, a script sends its signal when the agent has made its first updates:

# %% language="bash"
# difftori train difftori --env river:River --preset small --steps 560 --action-repeat 2 --horizon 3 \
#     --seed-steps 80 --schedule-steps 200 --eval-every 80 --eval-episodes 5 --seed 0 --out runs/first --quiet &
# while kill -0 $! && ! grep -qs update/ runs/first/metrics.jsonl; do sleep 1; done
# kill -INT $!
# wait $!
# echo "exit code $?"

# %% [markdown]
# The run has saved a checkpoint: weights, optimisers, replay buffer, random generators, and the running episode. The same command resumes it, or:

# %%
# !difftori train --resume runs/first --quiet

# %% [markdown]
# `return` is the last evaluation, `mean_return` the mean of all evaluations. An agent step is one action.
#
# ## The run directory

# %%
# !ls runs/first

# %% [markdown]
# `report.html` shows the whole run on one page: open it in a browser. `metrics.jsonl` has the numbers behind it, one JSON object per episode,
# block of updates and evaluation. The evaluations:

# %%
from pathlib import Path

from difftori.runs.records import read_metrics

for row in read_metrics(Path("runs/first")):
    if "eval/return" in row:
        print(f"step {row['step']:3d}  return {row['eval/return']:6.2f} ± {row['eval/return_std']:.2f} over episodes")

# %% [markdown]
# ## Compare two methods
#
# The first updates made the agent worse than random before it learned. Is that the method, or this seed? One run cannot tell. A sweep file lists the
# common options once, and in `grid` the combinations: two agents with three seeds each. TD-MPC learns the same kind of model with the same options, but
# plans by sampling instead of by gradients.

# %%
with open("river.yaml", "w") as file:
    file.write("""
out: runs/river
common:
  {env: "river:River", preset: small, steps: 560, action_repeat: 2, horizon: 3, seed_steps: 80,
   schedule_steps: 200, eval_every: 80, eval_episodes: 5}
grid: {train: [difftori, tdmpc], seed: [0, 1, 2]}
""")

# %%
# !difftori sweep river.yaml --jobs 2 --quiet

# %% [markdown]
# If you stop the sweep, re-run the command to resume it. If you add seeds to the file, only the new runs start.
#
# Seed 0 of DiffTORI has the options of the first run, but was not interrupted. Resuming is exact: on one machine, both files of weights have the same SHA-256.

# %%
# !cut -c -64 runs/first/agent.pt.sha256 runs/river/river.River/difftori/seed-0/agent.pt.sha256

# %% [markdown]
# ## One page, and your own figure
#
# `difftori report` writes a page about all runs in a folder: learning curves, returns, paired differences of runs with the same seed, and the protocol.
# Brackets are 95 % intervals. The same numbers are in CSV files, for example in `pairs.csv`:

# %%
# !difftori report runs/river --out report --reference tdmpc
# !cat report/pairs.csv

# %% [markdown]
# For your own figure, `gather` reads the runs as the report does. Each run has its task, method, seed, and the curve of its evaluations. Thin lines are
# seeds, bands are Student's 95 % intervals of the mean over three seeds.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

from difftori.experiments.gather import gather
from difftori.experiments.statistics import student_interval

runs = gather([Path("runs/river")]).runs
plt.figure(figsize=(6, 3.2), dpi=80)
for method in ("difftori", "tdmpc"):
    steps, curves = runs[0].curve[0], np.stack([run.curve[1] for run in runs if run.method == method])
    means = [student_interval(values) for values in curves.T]
    (line,) = plt.plot(steps, [mean.value for mean in means], linewidth=2, label=method)
    plt.plot(steps, curves.T, color=line.get_color(), linewidth=0.6)
    plt.fill_between(steps, [m.low for m in means], [m.high for m in means], color=line.get_color(), alpha=0.15)
for value, name in ((by_hand, "hand-written controller"), (by_chance, "random actions")):
    plt.axhline(value, color="gray", linewidth=1, linestyle="--", label=name)
plt.ylim(-80, 60), plt.xlabel("environment steps"), plt.ylabel("return"), plt.legend(loc="lower right", fontsize=8)
plt.show()
# %% [markdown]
# What this shows: on this task, both agents learn in 14 episodes to return about as much as the hand-written controller, with all three seeds, and the interval of their
# difference at the end includes 0. So there is no measurable difference. What it does not show: that the methods are equal. Three seeds give wide intervals on the way, the task
# is easy, the networks are small, and the options were chosen on this task. The last numbers vary a little between machines.
#
# ## Act in your own loop
#
# `difftori.load` takes the run directory. Call `reset` when an episode begins and `act` for each action, which is in the units of your task and is executed for
# `policy.action_repeat` steps. A leading dimension of the observations is several environments at once, here four boats:

# %%
from IPython.display import Image

import difftori
from difftori.envs.video import Recording, write_gif


def picture(positions, seconds):
    """An RGB image of the river, with waves that move as the water does."""
    y, x = np.mgrid[7:-1:-0.07, -5:5:0.07]
    waves = 8 * np.sin(5 * (x - current(y, 1.0) * seconds))
    image = np.where(((y > 0) & (y < 6))[..., None], waves[..., None] + (70, 120, 190), (194, 178, 128))
    image[np.abs(np.stack((x - DOCK[0], y - DOCK[1]))).max(0) < 0.35] = (120, 70, 20)
    for boat in positions:
        image[np.hypot(x - boat[0], y - boat[1]) < 0.2] = 255
    return image.astype(np.uint8)


# %%
policy = difftori.load("runs/first")
boats = [River() for _ in range(4)]
obs = np.stack([boat.reset(seed=seed)[0] for seed, boat in enumerate(boats, start=100)])
policy.reset()
frames, rewards = [], []
for step in range(40):
    if step % policy.action_repeat == 0:
        actions = policy.act(obs)
    frames.append(picture([boat.position for boat in boats], 0.25 * step))
    results = [boat.step(action) for boat, action in zip(boats, actions, strict=True)]
    obs = np.stack([result[0] for result in results])
    rewards.append([result[1] for result in results])
print("returns", np.sum(rewards, axis=0).round(1), "m from the dock", np.hypot(*obs[:, :2].T).round(2))
write_gif(Recording(np.stack(frames), np.array(rewards), fps=10), Path("river.gif"))
Image("river.gif", format="gif", width=430)

# %% [markdown]
# ## Export and publish
#
# `difftori export` writes one file that acts without this library; the solve is part of it. The command compares the file with the agent before it keeps it.
# `--format onnx` is for ONNX Runtime.

# %%
# !difftori export runs/first --format pt2 --out river.pt2 --quiet

# %% [markdown]
# `difftori publish` writes a folder to share: weights, configuration, and a card with the evaluations. Five episodes are few, so evaluate on 50 first.
# `--to hub:USER/NAME` publishes on the Hugging Face Hub instead.

# %%
# !difftori eval runs/first --episodes 50 --quiet
# !difftori publish runs/first --to shared/river --license mit
# !ls shared/river

# %% [markdown]
# `difftori.load("shared/river")` acts with it, as with the run.
#
# ## What to change for your own problem
#
# - **The task**: your class in your file, or an id that your module registers, `--env gym:my_module:MyTask-v0`. Options of `__init__` are options of the run: `--env-options strongest=1.5`.
#   Scale observations and rewards to about 1. `--obs pixels` is for images, `--flatten-obs` for dictionaries. With a method `render` and the render mode
#   `rgb_array`, `difftori eval --video` films an episode. See [Environments](../environments.md#your-own-environment).
# - **The length**: most tasks need 10,000 to 1,000,000 steps. Leave out `--horizon`, `--seed-steps` and `--schedule-steps` then, and
#   start with `--preset compact`; the default is the size of the paper.
# - **The methods**: `sac` and `drqv2`, or one option of an agent, such as `variants: [{train: difftori, pg: off}, {train: difftori}]`. See [Reinforcement learning](../reinforcement.md).
# - **The evidence**: more seeds in `grid`, more tasks in `grid: {env: [...]}`. See [Sweeps](../sweeps.md) and [Reports](../reports.md).
# - **Acting**: [your own loop](../acting.md), [a file without this library](../export.md), [a server](../serving.md), [a published folder](../publishing.md).
