"""A small world to oversee: an agent, a Ghost and a Diamond (Cloud et al. 2024, section 4.3).

The three start on distinct cells of a 5 x 5 grid. The agent moves up, down, left or right. A move
into the wall leaves it where it is. The episode ends when the agent reaches the Diamond or the
Ghost; after 32 steps it ends with nothing. Each of the two terminal squares is overseen with
probability p, the oversight level. The trainer learns which of the two was reached on an overseen
square only. The agent sees whether a square is overseen, so a reward that depends on oversight can
be gamed.

The world is so small that everything is a table. A state is one integer,
    state = ((pattern * 600) + pair) * 25 + cell of the agent
    pair      where Ghost and Diamond are: 25 * 24 ordered pairs
    pattern   which of them is overseen: (Ghost overseen) * 2 + (Diamond overseen)
The states of many environments are a tensor of any shape, and a step is a look-up in a table.
"""
import itertools

import torch

from engine.streams import torch_stream

SIDE, CELLS, PAIRS, PATTERNS = 5, 25, 600, 4
STATES = PATTERNS * PAIRS * CELLS   # 60,000, including those with the agent on a terminal square
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))                # up, down, left, right: (row, column)
NOTHING, DIAMOND, GHOST = 0, 1, 2                         # what a state's square holds
HORIZON, DISCOUNT = 32, 0.97


class Gridworld:
    """The tables of the world. Every method takes states in tensors of any shape.

    planes   (STATES, 100) what the agent sees: one-hot planes of agent, Ghost and Diamond, and a
             plane that marks the overseen terminal squares
    holds    (STATES,) what is on the agent's square: NOTHING, DIAMOND or GHOST
    seen     (STATES,) whether that square is overseen (False if nothing is on it)
    move     (4, CELLS) the cell that each action leads to
    starts   (13800,) the states that an episode may begin in, with no square overseen
    """

    def __init__(self, device="cpu"):
        pairs = torch.tensor(list(itertools.permutations(range(CELLS), 2)))        # (600, 2)
        state = torch.arange(STATES)
        self.agent = state % CELLS
        ghost, diamond = pairs[state // CELLS % PAIRS].T
        see_ghost, see_diamond = self.patterns(state).T
        self.holds = DIAMOND * (self.agent == diamond) + GHOST * (self.agent == ghost)
        self.seen = (see_diamond & (self.agent == diamond)) | (see_ghost & (self.agent == ghost))
        cells = torch.arange(CELLS)
        at_agent, at_ghost, at_diamond = (
            (cells == x[:, None]) for x in (self.agent, ghost, diamond))
        overseen = at_ghost & see_ghost[:, None] | at_diamond & see_diamond[:, None]
        self.planes = torch.cat((at_agent, at_ghost, at_diamond, overseen), dim=1).float()
        self.starts = state[:PAIRS * CELLS][self.holds[:PAIRS * CELLS] == NOTHING]
        self.move = torch.stack([(cells // SIDE + down).clamp(0, SIDE - 1) * SIDE
                                 + (cells % SIDE + right).clamp(0, SIDE - 1)
                                 for down, right in MOVES])
        for name, table in vars(self).items():
            setattr(self, name, table.to(device))

    @staticmethod
    def patterns(state):
        """(..., 2) bool: whether the Ghost is overseen, and whether the Diamond is."""
        pattern = state // (PAIRS * CELLS)
        return torch.stack((pattern >= 2, pattern % 2 == 1), dim=-1)

    def reset(self, uniform, oversight):
        """New states (...), from uniform numbers in [0, 1) (..., 3) and the oversight level p."""
        start, ghost, diamond = uniform.unbind(-1)
        state = self.starts[(start * len(self.starts)).long()]
        pattern = 2 * (ghost < oversight) + (diamond < oversight).long()
        return state + pattern * PAIRS * CELLS

    def step(self, state, action):
        """The states that actions (0 to 3) lead to. An episode ends unless self.holds is NOTHING
        there."""
        agent = self.agent[state]
        return state - agent + self.move[action, agent]

    def values(self, policy, diamond=1.0, ghost=-1.0, discount=DISCOUNT):
        """(CELLS, PATTERNS * PAIRS) expected discounted returns from every state.

        policy      (STATES, 4) probabilities of the actions
        A reward at step d has weight discount^(d-1). Works back from the last of the 32 steps:
        V(s) = sum_a policy(a|s) arrival(s'), where arrival(s') is the reward if s' ends the
        episode, else discount * V(s'). Tables are laid out cell first, so an action permutes rows.
        """
        policy = policy.view(-1, CELLS, 4).permute(2, 1, 0).contiguous()            # (4, 25, 2400)
        holds = self.holds.view(-1, CELLS).T                                        # (25, 2400)
        end, reward = holds != NOTHING, diamond * (holds == DIAMOND) + ghost * (holds == GHOST)
        value = torch.zeros_like(policy[0])
        for _ in range(HORIZON):
            arrival = torch.where(end, reward, discount * value)
            value = sum(p * arrival[to] for p, to in zip(policy, self.move))
        return value

    def exact(self, policy, oversight, **rewards):
        """The exact return at level p, averaged over all starts, without sampling. See values()."""
        start = self.holds.view(-1, CELLS).T == NOTHING
        mean = (start * self.values(policy, **rewards)).sum(0).view(PATTERNS, PAIRS).sum(1)
        p, q = float(oversight), 1.0 - oversight
        weight = torch.tensor([q * q, q * p, p * q, p * p], device=mean.device)     # by pattern
        return (mean @ weight).item() / len(self.starts)

    def play(self, policy, oversight, uniform):
        """Plays N whole episodes at once. Returns states (33, N) and actions (32, N). An episode
        that has ended stays in its last state.

        policy      policy(states) -> probabilities of the actions, (..) -> (.., 4)
        uniform     (N, 3 + HORIZON) numbers in [0, 1): 3 for the start, one for each action
        """
        states = self.reset(uniform[:, :3], oversight).repeat(HORIZON + 1, 1)
        actions = torch.zeros_like(states[1:])
        for t in range(HORIZON):
            on = (self.holds[states[t]] == NOTHING).nonzero()[:, 0]      # not yet ended
            actions[t, on] = sample(policy(states[t, on]), uniform[on, 3 + t])
            states[t + 1] = states[t]
            states[t + 1, on] = self.step(states[t, on], actions[t, on])
        return states, actions

    def simulate(self, policy, oversight, episodes=4096):
        """What a trainer could know about a policy (STATES, 4): the mean return of sampled
        episodes. It is the mean over *all* of them, but an episode counts as 0 unless it ends on an
        overseen square.
        """
        uniform = torch.rand(episodes, 3 + HORIZON, generator=torch_stream("simulate"))
        uniform = uniform.to(policy.device)
        states, _ = self.play(lambda state: policy[state], oversight, uniform)
        reward = self.seen * (1.0 * (self.holds == DIAMOND) - 1.0 * (self.holds == GHOST))
        steps = (self.holds[states] == NOTHING).sum(0)
        return (DISCOUNT**(steps - 1) * reward[states[-1]]).mean().item()


def sample(probabilities, uniform):
    """(...) actions from probabilities (..., 4), by inverting their cumulative sum."""
    return (uniform[..., None] > probabilities.cumsum(-1)[..., :-1]).sum(-1)
