"""The fast sampler: stream.py yields samples, scheduler.py decides which are being drawn, cache.py
holds a prompt's keys and values once for its group, packed.py lays out weights for a CPU. The plain
form, which draws the same tokens, is nanomath/sampler.py."""
