"""A model card for the Hub, of one artifact or of all files of a repository. ``card`` puts it together."""
