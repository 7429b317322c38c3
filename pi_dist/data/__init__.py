"""From text to batches: tokenizer, prepared shards with an index, and the loader with its cursor."""
