"""The HTML report of a comparison: one offline file. ``page`` puts it together."""
