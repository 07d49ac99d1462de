"""The engine: a model in this process, from checkpoint to stream of text."""
