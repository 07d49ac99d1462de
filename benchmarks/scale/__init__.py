"""Many workers and many conversations, simulated: `python -m benchmarks scale`."""
