"""Captioning a corpus: cut into shards, which any number of processes claim, finish and leave in order."""
