"""Attention behind one signature: `attention(q, k, v, mask=None) -> out`, tensors (batch, heads, tokens, head_dim)."""
