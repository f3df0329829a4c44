"""Checkpoints: the weight format that transformers loads, writing, inspecting, and accounting for every tensor.

Imports `report`, `plan`, `model`, `files` and `nn`; does not know how layers are made.
"""
