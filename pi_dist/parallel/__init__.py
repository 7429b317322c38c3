"""Who holds what, and what is sent: ranks, groups, the exchange of keys, sequence-parallel attention."""
