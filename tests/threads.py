"""Calls with different numbers of torch's threads."""

import torch


def on_threads(counts, function):
    """What function() returns with each number of threads; then there are as many as before."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(function())
    finally:
        torch.set_num_threads(before)
    return found
