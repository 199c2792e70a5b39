"""Draws method_figure.svg: an optimiser inside the policy, and the gradient through it."""

import matplotlib.pyplot as plt
from control_figures import save
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, RED = "#3f51b5", "#c62828"


def box(axis, x, width, title, text, color="0.25", y=0.9):
    """A rounded box around (x, y) with a title and one formula."""
    patch = FancyBboxPatch((x - width / 2, y - 0.52), width, 1.04, "round,pad=0.03", fc="white", ec=color, lw=1.4)
    axis.add_patch(patch)
    axis.text(x, y + 0.34, title, ha="center", va="center", fontsize=9, color=color, weight="bold")
    axis.text(x, y - 0.12, text, ha="center", va="center", fontsize=9)


def arrow(axis, start, end, color="0.25", style="-", bend=0.0):
    """An arrow from start to end."""
    look = {"color": color, "linestyle": style, "connectionstyle": f"arc3,rad={bend}"}
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, lw=1.4, **look))


figure, axis = plt.subplots(figsize=(9, 2.1), layout="constrained")
axis.add_patch(FancyBboxPatch((1.55, 0.1), 5.75, 1.75, "round,pad=0.05", fc="#eef0fb", ec=BLUE, lw=1, linestyle="--"))
axis.text(4.42, 1.66, "policy", ha="center", color=BLUE, fontsize=9, weight="bold")
box(axis, 0.55, 1.1, "observation", "$s$")
box(axis, 2.6, 1.75, "encoder, start", "$z_0=h_\\theta(s),\\ a^{(0)}$")
box(
    axis,
    5.45,
    3.2,
    "solver",
    "$a^\\ast=\\arg\\max_a \\sum_t \\gamma^t f_\\theta(z_t,a_t)$\n$z_{t+1}=d_\\theta(z_t,a_t)$",
    BLUE,
)
box(axis, 8.2, 1.1, "action", "$a^\\ast(\\theta;s)$")
box(axis, 10.0, 1.7, "loss", "$\\Vert a^\\ast-a_{expert}\\Vert^2$\nor $-Q(s,a^\\ast)$", RED)
for start, end in ((1.15, 1.68), (3.53, 3.8), (7.1, 7.6), (8.8, 9.1)):
    arrow(axis, (start, 0.9), (end, 0.9))
arrow(axis, (10.0, 0.34), (5.45, 0.34), RED, "--", bend=-0.16)
arrow(axis, (5.2, 0.34), (2.6, 0.34), RED, "--", bend=-0.16)
axis.text(7.75, -0.38, "gradient through the solve (adjoint)", ha="center", color=RED, fontsize=9)
axis.set(xlim=(-0.1, 11), ylim=(-0.5, 1.95), aspect="equal")
axis.axis("off")
save(figure, "method_figure")
