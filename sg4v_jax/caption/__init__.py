"""Bulk captioning of an image corpus."""
