"""The formulas of the PPO benchmark, on arrays that can be worked out by hand."""

import math

import pytest
import torch

from benchmarks.ppo import accuracy, gae, policy_losses, token_rewards, value_losses, whiten

# Two completions: one of three tokens, one of two and a place behind its end.
MASK = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
VALUES = torch.tensor([[0.5, 1.0, 2.0], [1.0, -1.0, 9.0]])  # what stands behind the end must not matter


def test_each_token_pays_for_its_kl_and_the_last_one_earns_the_score():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -7.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -3.0, 0.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), logps, reference, MASK, coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.0, 0.1 + 2.0], [0.0, -0.2 - 1.0, 0.0]]))


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.5, 3.0, 0.0]])
    advantages, returns = gae(rewards, VALUES, MASK, gamma=0.9, lam=0.5)
    # Errors from the last token back: r + 0.9 V' - V; then A = error + 0.45 A'.
    third = 2.0 - 2.0
    second = 1.0 + 0.9 * 2.0 - 1.0 + 0.45 * third
    first = 0.0 + 0.9 * 1.0 - 0.5 + 0.45 * second
    last = 3.0 - -1.0
    before = 0.5 + 0.9 * -1.0 - 1.0 + 0.45 * last
    torch.testing.assert_close(advantages, torch.tensor([[first, second, third], [before, last, 0.0]]))
    torch.testing.assert_close(returns, advantages + VALUES * MASK)


def test_without_discount_an_advantage_is_what_is_still_earned_less_the_value():
    rewards = torch.tensor([[0.25, 1.0, 2.0], [0.5, 3.0, 0.0]])
    advantages, returns = gae(rewards, VALUES, MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.25, 3.0, 2.0], [3.5, 3.0, 0.0]]))
    torch.testing.assert_close(advantages, returns - VALUES * MASK)


def test_with_lambda_0_an_advantage_is_the_error_of_one_step():
    rewards = torch.zeros(2, 3)
    advantages, _ = gae(rewards, VALUES, MASK, gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 1.0, -2.0], [-2.0, 1.0, 0.0]]))


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens():
    white = whiten(VALUES, MASK)
    kept = white[MASK.bool()]
    assert kept.mean() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0) == pytest.approx(1, abs=1e-5)
    assert white[1, 2] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "learns"),
    [
        (1.0, 2.0, -2.0, True),
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -1.28 * 2.0, False),  # likelier by more than is allowed
        (0.5, 2.0, -1.0, True),  # the smaller of the two: a good token that became rare may come back
        (0.5, -2.0, 0.8 * 2.0, False),
        (1.5, -2.0, 3.0, True),
    ],
)
def test_clipped_policy_loss(ratio, advantage, loss, learns):
    logps = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    losses = policy_losses(logps, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), 0.2, 0.28)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert bool(logps.grad.abs().sum() > 0) is learns


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "learns"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, True),
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, False),  # it has gone far enough towards the return
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, True),  # away from it: the larger error counts
    ],
)
def test_clipped_value_loss(value, old, target, loss, learns):
    values = torch.tensor([[value]], requires_grad=True)
    losses = value_losses(values, torch.tensor([[old]]), torch.tensor([[target]]), clip=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert bool(values.grad.abs().sum() > 0) is learns


def test_accuracy_counts_the_pairs_of_a_group_whose_rewards_differ():
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0, 9.0, 1.0])
    rewards = torch.tensor([2.0, 2.0, 0.0, 1.0, 0.0, 0.0])  # groups of three
    # First group: 0 > 2 and 1 > 2, both right. Second: 3 > 4 and 3 > 5, both wrong.
    assert accuracy(scores, rewards, 3) == 0.5
