"""The fast sampler: groups as a stream, a scheduler, a cache that holds a prompt once."""
