"""Item vectors in Milvus: the index, its connection, and the collections of a store."""
