"""Topic models of a text column: tokens, vocabulary, engines, coherence, pictures, pages, labels (data_tools.lda)."""
