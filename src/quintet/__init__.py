"""Quintet: one contract, five interaction styles, any transport."""
