"""The demo model: its files are under `model/`; the engine loads them like any checkpoint."""
