"""Regenerates golden_diffusion.json: what Hugging Face diffusers computes, for test_diffusion.py to compare with.

python -m venv /tmp/golden && /tmp/golden/bin/pip install diffusers==0.42.1 torch
PYTHONPATH=. /tmp/golden/bin/python tests/models/make_golden_diffusion.py
"""

import json
from pathlib import Path

import torch

from tests.support.diffusion import STEPS, noise, predicted


def main():
    """Run the schedulers."""
    from diffusers import DDIMScheduler, DDPMScheduler, __version__
    from diffusers.schedulers import scheduling_ddpm

    common = {"num_train_timesteps": STEPS, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    ddpm = DDPMScheduler(**common, variance_type="fixed_small", prediction_type="epsilon")
    at = [0, 7, 50, 99]
    found = {
        "diffusers": __version__,
        "signal": ddpm.alphas_cumprod.tolist(),
        "noised_at": at,
        "noised": [ddpm.add_noise(0.5 * predicted(noise(k), k), noise(k), torch.tensor([k, k])).tolist() for k in at],
    }
    fresh = {}
    scheduling_ddpm.randn_tensor = lambda *_, **__: fresh["now"]
    for prediction in ("epsilon", "sample"):
        ddpm = DDPMScheduler(**common, variance_type="fixed_small", prediction_type=prediction)
        ddpm.set_timesteps(STEPS)
        found[f"ddpm {prediction} {STEPS}"] = x = []
        now = noise(-1)
        for step in ddpm.timesteps.tolist():
            fresh["now"] = noise(step)
            now = ddpm.step(predicted(now, step), step, now).prev_sample
            x.append(now.tolist())
        found[f"ddpm {prediction} {STEPS}"] = x[::9]
        for count in (10, 16, 100):
            ddim = DDIMScheduler(**common, set_alpha_to_one=True, steps_offset=0, prediction_type=prediction)
            ddim.set_timesteps(count)
            now = noise(-1)
            for step in ddim.timesteps.tolist():
                now = ddim.step(predicted(now, step), step, now, eta=0.0).prev_sample
            found[f"ddim {prediction} {count}"] = now.tolist()
    Path(__file__).with_name("golden_diffusion.json").write_text(json.dumps(found, indent=None) + "\n")


if __name__ == "__main__":
    main()
