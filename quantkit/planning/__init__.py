"""Who gets how many bits: schema, policy, budget, solver."""
