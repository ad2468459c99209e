"""Choosing the coordinates of gradients to keep: at random, by energy, by leverage, or learned (Selective Mask)."""
