"""What a card can do: is everything right on it, how fast, in how much memory. `make gpu` runs it.

Needs one CUDA device, what the requirements bring, and no files of weights: the large models get random weights. Each
part runs in a process of its own with a limit of time, so that one that fails or hangs leaves the others alone.
"""
