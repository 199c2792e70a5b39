"""Act with an exported agent. This file needs numpy, gymnasium and onnxruntime, and neither torch nor difftori."""

import json
import sys

import gymnasium
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["difftori"])
shapes = {name: [1 if n == "rows" else n for n in entry["shape"]] for name, entry in about["inputs"].items()}
rng, env = np.random.default_rng(0), gymnasium.make(sys.argv[2])
laws = {"standard normal": rng.normal, "uniform in [0, 1)": rng.random}
noise = {name: laws[entry["random"]] for name, entry in about["inputs"].items() if "random" in entry}
for episode in range(3):
    obs, _ = env.reset(seed=episode)
    given, total, over = {"first": np.ones(1), "last_plan": np.zeros(shapes.get("last_plan", ()))}, 0.0, False
    while not over:
        given |= {"state": obs[None]} | {name: draw(size=shapes[name]) for name, draw in noise.items()}
        inputs = {name: given[name].astype(np.float32) for name in shapes}
        found = dict(zip(about["outputs"], session.run(about["outputs"], inputs), strict=True))
        for _ in range(about["action_repeat"]):
            obs, reward, terminated, truncated, _ = env.step(found["actions"][0])
            total, over = total + float(reward), terminated or truncated
            if over:
                break
        given = {"first": np.zeros(1), "last_plan": found.get("plan")}
    print(f"episode {episode}: return {total:.1f}")
