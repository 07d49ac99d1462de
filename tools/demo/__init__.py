"""Scenes, questions, training and evaluation of the demo model shipped with vlmchat."""

import os

# Threads that wait must not take the processor from others; this has to precede torch's import.
for _name, _value in (
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("GOMP_SPINCOUNT", "0"),
    ("KMP_BLOCKTIME", "0"),
):
    os.environ.setdefault(_name, _value)
