"""Healing and teaching: adapters trained on top of packed weights, rewards, and what a user needs to trust both."""
