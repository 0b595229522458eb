"""Launches the captioner."""

from ml_collections import ConfigDict

from launch.configs import common


def get_config(size: str = "7b") -> ConfigDict:
    """`7b` or `13b`."""
    return common.base("captioner", size)
