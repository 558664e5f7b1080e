"""The graph and the vocabulary that passes, code generators and the runtime share."""
