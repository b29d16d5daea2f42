"""`pretrain doctor [CONFIG]`: whether this machine, or every node of a job, is fit for a run; nothing is trained.

A check is a function of a `Patient` that yields findings of its own rank (base.py), listed in registry.py. The ranks
make them side by side (examination.py), compare what they found (judge.py), and tell it as one table (report.py).
"""
