"""Chat with vision-language models. Imports nothing, so that `vlmchat --help` is quick."""

__version__ = "0.1.0"
