"""A web store: the services behind its pages and its orders, and the callers of them."""
