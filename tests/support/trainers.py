"""Every policy and agent, with options of a training that takes seconds."""

EACH = "--eval-episodes 3 --save-every 1 --batch-size 8"
PENDULUM = f"--env pendulum --num-train 40 {EACH}"
REACH = f"--env tiny_env.reach:make --demos {{demos}} {EACH}"
REFINER = f"--base {{base}} --hidden 8 {EACH}"
UNET = "--dims 16 --step-width 8 --blocks 1 --noise-steps 4 --inference-steps 2"
PROBE = "--env probe:delayed-reward --preset small --eval-every 500 --eval-episodes 2 --seed-steps 100 --save-every 50"
TRAINERS = {
    "bc": f"{PENDULUM} --hidden 8 --epochs 300",
    "bc-pointnet": f"{REACH} --obs points --hidden 16 --point-layers 16 16 --epochs 100",
    "bc-rnn-gmm": f"{REACH} --hidden 16 --epochs 80",
    "difftori": f"{PROBE} --steps 600 --pg per-episode",
    "difftori-il": f"{PENDULUM} --hidden 8 --epochs 60 --init prior --latent-dim 8 --ema 0.9",
    "diffusion": f"{REACH} {UNET} --epochs 100",
    "drqv2": f"{PROBE} --steps 1200",
    "dp3": f"{REACH} --obs points {UNET} --epochs 100",
    "ibc": f"{REACH} --hidden 16 --num-negatives 8 --samples 16 --epochs 60",
    "ibc-base": f"{REFINER} --num-negatives 8 --samples 8 --epochs 60",
    "lstm": f"{PENDULUM} --hidden 8 --epochs 60",
    "mpc": f"{PENDULUM} --epochs 10",
    "residual": f"{REFINER} --epochs 200",
    "sac": f"{PROBE} --steps 1200",
    "tdmpc": f"{PROBE} --steps 800",
}
