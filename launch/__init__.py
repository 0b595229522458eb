"""Puts `sg4v` on a TPU pod: gcloud queued resources, GKE JobSets, SkyPilot (docs/launch.md)."""
