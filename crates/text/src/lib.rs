//! Tokenizer, chat template, loss mask by rendering, streaming detokenizer: one path for training and serving
