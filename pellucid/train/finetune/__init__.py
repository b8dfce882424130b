"""Fine-tuning: a trained model learns something more.

| module | holds |
|---|---|
| lora.py | low-rank adapters: inject, extract, merge, unmerge |
| peft_format.py | adapters on disk, as PEFT writes and reads them; peft_config.py: their config |
"""
