"""Exits attached to a model, as one torch module for training and export: those of a
`classifier`, those of a `decoder`, and how checkpoints hold both (`saved`)."""
