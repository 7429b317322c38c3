"""What is computed, on one device: the π-attention operator, its pattern and its oracle."""
