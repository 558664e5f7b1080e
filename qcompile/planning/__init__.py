"""Planning: what a compilation is going to do, need and give, before a weight is read."""
