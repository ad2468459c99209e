"""Measurements that print tables and write JSON; nothing in the library depends on them."""
