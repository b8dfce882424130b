"""Fine-tuning: a trained model learns something more.

| module | holds |
|---|---|
| lora.py | low-rank adapters: inject, extract, merge, unmerge |
"""
