"""The π-Transformer: rotary positions, π-attention with its gate, blocks, loss, FLOP count."""
