"""The model: CLIP ViT, projector and LLaMA decoder as NNX parameter containers."""
