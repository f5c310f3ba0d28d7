"""Files here and in buckets: written whole, owned by a marker, locked by a lease, cached."""
