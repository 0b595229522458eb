"""Attention and other fused maths, behind one entry point each."""
