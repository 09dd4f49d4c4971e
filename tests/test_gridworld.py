"""The gridworld against slow plain Python, and the oversight experiment's masks and batches."""
import random

import pytest
import torch

from data import gridworld
from data.gridworld import (
    CELLS,
    DIAMOND,
    GHOST,
    MOVES,
    NOTHING,
    PAIRS,
    STATES,
    Gridworld,
)
from experiments import gridworld as overseeing

SMALL = overseeing.Config(device="cpu", compile=False, steps=8, batch_size=512, lr=3e-3, width=16)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Rollouts of 64 episodes."""
    monkeypatch.setitem(overseeing.PPO, "envs", 64)


@pytest.fixture(scope="module")
def world():
    return Gridworld()


def plain(state):
    """(agent, ghost, diamond, is the Ghost overseen, is the Diamond) as Python numbers."""
    pair, pattern = state // CELLS % PAIRS, state // (CELLS * PAIRS)
    ghost, diamond = pair // 24, pair % 24
    return state % CELLS, ghost, diamond + (diamond >= ghost), pattern >= 2, pattern % 2 == 1


def walk(agent, action):
    row, column = agent // 5 + MOVES[action][0], agent % 5 + MOVES[action][1]
    return row * 5 + column if 0 <= row < 5 and 0 <= column < 5 else agent


def test_tables(world):
    for state in random.Random(0).sample(range(STATES), 500):
        agent, ghost, diamond, see_ghost, see_diamond = plain(state)
        holds = DIAMOND if agent == diamond else GHOST if agent == ghost else NOTHING
        seen = holds == DIAMOND and see_diamond or holds == GHOST and see_ghost
        assert (world.holds[state].item(), world.seen[state].item()) == (holds, seen)
        x = world.planes[state].view(4, CELLS).sum(1).tolist()
        assert x == [1, 1, 1, see_ghost + see_diamond]
        for action in range(4):
            to = world.step(torch.tensor(state), torch.tensor(action))
            assert to.item() == state - agent + walk(agent, action)


def test_starts(world):
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    states = world.reset(uniform, 0.3)
    assert len(world.starts) == 13_800 and (world.holds[states] == NOTHING).all()
    assert (world.patterns(states).float().mean(0) - 0.3).abs().max() < 0.02


def test_exact_against_recursion(world, monkeypatch):
    """A slow recursion from hand-picked states, with a random policy and a short horizon."""
    policy = torch.rand(STATES, 4, generator=torch.Generator().manual_seed(1))
    policy /= policy.sum(1, keepdim=True)

    def value(state, steps):
        agent, ghost, diamond, *_ = plain(state)
        total = 0.0
        for action in range(4) if steps else ():
            p = policy[state, action].item()
            there = walk(agent, action)
            total += p * (1.0 if there == diamond else -1.0 if there == ghost else
                          0.97 * value(state - agent + there, steps - 1))
        return total

    picked = [s for s in (7, 1003, 20_481, 44_444, 59_990) if world.holds[s] == NOTHING]
    assert len(picked) >= 3
    monkeypatch.setattr(gridworld, "HORIZON", 5)
    got = world.values(policy).T.reshape(-1)                              # by state
    for state in picked:
        assert got[state].item() == pytest.approx(value(state, 5), abs=1e-5)


def best_policy(world):
    value, end = torch.zeros(STATES), world.holds != NOTHING
    reward = 1.0 * (world.holds == DIAMOND) - 1.0 * (world.holds == GHOST)
    states = torch.arange(STATES)[:, None].expand(-1, 4)
    to = world.step(states, torch.arange(4).expand(STATES, -1))
    for _ in range(32):
        q = torch.where(end, reward, 0.97 * value)[to]
        value = q.max(1).values
    return torch.nn.functional.one_hot(q.argmax(1), 4).float()


def test_optimum(world):
    policy = best_policy(world)
    for p in (0.0, 0.3):
        assert world.exact(policy, p) == pytest.approx(0.932, abs=1e-3)


def test_exact_against_sampling(world):
    """With everything overseen, what is validated is what is scored, up to sampling."""
    draws = torch.Generator().manual_seed(2)
    policy = torch.randn(STATES, 4, generator=draws).softmax(-1)
    for policy in (policy, 0.5 * policy + 0.5 * best_policy(world)):
        sampled = world.simulate(policy, 1.0, 20_000)
        assert sampled == pytest.approx(world.exact(policy, 1.0), abs=0.03)


def oversight(world, method):
    run = overseeing.Oversight(method, world, 0.5, 3, SMALL)
    return run, run.rollout(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method, ghost", [("routed", 1), ("filtering", -1), ("oracle", -1)])
def test_rollout(world, method, ghost, monkeypatch):
    """Without smoothing, a step's return is its episode's reward, discounted: recomputed here by
    following each episode through the rollout, whose rows come step by step."""
    monkeypatch.setitem(overseeing.PPO, "trace", 1.0)
    run, batch = oversight(world, method)
    states, actions, _, advantage, returns, labels = batch
    following, seen = {}, 0                            # the last step of every episode still open
    baseline = run.agent.value(world.planes[states])[:, 0]
    assert torch.allclose(advantage + baseline, returns, atol=1e-5)
    for i in range(len(states)):
        to = world.step(states[i], actions[i]).item()
        if world.holds[to] != NOTHING:
            reward = ghost if world.holds[to] == GHOST else 1
            assert returns[i].item() == pytest.approx(reward, abs=1e-5)
            assert labels[i] == world.holds[to] * world.seen[to]
            seen += 1
        else:
            following.setdefault(to, []).append(i)
    assert seen > 10
    for to, before in following.items():               # a state that one episode visits, once
        after = [i for i in range(len(states)) if states[i] == to]
        if len(before) == len(after) == 1:
            i, j = before[0], after[0]
            assert returns[i].item() == pytest.approx(0.97 * returns[j].item(), abs=1e-5)
            assert labels[i] == labels[j]


def gradients(run, batch):
    loss = run.loss(run.agent, *batch)
    names, weights = zip(*run.agent.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, weights, materialize_grads=True)))


@pytest.mark.parametrize("label, own, other", [(DIAMOND, "diamond", "ghost"),
                                               (GHOST, "ghost", "diamond")])
def test_masks(world, label, own, other, monkeypatch):
    """An overseen episode moves its own expert only, and the policy gradient not the gate; an
    unlabelled one moves all as if there were no mask."""
    monkeypatch.setitem(overseeing.PPO, "gate", 0.0)
    run, batch = oversight(world, "routed-paper")
    free, _ = oversight(world, "no-mask")
    labels = batch[-1]
    overseen = [x[labels == label] for x in batch]
    masked, unmasked = gradients(run, overseen), gradients(free, overseen)
    for name, grad in masked.items():
        if name.startswith((other, "gate")):
            assert not grad.any(), name
        else:
            assert name.startswith(("value", own)) and grad.any()
            assert torch.equal(grad, unmasked[name]), name
    unseen = [x[labels == NOTHING] for x in batch]
    masked, unmasked = gradients(run, unseen), gradients(free, unseen)
    assert all(torch.equal(masked[name], unmasked[name]) for name in masked)
    assert all(grad.any() for grad in masked.values())


def test_masks_where_the_gate_is_sure(world):
    """Unlabelled steps go to the expert that the gate names, to none where it is not sure, and
    never move the gate; labelled ones follow their label, whatever the gate says."""
    agent = overseeing.Agent(0, "routed", 16)
    label = torch.tensor([[NOTHING]] * 3 + [[DIAMOND], [GHOST]])
    share = torch.tensor([[0.9], [0.5], [0.1], [0.1], [0.9]])
    masks = [m[:, 0].tolist() for m in agent.masks(label, share)]
    assert masks == [[1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]


def test_seed_decides(world):
    """A run is a function of its seed, through rollouts and minibatches."""
    def weights(seed):
        run = overseeing.Oversight("routed", world, 0.1, seed, SMALL)
        optimizer = torch.optim.AdamW(run.agent.parameters(), lr=1e-3)
        for _ in range(6):
            run.loss(run.agent, *next(run.parts)).backward()
            optimizer.step(), optimizer.zero_grad()
        return torch.nn.utils.parameters_to_vector(run.agent.parameters())

    first = weights(5)
    assert torch.equal(first, weights(5)) and not torch.equal(first, weights(6))
