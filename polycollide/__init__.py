"""Approximate feature collisions: what a user holds. Nothing here imports torch."""
