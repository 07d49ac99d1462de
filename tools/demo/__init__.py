"""Scenes, questions, training and evaluation of the demo model shipped with vlmchat."""
