"""Vectors in Milvus: the index, its client, and the collections of a store."""
