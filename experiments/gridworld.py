"""Oversight of a reinforcement learner with few labelled episodes (Cloud et al. 2024, 4.3).

    python -m experiments.gridworld                              3% and 10% of squares are overseen
    python -m experiments.gridworld --seeds=5 --oversight=0.01,0.03,0.1,0.4

Diamond and Ghost give the same reward. The trainer learns which one was reached on overseen squares
only. A labelled episode trains one of two experts: Diamond's or Ghost's. After training, the
Diamond expert is deployed alone.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.gridworld import CELLS, DIAMOND, DISCOUNT, GHOST, HORIZON, NOTHING, Gridworld
from engine.disk import take
from engine.hardware import autocast, counting_flops, hardware, to_device
from engine.knobs import BadInput, knob, means_nothing
from engine.process import WORLD, run
from engine.report import folder_of, mean_sd, picture, table, write_rows
from engine.streams import torch_stream
from model import mlp
from route import route
from train import Basic, fit


@dataclass
class Config(Basic):
    task: ClassVar[str] = "gridworld"
    seeds: int = knob(2, "how many seeds, from --seed on", 1)
    oversight: list[float] = knob([0.03, 0.1], "shares of terminal squares that are overseen",
                                  0.001, 1)
    width: int = knob(128, "width of the hidden layers", 8)
    steps: int = knob(1200, "training steps, the same for every method", 1)
    batch_size: int = knob(2048, "approximate number of the agent's steps in a minibatch", 2, 2**31)
    lr: float = knob(3e-3, "AdamW's rate", 0, 1)


# One configuration for every method and level, chosen on seeds 100-102 at oversight .03. A rollout
# is `envs` whole episodes. It is used `epochs` times, in minibatches of about cfg.batch_size steps.
PPO = dict(envs=1024, epochs=4, clip=0.2, trace=0.95, entropy=0.01, value=0.5, gate=0.01, sure=0.8)
OVERSEERS = {                         # what routes the gradient, and the rule of the reward
    "routed": ("sure", "any"),            # unlabelled steps update an expert if the gate is sure
    "routed-paper": ("labels", "any"),    # overseen episodes update their own expert; others, both
    "no-mask": (None, "any"),             # every episode updates both experts and the gate
    "filtering": (None, "label"),         # learns from overseen episodes only
    "naive": (None, "seen"),              # reward 1 for any end except an overseen Ghost
    "oracle": (None, "truth")}            # the reward is the true score


def started(generator, *sizes):
    """An mlp() with orthogonal weights. Its output starts near 0, so all actions are as likely."""
    net = mlp(*sizes)
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight, 2**0.5, generator)
        nn.init.zeros_(layer.bias)
    net[-1].weight.data *= 0.01 / 2**0.5
    return net


class Agent(nn.Module):
    """Two experts and a gate, or one expert; and a value network, the baseline.

    The gate does not see which squares are overseen. All labelled episodes end on an overseen
    square, so the gate would learn only that the overseen square is the one reached. It would learn
    nothing about the other states.
    """

    def __init__(self, seed, method, width):
        super().__init__()
        made, (self.routed, rule) = torch_stream("agent", seed), OVERSEERS[method]
        self.gate = None
        self.value = started(made, 4 * CELLS, width, width, 1)
        self.diamond = started(made, 4 * CELLS, width, width, 4)
        if rule == "any":
            self.ghost = started(made, 4 * CELLS, width, width, 4)
            self.gate = started(made, 3 * CELLS, width, width, 1)

    def masks(self, label, share):
        """Gradient masks (N, 1) of Diamond expert, Ghost expert and gate, for labels (N, 1)."""
        free = label == NOTHING
        masks = [label != GHOST, label != DIAMOND, free]
        if self.routed == "sure":       # the gate learns from labels only; a sure gate acts as one
            sure = share > PPO["sure"], share < 1 - PPO["sure"], free & False
            masks = [torch.where(free, s, m) for s, m in zip(sure, masks)]
        return [m.float() for m in masks]

    def forward(self, x, label=None):
        """Planes x (N, 100) -> logits of the actions (N, 4) and of the gate (N, 1). label: (N, 1).
        """
        diamond = self.diamond(x)
        if self.gate is None:
            return diamond, None
        ghost, gate = self.ghost(x), self.gate(x[:, :3 * CELLS])
        share = gate.sigmoid()
        if self.routed and label is not None:
            masks = self.masks(label, share)
            diamond, ghost, share = (route(h, m) for h, m in zip((diamond, ghost, share), masks))
        return share * diamond + (1 - share) * ghost, gate


class Oversight:
    """One run of a method at an oversight level, from a seed, with PPO (Schulman et al. 2017)."""

    def __init__(self, method, world, level, seed, cfg):
        self.world, self.level, self.seed, self.rows = world, level, seed, cfg.batch_size
        self.device = hardware(cfg)[0]
        self.agent, self.flops = Agent(seed, method, cfg.width).to(self.device), 0  # of rollouts
        self.rule, self.parts = OVERSEERS[method][1], self.minibatches()
        costly = {"any": False, "seen": world.seen}.get(self.rule, True)   # which Ghosts cost 1
        self.reward = 1.0 * (world.holds != NOTHING) - 2.0 * ((world.holds == GHOST) & costly)

    @torch.no_grad()
    def rollout(self, generator):
        """Plays whole episodes. Returns states, actions, their log-probabilities, advantages,
        returns and labels of all N steps, (N,) each. A step's label says what its episode ends on:
        DIAMOND or GHOST if that square is overseen, else NOTHING.
        """
        world, see = self.world, lambda state: self.world.planes[state]
        uniform = torch.rand(PPO["envs"], 3 + HORIZON, generator=generator)
        states, actions = world.play(lambda state: self.agent(see(state))[0].float().softmax(-1),
                                     self.level, to_device(uniform, self.device))
        live = world.holds[states[:-1]] == NOTHING
        rewards, values = self.reward[states[1:]] * live, self.reward.new_zeros(states.shape)
        values[:-1][live] = self.agent.value(see(states[:-1][live]))[:, 0].float()
        advantages = rewards + DISCOUNT * values[1:] - values[:-1]
        for t in reversed(range(HORIZON - 1)):     # generalised advantages (Schulman et al. 2016)
            advantages[t] += DISCOUNT * PPO["trace"] * advantages[t + 1]
        labels = (world.holds * world.seen)[states[-1]].expand(HORIZON, -1)
        states, actions, advantages, values, labels = (
            x[:HORIZON][live] for x in (states, actions, advantages, values, labels))
        logps = self.agent(see(states))[0].float().log_softmax(-1).gather(1, actions[:, None])[:, 0]
        torch.clear_autocast_cache()          # it has weights that were cast without gradients
        return states, actions, logps, advantages, advantages + values, labels

    def minibatches(self):
        """Yields loss()'s arguments for one minibatch, without end. Filtering makes as many updates
        as the other methods, from fewer rows."""
        for number in itertools.count():
            generator = torch_stream("rollout", self.seed, number)
            with counting_flops() as counter:
                played = self.rollout(generator)
            self.flops += counter.get_total_flops()
            label, parts = played[-1], round(len(played[-1]) / self.rows)
            used = (label != NOTHING if self.rule == "label" else label >= 0).nonzero()[:, 0]
            for _ in range(PPO["epochs"]):
                order = used[torch.randperm(len(used), generator=generator).to(self.device)]
                for part in order.chunk(max(parts, 1)) if len(used) else ():
                    yield [x[part] for x in played]

    def loss(self, agent, states, actions, before, advantage, returns, labels):
        """PPO's loss plus the gate's cross-entropy on labelled steps."""
        x, known = self.world.planes[states], labels != NOTHING
        logits, gate = agent(x, labels[:, None])
        logp = logits.float().log_softmax(-1)
        ratio = (logp.gather(1, actions[:, None])[:, 0] - before).exp()
        clipped = ratio.clamp(1 - PPO["clip"], 1 + PPO["clip"])
        gain = advantage.mul(ratio).minimum(advantage * clipped).mean()
        entropy = -(logp.exp() * logp).sum(-1).mean()
        error = F.mse_loss(agent.value(x)[:, 0].float(), returns)
        loss = PPO["value"] * error - gain - PPO["entropy"] * entropy
        if gate is None or not known.any():
            return loss
        return loss + PPO["gate"] * F.binary_cross_entropy_with_logits(
            gate[known, 0].float(), (labels[known] == DIAMOND).float())

    def evaluate(self):
        """Scores the deployed policy, the Diamond expert: {"return": its exact return,
        "validation": the estimate that a trainer could make}."""
        with torch.autocast(self.device.type, enabled=False):
            policy = self.agent.diamond(self.world.planes).softmax(-1)
        return {"return": self.world.exact(policy, self.level),
                "validation": self.world.simulate(policy, self.level)}


def oversee(cfg, world, method, level, seed):
    """The row of one run. early is the return at the checkpoint with the best validation."""
    run = Oversight(method, world, level, seed, cfg)
    with autocast(cfg):         # Plays the first rollout now. Otherwise fit(), which measures its
        parts = itertools.chain([next(run.parts)], run.parts)   # first step, would count it for all
    curve = fit(run.agent, lambda agent, step: run.loss(agent, *next(parts)),
                dataclasses.replace(cfg, compile=False), cfg.steps, cfg.lr, decay=1.0,
                name=f"{method} {level:g} {seed}", evaluate=run.evaluate, beside=lambda: run.flops,
                evaluate_at=range(0, cfg.steps, -(-cfg.steps // 8)))["history"]
    return {"method": method, "oversight": level, "seed": seed, "return": curve[-1]["return"],
            "early": max(curve, key=lambda h: h["validation"])["return"], "history": curve}


def main(cfg):
    """Runs every method at every oversight level, with every seed."""
    if WORLD > 1:
        raise BadInput("the gridworld runs in one process: its models are too small for more")
    means_nothing(cfg, ("save_every", "resume", "remake"), "it keeps no models")
    take(folder_of(cfg))
    world, rows = Gridworld(hardware(cfg)[0]), []
    for level, seed, method in itertools.product(
            cfg.oversight, range(cfg.seed, cfg.seed + cfg.seeds), OVERSEERS):
        rows.append(oversee(cfg, world, method, level, seed))
        write_rows("gridworld", cfg, None, rows, quiet=True)

    def of(method, level, key="return"):
        return [r[key] for r in rows if (r["method"], r["oversight"]) == (method, level)]

    write_rows("gridworld", cfg, None, rows)
    picture("gridworld", cfg, draw, cfg, of, [h["step"] for h in rows[0]["history"]], panels=2)
    lines = [{"method": method + ", stopped early" * (key == "early")}
             | {p: mean_sd(of(method, p, key)) for p in cfg.oversight}
             for key in ("return", "early") for method in OVERSEERS]
    table(lines, {"method": "return"} | {p: f"oversight {p:g}" for p in cfg.oversight})


def draw(axes, cfg, of, steps):
    """Draws the return against the oversight level, and learning curves at one level. Bands are one
    standard deviation of the sample, as in the table."""
    def spread(seeds):
        return seeds.std(0, ddof=1) if len(seeds) > 1 else 0 * seeds[0]

    shown = min(cfg.oversight, key=lambda p: abs(p - 0.03))
    for method in OVERSEERS:
        ends = [np.array(of(method, p)) for p in sorted(cfg.oversight)]
        curves = np.array([[h["return"] for h in history]
                           for history in of(method, shown, "history")])      # (seeds, steps)
        for ax, x, mean, sd in (
                (axes[0], sorted(cfg.oversight), [e.mean() for e in ends],
                 [spread(e) for e in ends]),
                (axes[1], steps, curves.mean(0), spread(curves))):
            mean, sd = np.array(mean), np.array(sd)
            ax.plot(x, mean, marker="o", markersize=4, label=method)
            ax.fill_between(x, mean - sd, mean + sd, alpha=0.15)
    axes[0].set(xlabel="oversight: share of squares that are labelled", xscale="log",
                xticks=sorted(cfg.oversight), xticklabels=[f"{p:g}" for p in sorted(cfg.oversight)],
                ylabel="return of the deployed policy", title="Return against oversight")
    axes[0].minorticks_off()
    axes[1].set(xlabel="training steps", ylabel="return",
                title=f"Learning curves, oversight {shown:g}")
    axes[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    run(main, Config, __doc__)
