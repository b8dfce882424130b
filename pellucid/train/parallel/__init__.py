"""Training on several ranks, with torch.distributed.

| module | holds |
|---|---|
| layout.py | how ranks share the work, and which slice of each parameter a rank holds |
"""
