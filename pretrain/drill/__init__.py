"""Faults on purpose: a small run is killed, starved and lied to, and must end with the weights of an undisturbed one.

Read faults.py (what is done and what is expected), then trial.py (how one fault is tried).
"""
