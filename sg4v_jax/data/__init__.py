"""Input: records, text, images, packing and the loader."""
