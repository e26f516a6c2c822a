"""k steps of a Markov chain are the k-th power of its matrix.

A weather of three states; P[i, j] is the probability of state j after state i. From each state many walks are simulated,
and after k steps their shares are compared with the rows of P^k, which the linear kernel multiplies.

What to see: the simulated shares (dots) lie on the lines of P^k within the error that the number of walks allows (shaded,
two standard deviations, which one in twenty may leave). From every start they run into the same three values: the stationary
distribution, P's eigenvector to the eigenvalue 1. The distance to it falls as the second eigenvalue's powers (last panel).
"""

import torch
from common import figure, run, save

from dlkern.nn import functional as F

P = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.2, 0.3, 0.5]], dtype=torch.float64)
NAMES = ("sun", "cloud", "rain")


def powers(matrix, count):
    """[count + 1, n, n]: P^0, P^1, ..."""
    result = [torch.eye(len(matrix), dtype=matrix.dtype)]
    for _ in range(count):
        result.append(F.linear(result[-1], matrix.T.contiguous()))
    return torch.stack(result)


def walks(start, count, steps):
    """Shares of the states after each step, [steps + 1, 3], of `count` simulated walks."""
    state = torch.full((count,), start)
    shares = []
    for _ in range(steps + 1):
        shares.append(torch.bincount(state, minlength=3) / count)
        state = torch.multinomial(P[state], 1)[:, 0]
    return torch.stack(shares)


def main(steps=12, report=None, count=4000):
    exact = powers(P, steps)
    values, vectors = torch.linalg.eig(P.T)
    stationary = vectors[:, values.real.argmax()].real
    stationary = stationary / stationary.sum()
    drawing, (axes,) = figure(1, 4, (16, 4))
    worst = 0.0
    for start in range(3):
        shares = walks(start, count, steps)
        deviation = (exact[:, start] * (1 - exact[:, start]) / count).sqrt()
        excess = ((shares - exact[:, start]).abs() / deviation.clamp(min=1e-12))[1:].max().item()
        worst = max(worst, excess)
        for state in range(3):
            line = axes[start].plot(exact[:, start, state], label=NAMES[state])[0]
            axes[start].plot(shares[:, state], ".", color=line.get_color())
            axes[start].fill_between(
                range(steps + 1), exact[:, start, state] - 2 * deviation[:, state],
                exact[:, start, state] + 2 * deviation[:, state], color=line.get_color(), alpha=0.2,
            )
        axes[start].set(title=f"after {NAMES[start]}", xlabel="steps", ylim=(0, 1))
    axes[0].legend()
    distance = (exact - stationary).abs().sum(-1).amax(-1)
    second = values.abs().sort().values[-2].item()
    axes[3].semilogy(distance, label="distance to stationary")
    axes[3].semilogy([distance[0] * second**k for k in range(steps + 1)], "--", label="second eigenvalue^k")
    axes[3].set(title="forgetting the start", xlabel="steps")
    axes[3].legend()
    save(drawing, report, "markov_chain")
    return {
        "stationary": [round(v, 4) for v in stationary.tolist()],
        "worst deviation in standard deviations": worst,
        "distance to stationary": distance[-1].item(),
        "rows sum to": exact[-1].sum(-1).mean().item(),
    }


if __name__ == "__main__":
    run(main, 12)
