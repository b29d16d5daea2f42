"""What a run will need, before anything is rented: arithmetic, over what `trace` finds the towers to cost.

Only `trace` and `watch` import torch; whoever needs the rest of the plan pays nothing for it.
"""
