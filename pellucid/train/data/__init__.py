"""Text for training: documents, shards of token ids, batches of windows in a seeded order."""
