"""Item vectors in Milvus: the index, its connection, and its location."""
